"""How a run keeps gate weights: as executed, in 8 bits on a logarithmic scale, or not at all."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

WEIGHTS = ("exact", "8-bit", "none")
STEPS = 16  # values per octave: 256 of them span 16 octaves, and what lies beyond costs bytes, never accuracy
LARGEST_ERROR = 2 ** (1 / (2 * STEPS)) - 1  # relative, 2.19 %
ROUNDED = (
    f"Gate weights of this run were rounded when it was recorded (8 bits, {STEPS} values per octave): each is within {LARGEST_ERROR:.1%} of what was"
    f" executed. Two closer than {2 ** (1 / STEPS) - 1:.1%} may have become equal, so what goes by their order (first choices, drop policies by weight,"
    " passages) can come out otherwise. Experts, loads and router scores are exact."
)
NOT_STORED = (
    "Gate weights of this run were not stored: what needs the weight of a single token (passages, gate weight lost, drop policies by weight) is not"
    " known. Gate mass, first choices and flow were counted from the exact weights while it was recorded, and the experts of a token stand in the"
    " order of falling weight."
)
NOTES = MappingProxyType({"exact": "", "8-bit": ROUNDED, "none": NOT_STORED})


def rounded(weights: np.ndarray) -> np.ndarray:
    """float32, each weight the nearest of 2^(i / 16) by ratio, with its sign; 0 stays 0, rounding twice changes nothing.

    What is not a normal number or would leave float32's range stays as it is.
    """
    size = np.abs(weights.astype(np.float64))
    normal = (size >= np.finfo(np.float32).tiny) & np.isfinite(size)
    near = np.exp2(np.rint(np.log2(np.where(normal, size, 1)) * STEPS) / STEPS)
    normal &= (near >= np.finfo(np.float32).tiny) & (near <= np.finfo(np.float32).max)
    return np.where(normal, np.copysign(near, weights), weights).astype(np.float32)


def by_falling_weight(experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int [n, k]: the slots of ids [n, k] from the largest weight to the least, the earlier of equals first, those without an expert last."""
    return np.argsort(np.where(experts >= 0, -weights, np.inf), axis=1, kind="stable")
