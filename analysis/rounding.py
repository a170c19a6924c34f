"""Gate weights in 8 bits on a logarithmic scale: the storage option beside exact ones."""

from __future__ import annotations

import numpy as np

WEIGHTS = ("exact", "8-bit")
STEPS = 16  # values per octave: 256 of them span 16 octaves, and what lies beyond costs bytes, never accuracy
LARGEST_ERROR = 2 ** (1 / (2 * STEPS)) - 1  # relative, 2.19 %
ROUNDED = (
    f"Gate weights of this run were rounded when it was recorded (8 bits, {STEPS} values per octave): each is within {LARGEST_ERROR:.1%} of what was"
    f" executed. Two closer than {2 ** (1 / STEPS) - 1:.1%} may have become equal, so what goes by their order (first choices, drop policies by weight,"
    " passages) can come out otherwise. Experts, loads and router scores are exact."
)


def rounded(weights: np.ndarray) -> np.ndarray:
    """float32, each weight the nearest of 2^(i / 16) by ratio, with its sign; 0 stays 0, rounding twice changes nothing.

    What is not a normal number or would leave float32's range stays as it is.
    """
    size = np.abs(weights.astype(np.float64))
    normal = (size >= np.finfo(np.float32).tiny) & np.isfinite(size)
    near = np.exp2(np.rint(np.log2(np.where(normal, size, 1)) * STEPS) / STEPS)
    normal &= (near >= np.finfo(np.float32).tiny) & (near <= np.finfo(np.float32).max)
    return np.where(normal, np.copysign(near, weights), weights).astype(np.float32)
