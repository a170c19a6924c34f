"""What every figure is built with: its size, the numbers on an axis of experts, cells that can be clicked, the colour bar of a map of log2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app import palette

AGAIN = "again"  # a trace's meta: it shows what another one tells, so it has no rows of its own
UNSEEN = "unseen"  # a trace's name: it is there for the mouse, and is not printed
BAR: Mapping[str, Any] = MappingProxyType({"displaylogo": False, "modeBarButtonsToRemove": ["toImage", "select2d", "lasso2d"]})
OCTAVES = 3
OVER = 78  # pixels above a map for its colour bar
MOST_MARKS = 1_024  # in SVG a second from some thousand on; WebGL compiles its code as it runs, which the page's policy forbids
LABELLED = 32  # experts on an axis that each keep their number, however narrow; above, Plotly thins the numbers
ABOVE = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}  # a legend


def sized(figure: go.Figure, height: int, top: int = 16, **layout: Any) -> go.Figure:
    """The figure at its height; ``layout`` in the same call, since every call of an ``update_`` method takes two milliseconds."""
    figure.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": top, "b": 8}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", **layout
    )
    return figure


def times_bar(figure: go.Figure, title: str) -> None:
    """The colour bar of a map of log2, above it, so that a narrow page is left to the cells; what lies beyond either end has the end's colour.

    Its title is a text of its own: Plotly sets that of a bar which hangs from the top of the figure onto the bar, and the axis'
    title onto the axis' numbers if the bar stands on the plot instead.
    """
    words, ends = [times(o) for o in range(-OCTAVES, OCTAVES + 1)], list(range(-OCTAVES, OCTAVES + 1))
    figure.data[0].colorbar = {"tickvals": ends, "ticktext": [f"≤{words[0]}", *words[1:-1], f"≥{words[-1]}"], "orientation": "h", "thickness": 10,
                               "lenmode": "pixels", "len": 220, "x": 0, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top", "ypad": 22}  # fmt: skip
    figure.add_annotation(
        text=title, showarrow=False, xref="paper", x=0, xanchor="left", yref="paper", y=1, yanchor="bottom", yshift=OVER - 20
    )


def times(octaves: int) -> str:
    """2 to the power of ``octaves`` as a reader says it: ⅛×, 1×, 16×."""
    return {-3: "⅛×", -2: "¼×", -1: "½×"}.get(octaves, f"{2**octaves:,}×" if octaves >= 0 else f"1/{2**-octaves:,}×")


def times_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks of an axis of log2 that holds ``low`` to ``high`` and 0: octaves, every second one of many; within one, some round ratios."""
    low, high = min(low, 0.0), max(high, 0.0)
    if 0 < high - low < 1:
        span = 2**high - 2**low
        ten = 10 ** np.floor(np.log10(span / 4))
        step = next(n * ten for n in (1, 2, 5, 10) if span <= 8 * n * ten)
        ratios = 1 + step * np.arange(np.floor((2**low - 1) / step), np.ceil((2**high - 1) / step) + 1)
        return {"tickvals": np.log2(ratios), "ticktext": [f"{r:.6g}×" for r in ratios]}
    first, last = int(np.floor(low)), int(np.ceil(high))
    octaves = [o for o in range(first, last + 1) if last - first <= 10 or o % 2 == 0]
    return {"tickvals": octaves, "ticktext": [times(o) for o in octaves]}


def numbers(n: int, step: int | None = None) -> dict[str, Any]:
    """An axis of n experts: up to LABELLED every one has its number, upright or on its side, since the order need not tell it; above, every ``step``."""
    return {"dtick": 1 if n <= LABELLED else step, "autotickangles": [0, 90], "tickfont": {"size": 12 if n <= LABELLED // 2 else 9}}


def cells_over(figure: go.Figure, x: Any, y: Sequence[str], told: np.ndarray, hover: str, meta: Any) -> None:
    """Transparent markers over a heatmap's cells: they take hover and clicks, which Plotly's heatmaps do not pass on to Streamlit.

    Of more than MOST_MARKS one is drawn: the mouse finds the others by their places, not by their drawings.
    """
    unseen = {"marker": {"opacity": 0.001}}
    drawn = 1 if len(told) > MOST_MARKS else 0  # 0: all
    figure.add_scatter(x=x, y=y, mode="markers", showlegend=False, customdata=told, name=UNSEEN, meta=meta, hovertemplate=hover,
                       marker={"symbol": "square", "size": 20, "opacity": 0.001, "color": "#888", "maxdisplayed": drawn},
                       selected=unseen, unselected=unseen)  # fmt: skip


def crosses(z: np.ndarray, theme: str) -> dict[str, Any]:
    """Markers of cells of these colours [n] that chance alone could give."""
    ink = {"color": np.nan_to_num(z).astype(np.float32), "cmin": -OCTAVES, "cmax": OCTAVES, "colorscale": palette.ink(palette.LOAD[theme])}
    return {"symbol": "x-thin", "size": 5, "line": {"width": 1.25} | ink}
