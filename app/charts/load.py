"""Figures of load and balance: over experts, layers, batches, documents and stretches of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app import palette

from .drawing import ABOVE, AGAIN, MOST_MARKS, OCTAVES, OVER, cells_over, numbers, sized, times_bar

CLICKABLE = 15_000  # cells of a map; more markers over them would hold up the browser
DOTS = 2_000  # documents of a scatter; more are counted by cell, as dots would hide each other


def load_map(relative: Sequence[np.ndarray], rows: Sequence[str], theme: str, mark: tuple[int, int] | None = None,
             by_load: bool = False, clickable: bool = False) -> go.Figure:  # fmt: skip
    """Layers x experts, log2 of load over an even share, fixed at 1/8 to 8 times. Dead experts carry a cross.

    ``relative`` holds one array [E] per row; rows may differ in E. ``mark`` frames one (row, expert). ``by_load`` puts each
    row's busiest expert first, so that a column is a rank; the hover names the expert. ``clickable`` lets a click through, with
    the expert as customdata[0] and the row's name as y.
    """
    width = max(len(r) for r in relative)
    orders = [np.argsort(-r, kind="stable") if by_load else np.arange(len(r)) for r in relative]
    shown, experts = np.full((2, len(relative), width), np.nan)
    for i, (row, order) in enumerate(zip(relative, orders, strict=True)):
        shown[i, : len(row)], experts[i, : len(row)] = row[order], order
    with np.errstate(divide="ignore"):
        z = np.clip(np.log2(shown), -OCTAVES, OCTAVES).astype(np.float32)
    figure = go.Figure(
        go.Heatmap(
            z=z, x=np.arange(width), y=list(rows), customdata=np.stack([shown, experts], -1).tolist(),
            meta={"x": "place" if by_load else None, "y": "layer", "z": None, "customdata": ["relative_load", "expert"]},
            colorscale=palette.scale(palette.LOAD[theme]), zmin=-OCTAVES, zmax=OCTAVES, xgap=1, ygap=1, hoverongaps=False,
            hovertemplate="%{y}, expert %{customdata[1]:.0f}<br>%{customdata[0]:.2f} × its even share<extra></extra>",
        )
    )  # fmt: skip
    times_bar(figure, "× even share")
    places = [(int(p), i) for i in range(len(relative)) for p in np.flatnonzero(shown[i] == 0)]
    if places:
        figure.add_scatter(x=[p for p, _ in places], y=[rows[i] for _, i in places], mode="markers", name="dead", meta=AGAIN,
                           marker={"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": palette.DEAD}},
                           customdata=[float(experts[i, p]) for p, i in places],
                           hovertemplate="expert %{customdata:.0f}: no token at all<extra></extra>", showlegend=False)  # fmt: skip
    if clickable and shown.size <= CLICKABLE:
        there, place = np.nonzero(np.isfinite(shown))
        figure.data[0].hoverinfo, figure.data[0].hovertemplate = "skip", None
        cells_over(figure, place, [rows[int(i)] for i in there], np.stack([experts[there, place], shown[there, place]], -1),
                    "%{y}, expert %{customdata[0]:.0f}<br>%{customdata[1]:.2f} × its even share<extra></extra>", AGAIN)  # fmt: skip
    if mark is not None:
        line, at = mark[0], int(np.flatnonzero(orders[mark[0]] == mark[1])[0])
        figure.add_shape(type="rect", x0=at - 0.5, x1=at + 0.5, y0=line - 0.5, y1=line + 0.5, line={"width": 3, "color": palette.DEAD})
    figure.update_xaxes(title="rank in its layer, busiest first" if by_load else "expert", range=[-0.5, width - 0.5], constrain="domain",
                        **numbers(width, max(1, width // 16)))  # fmt: skip
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], type="category")
    return sized(figure, max(260, 26 * len(rows) + 130), OVER)


def sorted_load(relative: np.ndarray, theme: str) -> go.Figure:
    """Bars of one layer's loads relative to an even share, largest first, with the even line."""
    order = np.argsort(-relative, kind="stable")
    figure = go.Figure(
        go.Bar(x=[str(e) for e in order], y=relative[order], marker_color=palette.AMOUNT["light"][3],
               meta={"x": "expert", "y": "relative_load"}, hovertemplate="expert %{x}: %{y:.2f} × its even share<extra></extra>")
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": "#888", "dash": "dot"}, annotation_text="even share", annotation_font_color="#888")
    figure.update_xaxes(title="expert, busiest first", type="category", **numbers(len(order)))
    figure.update_yaxes(title="× even share", rangemode="tozero")
    return sized(figure, 300)


def maxvio_lines(
    rows: Sequence[str], run: np.ndarray, batch: np.ndarray, least: np.ndarray, most: np.ndarray, chance: np.ndarray
) -> go.Figure:
    """MaxVio per layer, arrays [L]: over the run, mean of the batches with their range as a bar, and by chance at that batch size."""
    blue = palette.AMOUNT["light"][3]
    return _over_layers(rows, "MaxVio", "maxvio", (least, most), (("mean of the batches", batch, palette.DEAD, "circle"),
                        ("over the whole run", run, blue, "square"), ("by chance in a batch", chance, "#9a9a9a", "line-ew-open")))  # fmt: skip


def queue_lines(
    rows: Sequence[str], queue: np.ndarray, least: np.ndarray, most: np.ndarray, experts: np.ndarray, chance: np.ndarray
) -> go.Figure:
    """Longest device queue over the mean per layer, arrays [L]: median of the batches with their range, of single experts, by chance."""
    blue = palette.AMOUNT["light"][3]
    return _over_layers(rows, "× mean load", "max_over_mean", (least, most), (("device, median of the batches", queue, palette.DEAD, "circle"),
                        ("single expert, median", experts, blue, "square"), ("device, by chance at most", chance, "#9a9a9a", "line-ew-open")))  # fmt: skip


def _over_layers(rows: Sequence[str], title: str, measure: str, around: tuple[np.ndarray, np.ndarray],
                 lines: Sequence[tuple[str, np.ndarray, str, str]]) -> go.Figure:  # fmt: skip
    """(name, values [L], colour, symbol) per line over layers; ``around`` is the range of the first, a name with "chance" is dotted."""
    figure, (least, most) = go.Figure(), around
    for i, (name, y, colour, symbol) in enumerate(lines):
        spread = {"type": "data", "symmetric": False, "array": most - y, "arrayminus": y - least, "thickness": 1} if i == 0 else None
        figure.add_scatter(x=list(rows), y=y, name=name, mode="markers+lines", error_y=spread, meta={"x": "layer", "y": measure},
                           line={"color": colour, "dash": "dot" if "chance" in name else "solid", "width": 1.5},
                           marker={"color": colour, "symbol": symbol, "size": 9}, hovertemplate=f"%{{x}}: %{{y:.3f}} {title}, {name}<extra></extra>")  # fmt: skip
    figure.update_layout(legend=ABOVE)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=title, rangemode="tozero")
    return sized(figure, 320)


