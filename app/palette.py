"""Colours. Expert hues are told apart under the common colour-vision deficiencies; even load melts into the page."""

from __future__ import annotations

import numpy as np

EXPERTS = ("#806BA5", "#96290A", "#E49E22", "#35B2FC", "#5230C1", "#C56604", "#4377FF", "#71426D")
OTHER = "#9A9A9A"
PICKED = "#14805A"  # an expert without a hue that a strip shows alone
LOAD = {
    "light": ("#053f69", "#2c7fb8", "#a9cfe6", "#f5f5f5", "#f6c39a", "#d9742b", "#7f2f08"),
    "dark": ("#9ad4ff", "#3f93cf", "#1f4e70", "#22262b", "#7a4318", "#d9792f", "#ffcf9e"),
}
AMOUNT = {
    "light": ("#f4f8fb", "#c3dcee", "#6aaed6", "#2b7bba", "#00406b"),
    "dark": ("#14181d", "#173a55", "#2468a0", "#61a9dd", "#d5eefc"),
}
DEAD = "#D55E00"


def scale(colours: tuple[str, ...]) -> list[tuple[float, str]]:
    """Evenly spaced Plotly colour stops."""
    return [(i / (len(colours) - 1), c) for i, c in enumerate(colours)]


def hued(load: np.ndarray) -> list[int]:
    """The experts of a layer that have a hue, busiest first: those of largest load int [E], equal ones by number, the idle none."""
    order = np.argsort(-load, kind="stable")[: len(EXPERTS)]
    return [int(e) for e in order if load[e] > 0]
