"""The map of layers and tokens, and the hue of an expert in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app import palette

from .drawing import sized

NUMBERED = 80  # tokens of a map whose cells hold their expert's number; text over more holds up the browser


def busiest_hues(experts: np.ndarray, hued: Sequence[int]) -> np.ndarray:
    """The hue of each token's expert at one layer: experts [n], -1 = none -> float32 [n], the expert's place in ``hued``.

    Every expert that is not in ``hued`` shares the number len(palette.EXPERTS), and a token without an expert is NaN.
    """
    place = np.full(max(int(experts.max(initial=-1)), *hued, -1) + 2, len(palette.EXPERTS), np.float32)
    place[list(hued)], place[-1] = np.arange(len(hued)), np.nan  # the last entry serves -1
    return place[experts]


def token_map(
    values: np.ndarray, tokens: Sequence[str], rows: Sequence[str], what: str, theme: str, hued: Sequence[Sequence[int]] | None = None
) -> go.Figure:
    """Layers x tokens: an amount, or, where ``hued`` gives the experts with a hue per layer, expert ids, coloured as ``busiest_hues`` says.

    The ids stand in the cells of up to NUMBERED tokens.
    """
    x = [f"{i} {t}" for i, t in enumerate(tokens)]  # the number keeps repeated tokens apart
    discrete = hued is not None
    colours, shown, top = palette.scale(palette.AMOUNT[theme]), values.astype(np.float32), None
    if hued is not None:
        inks = (*palette.EXPERTS, palette.OTHER)
        top = len(inks)
        shown = np.stack([busiest_hues(v, h) for v, h in zip(values, hued, strict=True)])
        shown = shown if np.isnan(shown).any() else shown.astype(np.uint8)  # a quarter of the bytes
        colours = [(s, c) for i, c in enumerate(inks) for s in (i / top, (i + 1) / top)]
    figure = go.Figure(
        go.Heatmap(
            z=shown, x=x, y=list(rows), customdata=values if discrete else shown, colorscale=colours, showscale=not discrete,
            meta={"x": "token", "y": "layer", "z": "hue" if discrete else "drawn", "customdata": [what.replace(" ", "_")]},
            zmin=0 if discrete else None, zmax=top, hoverongaps=False, colorbar={"thickness": 12, "title": {"text": what}},
            hovertemplate="%{y}, token %{x}<br>" + what + " %{customdata:" + (".0f" if discrete else ".3f") + "}<extra></extra>",
        )
    )  # fmt: skip
    if discrete and len(x) <= NUMBERED:
        figure.update_traces(text=np.where(values < 0, "", values.astype(int).astype(str)), texttemplate="%{text}")
    figure.update_xaxes(type="category", showticklabels=len(x) <= 60, title="token, in order")
    figure.update_yaxes(autorange="reversed", type="category")
    return sized(figure, max(240, 26 * len(rows) + 110))
