"""Arrays to Plotly figures; the only place that knows Plotly. Text from data comes in already escaped by app/text.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from . import palette

CONFIG = {"displaylogo": False, "toImageButtonOptions": {"format": "svg", "scale": 2}, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
OCTAVES = 3


def load_map(relative: Sequence[np.ndarray], rows: Sequence[str], theme: str, mark: tuple[int, int] | None = None) -> go.Figure:
    """Layers x experts, log2 of load over an even share, fixed at 1/8 to 8 times. Dead experts carry a cross.

    ``relative`` holds one array [E] per row; rows may differ in E. ``mark`` frames one (row, expert).
    """
    width = max(len(r) for r in relative)
    z = np.full((len(relative), width), np.nan, np.float32)
    for i, row in enumerate(relative):
        with np.errstate(divide="ignore"):
            z[i, : len(row)] = np.clip(np.log2(row), -OCTAVES, OCTAVES)
    ticks = list(range(-OCTAVES, OCTAVES + 1))
    names = ["⅛×", "¼×", "½×", "1×", "2×", "4×", "8×"]
    shown = np.full((len(relative), width), np.nan, np.float32)
    for i, row in enumerate(relative):
        shown[i, : len(row)] = row
    figure = go.Figure(
        go.Heatmap(
            z=z, x=np.arange(width), y=list(rows), customdata=shown, colorscale=palette.scale(palette.LOAD[theme]),
            zmin=-OCTAVES, zmax=OCTAVES, xgap=1, ygap=1, hoverongaps=False,
            colorbar={"tickvals": ticks, "ticktext": names, "title": {"text": "even share"}, "thickness": 12},
            hovertemplate="%{y}, expert %{x}<br>%{customdata:.2f} × its even share<extra></extra>",
        )
    )  # fmt: skip
    dead = [(e, rows[i]) for i, row in enumerate(relative) for e in np.flatnonzero(row == 0)]
    if dead:
        figure.add_scatter(x=[d[0] for d in dead], y=[d[1] for d in dead], mode="markers", name="dead",
                           marker={"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": palette.DEAD}},
                           hovertemplate="expert %{x}: no token at all<extra></extra>", showlegend=False)  # fmt: skip
    if mark is not None:
        line, expert = mark
        figure.add_shape(
            type="rect", x0=expert - 0.5, x1=expert + 0.5, y0=line - 0.5, y1=line + 0.5, line={"width": 3, "color": palette.DEAD}
        )
    figure.update_xaxes(title="expert", range=[-0.5, width - 0.5], constrain="domain", dtick=1 if width <= 16 else max(1, width // 16))
    figure.update_yaxes(autorange="reversed", type="category")
    return _sized(figure, max(240, 26 * len(rows) + 90))


def sorted_load(relative: np.ndarray, theme: str) -> go.Figure:
    """Bars of one layer's loads relative to an even share, largest first, with the even line."""
    order = np.argsort(-relative, kind="stable")
    figure = go.Figure(
        go.Bar(x=[str(e) for e in order], y=relative[order].astype(np.float32), marker_color=palette.AMOUNT["light"][3],
               hovertemplate="expert %{x}: %{y:.2f} × its even share<extra></extra>")
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": "#888", "dash": "dot"}, annotation_text="even share", annotation_font_color="#888")
    figure.update_xaxes(title="expert, busiest first", type="category")
    figure.update_yaxes(title="× even share", rangemode="tozero")
    return _sized(figure, 300)


def token_map(values: np.ndarray, tokens: Sequence[str], rows: Sequence[str], what: str, theme: str, discrete: bool) -> go.Figure:
    """Layers x tokens. ``discrete`` values are expert ids (hues repeat, the hover names the id), else an amount."""
    x = [f"{i} {t}" for i, t in enumerate(tokens)]  # the number keeps repeated tokens apart
    colours = palette.scale(palette.AMOUNT[theme])
    z = values.astype(np.float32)
    shown = z
    if discrete:
        steps = len(palette.EXPERTS)
        shown = np.where(z < 0, np.float32(np.nan), z % steps)  # -1, no expert, must not take a hue
        colours = [(s, c) for i, c in enumerate(palette.EXPERTS) for s in (i / steps, (i + 1) / steps)]
    figure = go.Figure(
        go.Heatmap(
            z=shown, x=x, y=list(rows), customdata=z, colorscale=colours, showscale=not discrete, hoverongaps=False,
            zmin=0 if discrete else None, zmax=len(palette.EXPERTS) - 1e-3 if discrete else None,
            colorbar={"thickness": 12, "title": {"text": what}},
            hovertemplate="%{y}, token %{x}<br>" + what + " %{customdata:" + (".0f" if discrete else ".3f") + "}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", showticklabels=len(x) <= 60, title="token, in order")
    figure.update_yaxes(autorange="reversed", type="category")
    return _sized(figure, max(240, 26 * len(rows) + 110))


def _sized(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": 16, "b": 8}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)"
    )
    return figure