def batch_line(batch: np.ndarray, maxvio: np.ndarray, n: np.ndarray, chance: np.ndarray, run: float) -> go.Figure:
    """MaxVio over batch number, arrays [batches], beside what chance gives in each and the value over the whole run."""
    figure = go.Figure()
    mode = "markers+lines" if len(batch) <= 100 else "markers" if len(batch) <= MOST_MARKS else "lines"
    figure.add_trace(go.Scatter(x=batch, y=maxvio, customdata=n[:, None], mode=mode, name="a batch",
                          meta={"x": "batch", "y": "maxvio", "customdata": ["tokens"]}, marker={"size": 7, "color": palette.DEAD},
                          line={"width": 1, "color": palette.DEAD},
                          hovertemplate="batch %{x}: MaxVio %{y:.3f}, n = %{customdata[0]:,} tokens<extra></extra>"))  # fmt: skip
    figure.add_trace(go.Scatter(x=batch, y=chance, mode="lines", name="by chance, at most about", line={"color": "#9a9a9a", "dash": "dot", "width": 2},
                          meta={"x": "batch", "y": "maxvio"}, hovertemplate="batch %{x}: by chance at most about %{y:.3f}<extra></extra>"))  # fmt: skip
    figure.add_hline(
        y=run, line={"color": palette.AMOUNT["light"][3], "width": 1.5}, annotation_text="whole run", annotation_font_color="#888"
    )
    figure.update_layout(legend=ABOVE)
    figure.update_xaxes(title="batch, in the order filled", tickformat=",d")
    figure.update_yaxes(title="MaxVio", rangemode="tozero")
    return sized(figure, 280)


