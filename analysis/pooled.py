"""Load summed over layers by expert number, which a model's loss may do and nobody should: what it hides, and the loss that it makes.

A model may be even over its layers' sum and collapsed in each of them. From statistics alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .trace import Trace

EVEN, COLLAPSED = 1.5, 3.0  # max / mean: "looks even" up to the one, "collapsed" from the other, or with a dead expert


@dataclass(frozen=True)
class PooledBalance:
    """Load summed over layers by expert number, beside the layers themselves. All max / mean: 1 (even) to E.

    Expert numbers mean nothing across layers: a sum over them is shown only to expose losses that balance it.
    pooled   of the mean over layers of relative load.  worst  of the worst layer, at ``worst_site``.
    chance   mean of ``pooled`` when every layer's experts are numbered at random.
    p        P(numbering at random gives a pooled CV as small); small: something balanced the sum itself.
    dead     experts without any assignment, over all layers.
    hidden   pooled <= EVEN while a layer is >= COLLAPSED or has a dead expert.
    """

    pooled: float
    worst: float
    worst_site: int
    chance: float
    p: float
    dead: int
    layers: int

    @property
    def hidden(self) -> bool:
        """Balanced when pooled over layers, collapsed within them."""
        return self.pooled <= EVEN and (self.worst >= COLLAPSED or self.dead > 0)


def pooled_balance(trace: Trace, draws: int = 999, seed: int = 0) -> PooledBalance | None:
    """What a load chart summed over layers would hide. None without two layers of equally many experts that saw tokens."""
    sizes = {x.n_experts for x in trace.layers}
    if len(trace.layers) < 2 or len(sizes) != 1:
        return None
    loads = np.array([trace.stats.load(x.index)[: x.n_experts] for x in trace.layers])
    if not loads.sum(1).all():
        return None
    relative = loads * loads.shape[1] / loads.sum(1, keepdims=True)
    rng = np.random.default_rng(seed)
    null = np.array([rng.permuted(relative, axis=1).mean(0) for _ in range(draws)])
    pooled, worst = relative.mean(0), relative.max(1)
    p = ((null.std(1) <= pooled.std() * (1 + 1e-9)).sum() + 1) / (draws + 1)
    return PooledBalance(float(pooled.max()), float(worst.max()), int(worst.argmax()), float(null.max(1).mean()), float(p),
                         int((loads == 0).sum()), len(loads))  # fmt: skip


def transformers_auxiliary_loss(trace: Trace) -> float:
    """What transformers' load_balancing_loss_func gives for the run: E sum f_e P_e with layers pooled; even = k, not 1.

    f_e: assignments per token, P_e: mean router probability, both over the tokens of all layers at once, so that two
    collapsed layers can hide each other. Shown as "transformers variant" only. NaN where sites differ or scores are unknown.
    """
    sizes = {(x.n_classes, x.top_k) for x in trace.layers}
    tokens = sum(trace.stats.n_tokens(x.index) for x in trace.layers)
    if len(sizes) != 1 or not tokens:
        return float("nan")
    probability = np.sum([trace.stats.probability_sum(x.index) for x in trace.layers], 0) / tokens
    chosen = np.sum([trace.stats.chosen_load(x.index) for x in trace.layers], 0) / tokens
    return float(len(chosen) * (chosen * probability).sum()) if probability.sum() else float("nan")
