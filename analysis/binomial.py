"""The load of one expert where each token picks k of E experts uniformly: binomial."""

from __future__ import annotations

import numpy as np


def binomial(tokens: int, share: float) -> tuple[int, np.ndarray]:
    """(low, float64 [n]): P(X = low + i) of X ~ Binomial(tokens, share), over all X but tails below 1e-16.

    For tokens > 0 and 0 < share < 1. Time and memory grow with sqrt(tokens).
    """
    mean = tokens * share
    reach = 14 * np.sqrt(mean * (1 - share)) + 40  # beyond it the tail is below 1e-16
    low, high = int(max(0, mean - reach)), int(min(tokens, mean + reach))
    x = np.arange(low, high, dtype=np.float64)
    log_mass = np.concatenate([[0.0], np.cumsum(np.log((tokens - x) / (x + 1)) + np.log(share / (1 - share)))])
    mass = np.exp(log_mass - log_mass.max())
    return low, mass / mass.sum()
