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
INKS = ("#1A1A1A", "#FFFFFF")


def scale(colours: tuple[str, ...]) -> list[tuple[float, str]]:
    """Evenly spaced Plotly colour stops."""
    return [(i / (len(colours) - 1), c) for i, c in enumerate(colours)]


def hued(load: np.ndarray) -> list[int]:
    """The experts of a layer that have a hue, busiest first: those of largest load int [E], equal ones by number, the idle none."""
    order = np.argsort(-load, kind="stable")[: len(EXPERTS)]
    return [int(e) for e in order if load[e] > 0]


def ink(colours: tuple[str, ...]) -> list[tuple[float, str]]:
    """Plotly colour stops for marks on cells of ``scale(colours)``: near black or white, whichever stands out more from the cell there."""
    steps = 120
    cells = [between(colours, (step + 0.5) / steps) for step in range(steps)]
    best = [max((contrast(rgb(mark), cell), mark) for mark in INKS)[1] for cell in cells]
    return [((step + side) / steps, best[step]) for step in range(steps) for side in (0, 1)]


def between(colours: tuple[str, ...], at: float) -> tuple[float, ...]:
    """The colour (red, green, blue, 0 to 255) of ``scale(colours)`` at 0 to 1, as Plotly mixes it: evenly in each channel."""
    place = at * (len(colours) - 1)
    left = min(int(place), len(colours) - 2)
    return tuple(a + (place - left) * (b - a) for a, b in zip(rgb(colours[left]), rgb(colours[left + 1]), strict=True))


def rgb(colour: str) -> tuple[float, ...]:
    """Red, green and blue of #rrggbb, 0 to 255."""
    return tuple(float(int(colour[i : i + 2], 16)) for i in (1, 3, 5))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """WCAG 2 contrast ratio of two colours, 1 to 21; marks need 3."""
    low, high = sorted(map(_luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