def document_scatter(names: Sequence[str], ratio: np.ndarray, n: np.ndarray, chance: np.ndarray) -> go.Figure:
    """Max / mean over tokens, a dot per document [n]; the line is what chance stays below for so many tokens. customdata[0] is the place."""
    order = np.argsort(n, kind="stable")
    figure = go.Figure(go.Scatter(x=n, y=ratio, text=list(names), customdata=np.arange(len(n))[:, None], mode="markers", name="a document",
                                  meta={"x": "tokens", "y": "max_over_mean", "text": "document", "customdata": ["place"]},
                                  marker={"size": 8, "color": palette.AMOUNT["light"][3], "opacity": 0.75},
                                  hovertemplate="%{text}<br>%{y:.2f} × the mean load, n = %{x:,} tokens<extra></extra>"))  # fmt: skip
    figure.add_scatter(x=n[order], y=chance[order], mode="lines", name="by chance, at most about", line={"color": "#9a9a9a", "dash": "dot", "width": 2},
                       meta={"x": "tokens", "y": "max_over_mean"}, hovertemplate="by chance at most about %{y:.2f} for %{x:,} tokens<extra></extra>")  # fmt: skip
    figure.update_layout(legend=ABOVE)
    figure.update_xaxes(title="tokens of the document", type="log", tickformat=",")
    figure.update_yaxes(title="max / mean load", rangemode="tozero")
    return sized(figure, 340)


def document_map(ratio: np.ndarray, n: np.ndarray, chance: np.ndarray, theme: str) -> go.Figure:
    """How many documents [n] lie in each cell of length and max / mean, every one of them counted; the line is what chance stays below."""
    across, up = np.geomspace(n.min(), n.max() + 1, 41), np.linspace(ratio.min(), np.nextafter(ratio.max(), np.inf), 31)
    count = np.histogram2d(ratio, n, (up, across))[0]
    row, column = np.indices(count.shape)
    figure = go.Figure(go.Heatmap(z=np.where(count > 0, count, np.nan), x=across, y=up, colorscale=palette.scale(palette.AMOUNT[theme][1:]), hoverongaps=False,
                                  customdata=np.stack([np.ceil(across[column]), np.ceil(across[column + 1]) - 1, up[row + 1]], -1),
                                  meta={"x": "tokens_from", "y": "max_over_mean_from", "z": "documents", "customdata": ["first", "last", "max_over_mean_to"]},
                                  colorbar={"title": "documents", "thickness": 10}, name="documents",
                                  hovertemplate="%{z:,} documents of %{customdata[0]:,.0f} to %{customdata[1]:,.0f} tokens, up to %{customdata[2]:.2f} × the mean load"
                                  "<extra></extra>"))  # fmt: skip
    lengths, first = np.unique(n, return_index=True)
    figure.add_scatter(x=lengths, y=chance[first], mode="lines", name="by chance, at most about", line={"color": "#9a9a9a", "dash": "dot", "width": 2},
                       meta={"x": "tokens", "y": "max_over_mean"}, hovertemplate="by chance at most about %{y:.2f} for %{x:,} tokens<extra></extra>")  # fmt: skip
    figure.update_layout(legend=ABOVE, showlegend=True)
    figure.update_xaxes(title="tokens of the document", type="log", tickformat=",")
    figure.update_yaxes(title="max / mean load", rangemode="tozero")
    return sized(figure, 340)


