"""Load imbalance of one layer: pure functions on expert loads.

``load`` is int64 [E], assignments per expert at one site; experts of different layers are unrelated and never pooled.
Every function returns NaN for a layer that saw no assignment. Vectors for n = [4, 2, 1, 1] are in the tests.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .binomial import binomial

COLD_SHARE = 0.1
UNLIKELY = 0.05


def relative_load(load: np.ndarray) -> np.ndarray:
    """float64 [E]: load over the mean load; 1 is an even share, 0 a dead expert."""
    total = load.sum()
    return load * len(load) / total if total else np.full(len(load), np.nan)


def max_over_mean(load: np.ndarray) -> float:
    """Largest load over the mean; 1 (even) to E (one expert takes all)."""
    return float(relative_load(load).max())


def maxvio(load: np.ndarray) -> float:
    """MaxVio: (largest - mean) / mean; 0 to E - 1. Wang et al., arXiv 2408.15664, global form."""
    return max_over_mean(load) - 1


def cv(load: np.ndarray) -> float:
    """Coefficient of variation: population standard deviation over mean; 0 to sqrt(E - 1). Shazeer et al. 2017 square it."""
    return float(relative_load(load).std())


def gini(load: np.ndarray) -> float:
    """Gini coefficient: mean absolute difference over twice the mean; 0 to 1 - 1/E."""
    ordered, n = np.sort(relative_load(load)), len(load)
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / n**2)


def entropy(load: np.ndarray) -> float:
    """Entropy of the load shares in nats; 0 to ln E."""
    if not load.sum():
        return float("nan")
    share = load[load > 0] / load.sum()
    return float(-(share * np.log(share)).sum()) + 0.0


def normalised_entropy(load: np.ndarray) -> float:
    """Load entropy over ln E; 0 to 1, where 1 is even. 1 for a layer of one expert, which is never uneven."""
    return entropy(load) / float(np.log(len(load))) if len(load) > 1 else entropy(load) + 1


def effective_experts(load: np.ndarray) -> float:
    """exp(entropy): the number of evenly used experts with the same entropy; 1 to E."""
    return float(np.exp(entropy(load)))


def balancedness(load: np.ndarray) -> float:
    """Mean over largest load; 1/E to 1. As EPLB and SGLang report it."""
    return 1 / max_over_mean(load)


def dead(load: np.ndarray) -> float:
    """Experts with no assignment at all; 0 to E - 1."""
    return float((load == 0).sum()) if load.sum() else float("nan")


def cold(load: np.ndarray) -> float:
    """Experts with less than a tenth of the mean load, dead ones included; 0 to E - 1."""
    return float((relative_load(load) < COLD_SHARE).sum()) if load.sum() else float("nan")


def chance_cv(tokens: int, n_experts: int, top_k: int) -> float:
    """Root mean square CV when every token picks ``top_k`` different experts uniformly: sqrt((1 - k/E) / (T k/E)).

    Each load is Binomial(T, k/E) and the loads' mean is fixed, so this is exact for every T. NaN for no tokens.
    """
    share = top_k / n_experts
    return float(np.sqrt((1 - share) / (tokens * share))) if tokens else float("nan")


@lru_cache(maxsize=16_384)  # layers are alike, and so are their batches and documents
def chance_max_over_mean(tokens: int, n_experts: int, top_k: int) -> float:
    """Upper bound of the expected largest load over the mean, under the same uniform routing as ``chance_cv``.

    Each load X is Binomial(T, k/E), so E[max] <= sum over t of min(1, E P(X > t)): the union bound, which asks nothing
    of how the loads depend on each other. The tests simulate it: never below the mean, and at most 5 % above it.
    NaN for no tokens. Time and memory grow with sqrt(T).
    """
    share = top_k / n_experts
    if not tokens or share >= 1:
        return 1.0 if tokens else float("nan")
    low, mass = binomial(tokens, share)
    above = np.cumsum(mass[::-1])[::-1][1:]
    return float((low + np.minimum(1, n_experts * above).sum()) / (tokens * share))


@lru_cache(maxsize=256)
def unlikely_max_over_mean(tokens: int, n_experts: int, top_k: int, layers: int = 1) -> float:
    """A load over the mean that any expert of ``layers`` like layers exceeds in at most 1 of 20 runs of the same uniform routing.

    The union bound over all their experts. What is claimed for the busiest of many layers has been picked from them: the expected
    maximum of one layer would be exceeded by chance in nearly every run. NaN for no tokens.
    """
    share = top_k / n_experts
    if not tokens or share >= 1:
        return 1.0 if tokens else float("nan")
    low, mass = binomial(tokens, share)
    above = np.cumsum(mass[::-1])[::-1][1:]
    return float((low + int((layers * n_experts * above > UNLIKELY).sum())) / (tokens * share))


def chance_dead(tokens: int, n_experts: int, top_k: int) -> float:
    """Expected number of dead experts under the same uniform routing: E (1 - k/E)^T, exact. NaN for no tokens."""
    return n_experts * (1 - top_k / n_experts) ** tokens if tokens else float("nan")


def chance_cold(tokens: int, n_experts: int, top_k: int) -> float:
    """Expected number of cold experts under the same uniform routing: E P(X < a tenth of the mean), exact. NaN for no tokens."""
    share = top_k / n_experts
    if not tokens or share >= 1:
        return 0.0 if tokens else float("nan")
    t = np.arange(min(int(np.ceil(COLD_SHARE * tokens * share)), 2_000), dtype=np.float64)  # beyond, what is cold has P < 1e-300
    log_mass = tokens * np.log1p(-share) + np.cumsum(np.append(0, np.log((tokens - t) / (t + 1)) + np.log(share / (1 - share))))[: len(t)]
    return float(n_experts * np.exp(log_mass).sum())


def switch_auxiliary_loss(load: np.ndarray, probability_sum: np.ndarray) -> float:
    """E * sum f_e P_e with f the share of assignments and P the mean probability; 1 when even. Switch eq. 4, alpha 1."""
    if not load.sum() or not probability_sum.sum():
        return float("nan")
    return float(len(load) * (load / load.sum() * (probability_sum / probability_sum.sum())).sum())
