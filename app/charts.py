"""Arrays to Plotly figures; the only place that knows Plotly. Text from data comes in already escaped by app/text.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from . import palette

CONFIG = {"displaylogo": False, "toImageButtonOptions": {"format": "svg", "scale": 2}, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
OCTAVES = 3
_ABOVE = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def load_map(relative: Sequence[np.ndarray], rows: Sequence[str], theme: str, mark: tuple[int, int] | None = None,
             by_load: bool = False) -> go.Figure:  # fmt: skip
    """Layers x experts, log2 of load over an even share, fixed at 1/8 to 8 times. Dead experts carry a cross.

    ``relative`` holds one array [E] per row; rows may differ in E. ``mark`` frames one (row, expert). ``by_load`` puts each
    row's busiest expert first, so that a column is a rank; the hover names the expert.
    """
    width = max(len(r) for r in relative)
    orders = [np.argsort(-r, kind="stable") if by_load else np.arange(len(r)) for r in relative]
    shown, experts = np.full((2, len(relative), width), np.nan, np.float32)
    for i, (row, order) in enumerate(zip(relative, orders, strict=True)):
        shown[i, : len(row)], experts[i, : len(row)] = row[order], order
    with np.errstate(divide="ignore"):
        z = np.clip(np.log2(shown), -OCTAVES, OCTAVES)
    figure = go.Figure(
        go.Heatmap(
            z=z, x=np.arange(width), y=list(rows), customdata=np.stack([shown, experts], -1).tolist(),
            colorscale=palette.scale(palette.LOAD[theme]), zmin=-OCTAVES, zmax=OCTAVES, xgap=1, ygap=1, hoverongaps=False,
            colorbar={"tickvals": list(range(-OCTAVES, OCTAVES + 1)), "ticktext": ["⅛×", "¼×", "½×", "1×", "2×", "4×", "8×"],
                      "title": {"text": "even share"}, "thickness": 12},
            hovertemplate="%{y}, expert %{customdata[1]:.0f}<br>%{customdata[0]:.2f} × its even share<extra></extra>",
        )
    )  # fmt: skip
    places = [(int(p), i) for i in range(len(relative)) for p in np.flatnonzero(shown[i] == 0)]
    if places:
        figure.add_scatter(x=[p for p, _ in places], y=[rows[i] for _, i in places], mode="markers", name="dead",
                           marker={"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": palette.DEAD}},
                           customdata=[float(experts[i, p]) for p, i in places],
                           hovertemplate="expert %{customdata:.0f}: no token at all<extra></extra>", showlegend=False)  # fmt: skip
    if mark is not None:
        line, at = mark[0], int(np.flatnonzero(orders[mark[0]] == mark[1])[0])
        figure.add_shape(type="rect", x0=at - 0.5, x1=at + 0.5, y0=line - 0.5, y1=line + 0.5, line={"width": 3, "color": palette.DEAD})
    figure.update_xaxes(title="rank in its layer, busiest first" if by_load else "expert", range=[-0.5, width - 0.5], constrain="domain",
                        dtick=1 if width <= 16 else max(1, width // 16))  # fmt: skip
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


def busiest_hues(experts: np.ndarray) -> np.ndarray:
    """The hue of each token's expert at one layer: experts [n], -1 = none -> float32 [n], 0 for the busiest of these tokens.

    Only the first len(palette.EXPERTS) get a hue of their own, as in the token strip; all others share the next number, and
    a token without an expert is NaN. Equal counts rank by expert id.
    """
    ids, counts = np.unique(experts[experts >= 0], return_counts=True)
    rank = np.full(int(experts.max(initial=-1)) + 2, np.nan, np.float32)  # the last entry serves -1
    rank[ids[np.lexsort((ids, -counts))]] = np.minimum(np.arange(len(ids)), len(palette.EXPERTS))
    return rank[experts]


def token_map(values: np.ndarray, tokens: Sequence[str], rows: Sequence[str], what: str, theme: str, discrete: bool) -> go.Figure:
    """Layers x tokens. ``discrete`` values are expert ids, coloured as ``busiest_hues`` says; else an amount."""
    x = [f"{i} {t}" for i, t in enumerate(tokens)]  # the number keeps repeated tokens apart
    colours, shown, top = palette.scale(palette.AMOUNT[theme]), values.astype(np.float32), None
    if discrete:
        hues = (*palette.EXPERTS, palette.OTHER)
        top = len(hues)
        shown = np.stack([busiest_hues(v) for v in values])
        colours = [(s, c) for i, c in enumerate(hues) for s in (i / top, (i + 1) / top)]
    figure = go.Figure(
        go.Heatmap(
            z=shown, x=x, y=list(rows), customdata=values.astype(np.float32), colorscale=colours, showscale=not discrete,
            zmin=0 if discrete else None, zmax=top, hoverongaps=False, colorbar={"thickness": 12, "title": {"text": what}},
            hovertemplate="%{y}, token %{x}<br>" + what + " %{customdata:" + (".0f" if discrete else ".3f") + "}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", showticklabels=len(x) <= 60, title="token, in order")
    figure.update_yaxes(autorange="reversed", type="category")
    return _sized(figure, max(240, 26 * len(rows) + 110))


def slot_bars(kept: np.ndarray, dropped: np.ndarray, idle: np.ndarray, slots: np.ndarray) -> go.Figure:
    """Per expert, busiest first: assignments processed, dropped above the capacity, and slots left idle below it; arrays [E]."""
    order = np.argsort(-(kept + dropped), kind="stable")
    x = [str(e) for e in order]
    figure = go.Figure()
    for name, values, look in (
        ("processed", kept, {"color": palette.AMOUNT["light"][3]}),
        ("idle slots", idle, {"color": "rgba(140,140,140,0.3)", "line": {"width": 1, "color": "rgba(140,140,140,0.7)"}}),
        ("dropped", dropped, {"color": palette.DEAD, "pattern": {"shape": "/", "size": 5, "solidity": 0.35}}),
    ):
        figure.add_bar(x=x, y=values[order], name=name, marker=look, hovertemplate=f"expert %{{x}}: %{{y:,}} {name}<extra></extra>")
    figure.add_scatter(x=x, y=slots[order], name="expert capacity", mode="lines", line={"shape": "hvh", "color": "#888", "dash": "dot"},
                       hovertemplate="%{y:,} slots<extra></extra>")  # fmt: skip
    figure.update_layout(barmode="stack", legend=_ABOVE)
    figure.update_xaxes(title="expert, busiest first", type="category")
    figure.update_yaxes(title="assignments", rangemode="tozero")
    return _sized(figure, 360)


def overflow_curves(factors: np.ndarray, dropped: np.ndarray, idle: np.ndarray, chance: np.ndarray, at: float) -> go.Figure:
    """Shares over capacity factors [F]: dropped and idle [sites, F] as median line and band over sites, dropped by chance [F]."""
    figure = go.Figure()
    for name, values, colour, fill in (("dropped", dropped, palette.DEAD, "rgba(213,94,0,0.18)"),
                                       ("idle slots", idle, "#7f8c9b", "rgba(127,140,155,0.2)")):  # fmt: skip
        if len(values) > 1:
            figure.add_scatter(x=factors, y=values.max(0), mode="lines", line={"width": 0}, hoverinfo="skip", showlegend=False)
            figure.add_scatter(x=factors, y=values.min(0), mode="lines", line={"width": 0}, fill="tonexty", fillcolor=fill,
                               hoverinfo="skip", showlegend=False)  # fmt: skip
        figure.add_scatter(x=factors, y=np.median(values, axis=0), name=name, mode="lines", line={"color": colour, "width": 2.5},
                           hovertemplate=f"CF %{{x:g}}: %{{y:.1%}} {name}<extra></extra>")  # fmt: skip
    figure.add_scatter(x=factors, y=chance, name="dropped by chance (uniform routing)", mode="lines",
                       line={"color": palette.DEAD, "dash": "dot", "width": 1.5},
                       hovertemplate="CF %{x:g}: %{y:.2%} by chance<extra></extra>")  # fmt: skip
    figure.add_vline(x=at, line={"color": "#888", "dash": "dash"})
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(title="capacity factor")
    figure.update_yaxes(title="share", tickformat=".0%", range=[0, 1])
    return _sized(figure, 360)


def share_bars(names: Sequence[str], shares: np.ndarray, counts: np.ndarray, mean: float, what: str) -> go.Figure:
    """Bars of dropped shares [n] by group with the share over all as a line; ``counts`` [n] assignments stand in the hover."""
    figure = go.Figure(go.Bar(x=list(names), y=shares, customdata=counts, marker_color=palette.DEAD,
                              hovertemplate="%{x}: %{y:.1%} of %{customdata:,} assignments dropped<extra></extra>"))  # fmt: skip
    figure.add_hline(y=mean, line={"color": "#888", "dash": "dot"}, annotation_text="all", annotation_font_color="#888")
    figure.update_xaxes(title=what, type="category")
    figure.update_yaxes(title="dropped share", tickformat=".0%", rangemode="tozero")
    return _sized(figure, 300)


def _sized(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": 16, "b": 8}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)"
    )
    return figure