def document_histogram(ratio: np.ndarray, tokens: int, chance: float) -> go.Figure:
    """Documents of one length by their max / mean [documents], with a mark at what chance stays below for so many tokens."""
    count, edges = np.histogram(ratio, bins=min(40, max(8, int(len(ratio) ** 0.5))))
    middle, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
    figure = go.Figure(go.Bar(x=middle, y=count, width=width, marker={"color": palette.AMOUNT["light"][3], "line": {"width": 0.5, "color": "#888"}},
                              customdata=np.stack([edges[:-1], edges[1:]], -1), meta={"x": "max_over_mean", "y": "documents", "customdata": ["from", "to"]},
                              hovertemplate="%{customdata[0]:.2f} to %{customdata[1]:.2f} × the mean load: %{y:,} documents<extra></extra>"))  # fmt: skip
    figure.add_vline(
        x=chance,
        line={"color": "#9a9a9a", "dash": "dot", "width": 2},
        annotation_text="by chance, at most about",
        annotation_font_color="#888",
    )
    figure.update_xaxes(title=f"max / mean load of a document of {tokens:,} tokens", range=[0, max(float(edges[-1]), chance) * 1.05])
    figure.update_yaxes(title="documents", rangemode="tozero")
    return sized(figure, 300)


def layer_lines(rows: Sequence[str], lines: Sequence[tuple[str, np.ndarray, np.ndarray | None]], what: str) -> go.Figure:
    """Shares per layer: (name, values [L], interval [2, L] of low and high or None) per line; one whose name holds "chance" is grey, up to two of them."""
    figure, dashes = go.Figure(), iter(("dot", "dash"))
    colours = iter((palette.AMOUNT["light"][3], palette.DEAD, palette.EXPERTS[0]))
    for name, y, around in lines:
        chance = "chance" in name
        colour, dash = ("#9a9a9a", next(dashes)) if chance else (next(colours), "solid")
        bars = (
            None
            if around is None
            else {"type": "data", "symmetric": False, "array": around[1] - y, "arrayminus": y - around[0], "thickness": 1}
        )
        figure.add_scatter(x=list(rows), y=y, name=name, mode="markers+lines", error_y=bars, marker={"size": 8, "color": colour}, meta={"x": "layer", "y": "share"},
                           line={"color": colour, "dash": dash, "width": 1.5},
                           hovertemplate="%{x}: %{y:.1%} " + name + "<extra></extra>")  # fmt: skip
    figure.update_layout(legend=ABOVE)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=what, tickformat="~%", rangemode="tozero")
    return sized(figure, 320)


def piece_bars(
    names: Sequence[str], ratio: np.ndarray, n: np.ndarray, chance: np.ndarray, whole: float, few: Sequence[bool], what: str
) -> go.Figure:
    """Max / mean of pieces of a run [n], a dark mark at what chance gives for so many tokens, a line at the whole run's; ``few`` fades."""
    figure = go.Figure(go.Bar(x=list(names), y=ratio, name="max / mean", customdata=n,
                              marker={"color": palette.AMOUNT["light"][2], "opacity": [0.35 if x else 1.0 for x in few]},
                              meta=(named := {"x": "piece", "y": "max_over_mean", "customdata": ["n"]}),
                              hovertemplate="%{x}: %{y:.2f} × the mean load, n = %{customdata:,} tokens<extra></extra>"))  # fmt: skip
    figure.add_scatter(x=list(names), y=chance, name="by chance, at most about", mode="markers", meta=named,
                       hovertemplate="%{x}: at most about %{y:.2f} by chance<extra></extra>",
                       marker={"symbol": "line-ew-open", "size": 14, "color": "#666", "line": {"width": 3, "color": "#666"}})  # fmt: skip
    figure.add_scatter(x=list(names), y=[whole] * len(names), name="the whole run", mode="lines", meta=named, line={"color": palette.DEAD, "dash": "dot"},
                       hovertemplate="whole run: %{y:.2f}<extra></extra>")  # fmt: skip
    figure.update_layout(legend=ABOVE)
    figure.update_xaxes(title=what, type="category", categoryorder="array", categoryarray=list(names))
    figure.update_yaxes(title="max / mean load", rangemode="tozero")
    return sized(figure, 320)
