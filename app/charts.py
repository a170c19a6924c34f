"""Arrays to Plotly figures; the only place that knows Plotly. Text from data comes in already escaped by app/text.py."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from plotly.offline import get_plotlyjs

from analysis.cards import GroupUse
from analysis.specialization import Preferences

from . import palette

AGAIN = "again"  # a trace's meta: it shows what another one tells, so it has no rows of its own
UNSEEN = "unseen"  # a trace's name: it is there for the mouse, and is not printed
BAR: Mapping[str, Any] = MappingProxyType({"displaylogo": False, "modeBarButtonsToRemove": ["toImage", "select2d", "lasso2d"]})
OCTAVES = 3
CLICKABLE = 15_000  # cells of a map; more markers over them would hold up the browser
NUMBERED = 80  # tokens of a map whose cells hold their expert's number; text over more holds up the browser
LEAST_USES = 20  # tokens an expert must have for its row of effects to be coloured
OVER = 78  # pixels above a map for its colour bar
LABELLED = 32  # experts on an axis that each keep their number, however narrow; above, Plotly thins the numbers
_WHOLE = frozenset({"expert", "other", "place", "tokens", "group_tokens", "documents", "count", "n", "assignments"})  # columns of integers
_ABOVE = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def file_name(run: str, what: str) -> str:
    """``<run>-<what>`` without anything a file system or a shell could take for more than a letter."""
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part) for part in (run, what))


def plotly_script() -> str:
    """The source of plotly.js as it comes with the installed Plotly, about 4.8 MB."""
    return str(get_plotlyjs())


def portable(figure: go.Figure) -> dict[str, Any]:
    """A figure as plain values for a page outside the app, which brings its own fonts and colours of axes."""
    figure.layout.template = None
    return {**json.loads(figure.to_json()), "config": dict(BAR)}


def printed(figure: go.Figure) -> str:
    """A figure as JSON for paper: colours of the light theme whatever it was drawn for, nothing that only the mouse sees."""
    paper = go.Figure(data=[t for t in figure.data if t.name != UNSEEN], layout=figure.layout)
    light = {tuple(palette.scale(by["dark"])): palette.scale(by["light"]) for by in (palette.LOAD, palette.AMOUNT)}
    light[tuple(palette.ink(palette.LOAD["dark"]))] = palette.ink(palette.LOAD["light"])
    for trace in paper.data:
        coloured: Any = trace if trace.type == "heatmap" else trace.marker.line if trace.type == "scatter" else None
        if coloured is not None and coloured.colorscale:
            coloured.colorscale = light.get(tuple(map(tuple, coloured.colorscale)), coloured.colorscale)
    paper.layout.template = None
    return str(paper.to_json())


def rows(figure: go.Figure) -> pa.Table:
    """What a figure shows, one row per mark. A trace's ``meta`` names the columns of its x, y, z, text and customdata; None is left out.

    Text is what stands on the axes, where long names end in an ellipsis; bounds of a whisker are columns ``low`` and ``high``;
    ``series`` is the trace's name, where there are several. Not a number is missing.
    """
    told = [t for t in figure.data if t.meta != AGAIN]
    tables = []
    for trace in told:
        if trace.x is not None and not len(trace.x):
            continue
        table = pa.table({k: _cells(v, k) for k, v in _columns(trace).items() if k is not None})
        series = pa.array([html.unescape(trace.name or "")] * len(table), pa.string())
        tables.append(table.add_column(0, "series", series) if len(told) > 1 else table)
    return pa.concat_tables(tables, promote_options="permissive")


def _columns(trace: Any) -> dict[str | None, np.ndarray]:
    """The columns of one trace, each of one length."""
    meta, found, custom = trace.meta or {}, {}, None if trace.customdata is None else np.asarray(trace.customdata)
    if trace.type == "heatmap":
        z = np.asarray(trace.z)
        y, x = np.indices(z.shape).reshape(2, -1)
        place = {n: at if getattr(trace, n) is None else np.asarray(getattr(trace, n))[at] for n, at in (("y", y), ("x", x))}
        found = {meta.get(n, n): v for n, v in place.items()} | {meta.get("z", "z"): z.ravel()}
        custom = None if custom is None else custom.reshape(z.size, *custom.shape[2:])
    else:
        found = {meta.get(n, n): np.asarray(getattr(trace, n)) for n in ("x", "y", *(["text"] if "text" in meta else []))}
        for n in ("x", "y"):
            if (bar := trace[f"error_{n}"]).array is not None:
                value = np.asarray(trace[n], float)
                found |= {"low": value - np.asarray(bar.arrayminus), "high": value + np.asarray(bar.array)}
    if custom is not None:
        custom = custom[:, None] if custom.ndim == 1 else custom
        names = meta.get("customdata") or [f"custom_{i}" for i in range(custom.shape[1])]
        found |= {n: custom[:, i] for i, n in enumerate(names)}
    return found


def _cells(values: np.ndarray, name: str) -> pa.Array:
    """A column: numbers as they were computed, ids and counts as integers, ``significant`` as what it is; text as it stands on the axis."""
    if values.dtype.kind not in "iufb":
        told = [html.unescape(str(v)) for v in values]
        whole = name in _WHOLE and all(t.isdecimal() for t in told)
        return pa.array([int(t) for t in told], pa.int64()) if whole else pa.array(told, pa.string())
    column = pa.array(values, from_pandas=True)
    return column.cast(pa.int64() if name in _WHOLE else pa.bool_() if name == "significant" else column.type)


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
    _times_bar(figure, "× even share")
    places = [(int(p), i) for i in range(len(relative)) for p in np.flatnonzero(shown[i] == 0)]
    if places:
        figure.add_scatter(x=[p for p, _ in places], y=[rows[i] for _, i in places], mode="markers", name="dead", meta=AGAIN,
                           marker={"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": palette.DEAD}},
                           customdata=[float(experts[i, p]) for p, i in places],
                           hovertemplate="expert %{customdata:.0f}: no token at all<extra></extra>", showlegend=False)  # fmt: skip
    if clickable and shown.size <= CLICKABLE:
        there, place = np.nonzero(np.isfinite(shown))
        figure.data[0].hoverinfo, figure.data[0].hovertemplate = "skip", None
        _cells_over(figure, place, [rows[int(i)] for i in there], np.stack([experts[there, place], shown[there, place]], -1),
                    "%{y}, expert %{customdata[0]:.0f}<br>%{customdata[1]:.2f} × its even share<extra></extra>", AGAIN)  # fmt: skip
    if mark is not None:
        line, at = mark[0], int(np.flatnonzero(orders[mark[0]] == mark[1])[0])
        figure.add_shape(type="rect", x0=at - 0.5, x1=at + 0.5, y0=line - 0.5, y1=line + 0.5, line={"width": 3, "color": palette.DEAD})
    figure.update_xaxes(title="rank in its layer, busiest first" if by_load else "expert", range=[-0.5, width - 0.5], constrain="domain",
                        **_numbers(width, max(1, width // 16)))  # fmt: skip
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], type="category")
    return _sized(figure, max(260, 26 * len(rows) + 130), OVER)


def sorted_load(relative: np.ndarray, theme: str) -> go.Figure:
    """Bars of one layer's loads relative to an even share, largest first, with the even line."""
    order = np.argsort(-relative, kind="stable")
    figure = go.Figure(
        go.Bar(x=[str(e) for e in order], y=relative[order], marker_color=palette.AMOUNT["light"][3],
               meta={"x": "expert", "y": "relative_load"}, hovertemplate="expert %{x}: %{y:.2f} × its even share<extra></extra>")
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": "#888", "dash": "dot"}, annotation_text="even share", annotation_font_color="#888")
    figure.update_xaxes(title="expert, busiest first", type="category", **_numbers(len(order)))
    figure.update_yaxes(title="× even share", rangemode="tozero")
    return _sized(figure, 300)


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
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=title, rangemode="tozero")
    return _sized(figure, 320)


def batch_line(batch: np.ndarray, maxvio: np.ndarray, n: np.ndarray, chance: np.ndarray, run: float) -> go.Figure:
    """MaxVio over batch number, arrays [batches], beside what chance gives in each and the value over the whole run."""
    figure, draw = go.Figure(), go.Scatter if len(batch) <= 1_024 else go.Scattergl  # SVG takes a second from some thousand markers on
    figure.add_trace(draw(x=batch, y=maxvio, customdata=n[:, None], mode="markers+lines" if len(batch) <= 100 else "markers", name="a batch",
                          meta={"x": "batch", "y": "maxvio", "customdata": ["tokens"]}, marker={"size": 7, "color": palette.DEAD}, line={"width": 1},
                          hovertemplate="batch %{x}: MaxVio %{y:.3f}, n = %{customdata[0]:,} tokens<extra></extra>"))  # fmt: skip
    figure.add_trace(draw(x=batch, y=chance, mode="lines", name="by chance, at most about", line={"color": "#9a9a9a", "dash": "dot", "width": 2},
                          meta={"x": "batch", "y": "maxvio"}, hovertemplate="batch %{x}: by chance at most about %{y:.3f}<extra></extra>"))  # fmt: skip
    figure.add_hline(
        y=run, line={"color": palette.AMOUNT["light"][3], "width": 1.5}, annotation_text="whole run", annotation_font_color="#888"
    )
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(title="batch, in the order filled", tickformat=",d")
    figure.update_yaxes(title="MaxVio", rangemode="tozero")
    return _sized(figure, 280)


def document_scatter(names: Sequence[str], ratio: np.ndarray, n: np.ndarray, chance: np.ndarray) -> go.Figure:
    """Max / mean over tokens, a dot per document [n]; the line is what chance stays below for so many tokens. customdata[0] is the place."""
    order = np.argsort(n, kind="stable")
    figure = go.Figure(go.Scatter(x=n, y=ratio, text=list(names), customdata=np.arange(len(n))[:, None], mode="markers", name="a document",
                                  meta={"x": "tokens", "y": "max_over_mean", "text": "document", "customdata": ["place"]},
                                  marker={"size": 8, "color": palette.AMOUNT["light"][3], "opacity": 0.75},
                                  hovertemplate="%{text}<br>%{y:.2f} × the mean load, n = %{x:,} tokens<extra></extra>"))  # fmt: skip
    figure.add_scatter(x=n[order], y=chance[order], mode="lines", name="by chance, at most about", line={"color": "#9a9a9a", "dash": "dot", "width": 2},
                       meta={"x": "tokens", "y": "max_over_mean"}, hovertemplate="by chance at most about %{y:.2f} for %{x:,} tokens<extra></extra>")  # fmt: skip
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(title="tokens of the document", type="log", tickformat=",")
    figure.update_yaxes(title="max / mean load", rangemode="tozero")
    return _sized(figure, 340)


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
    return _sized(figure, 300)


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
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=what, tickformat=".0%", rangemode="tozero")
    return _sized(figure, 320)


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
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(title=what, type="category", categoryorder="array", categoryarray=list(names))
    figure.update_yaxes(title="max / mean load", rangemode="tozero")
    return _sized(figure, 320)


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
        figure.add_bar(
            x=x,
            y=values[order],
            name=name,
            marker=look,
            meta={"x": "expert", "y": "assignments"},
            hovertemplate=f"expert %{{x}}: %{{y:,}} {name}<extra></extra>",
        )
    figure.add_scatter(x=x, y=slots[order], name="expert capacity", mode="lines", meta={"x": "expert", "y": "assignments"}, line={"shape": "hvh", "color": "#888", "dash": "dot"},
                       hovertemplate="%{y:,} slots<extra></extra>")  # fmt: skip
    return _sized(figure, 360, barmode="stack", legend=_ABOVE, yaxis={"title": "assignments", "rangemode": "tozero"},
                  xaxis={"title": "expert, busiest first", "type": "category", **_numbers(len(order))})  # fmt: skip


def slot_grid(tokens: Sequence[str], experts: np.ndarray, ranks: np.ndarray, capacity: int, n_experts: int) -> go.Figure:
    """A few tokens in the slots of their experts: experts [n], ranks [n] (place in the expert's queue), one batch.

    A filled square is a processed token, an outlined one an idle slot, a crossed one right of the line a dropped token.
    """
    kept, loads = ranks < capacity, np.bincount(experts, minlength=n_experts)
    idle = [(slot, e) for e in range(n_experts) for slot in range(min(loads[e], capacity), capacity)]
    groups = (
        ("processed", ranks[kept], experts[kept], [t for t, k in zip(tokens, kept, strict=True) if k], "square", palette.AMOUNT["light"][3]),
        ("dropped", ranks[~kept], experts[~kept], [t for t, k in zip(tokens, kept, strict=True) if not k], "x-thin-open", palette.DEAD),
        ("idle slot", np.array([s for s, _ in idle]), np.array([e for _, e in idle]), [""] * len(idle), "square-open", "#8c8c8c"),
    )  # fmt: skip
    figure = go.Figure()
    for name, x, y, words, symbol, colour in groups:
        figure.add_scatter(x=x + 1, y=[f"expert {e}" for e in y], text=words, name=name, mode="markers+text", hoverinfo="skip",
                           meta={"x": "slot", "y": "expert", "customdata": ["token"]}, customdata=list(words),
                           textposition="middle center" if name == "processed" else "bottom center",
                           textfont={"color": "white"} if name == "processed" else None,
                           marker={"symbol": symbol, "size": 44 if name != "dropped" else 26, "color": colour, "line": {"width": 3, "color": colour}})  # fmt: skip
    figure.add_vline(
        x=capacity + 0.5, line={"color": "#888", "dash": "dash"}, annotation_text="expert capacity", annotation_font_color="#888"
    )
    figure.update_layout(legend=_ABOVE)
    figure.update_xaxes(title="slot", dtick=1, range=[0.4, max(capacity, int(loads.max())) + 0.9], showgrid=False)
    figure.update_yaxes(categoryorder="array", categoryarray=[f"expert {e}" for e in reversed(range(n_experts))], showgrid=False,
                        range=[-0.6, n_experts - 0.4])  # fmt: skip
    return _sized(figure, 300)


def overflow_curves(
    factors: np.ndarray, dropped: np.ndarray, idle: np.ndarray, pooled: np.ndarray, at: float, one: str = "layer"
) -> go.Figure:
    """Shares over capacity factors [F]. Lines: pooled [3, F], dropped, idle and dropped by chance; bands: the range of dropped and idle
    [n, F] over ``one`` each (layer, shuffle)."""
    figure, named = go.Figure(), {"x": "capacity_factor", "y": "share"}
    for name, values, line, colour, fill in (("dropped", dropped, pooled[0], palette.DEAD, "rgba(213,94,0,0.18)"),
                                             ("idle slots", idle, pooled[1], "#7f8c9b", "rgba(127,140,155,0.2)")):  # fmt: skip
        if len(values) > 1:
            edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "meta": named}
            figure.add_scatter(x=factors, y=values.max(0), name=f"{name}, most of any {one}", **edge)
            figure.add_scatter(x=factors, y=values.min(0), name=f"{name}, least of any {one}", fill="tonexty", fillcolor=fill, **edge)
        figure.add_scatter(x=factors, y=line, name=name, mode="lines", line={"color": colour, "width": 2.5}, meta=named,
                           hovertemplate=f"CF %{{x:g}}: %{{y:.1%}} {name}<extra></extra>")  # fmt: skip
    figure.add_scatter(x=factors, y=pooled[2], name="dropped by chance (uniform routing)", mode="lines", meta=named,
                       line={"color": palette.DEAD, "dash": "dot", "width": 1.5},
                       hovertemplate="CF %{x:g}: %{y:.2%} by chance<extra></extra>")  # fmt: skip
    # What add_vline draws, in a tenth of its time: this figure is drawn anew at every step of a slider; so is the next, with add_hline's.
    line = {
        "type": "line",
        "x0": at,
        "x1": at,
        "xref": "x",
        "y0": 0,
        "y1": 1,
        "yref": "y domain",
        "line": {"color": "#888", "dash": "dash"},
    }
    return _sized(figure, 360, legend=_ABOVE, shapes=[line], xaxis={"title": "capacity factor"},
                  yaxis={"title": "share", "tickformat": ".0%", "range": [0, 1]})  # fmt: skip


def share_bars(
    names: Sequence[str], shares: np.ndarray, counts: np.ndarray, mean: float, what: str, unit: str = "assignments"
) -> go.Figure:
    """Bars of lost shares [n] by group with the share over all as a line; ``counts`` [n] of what is lost, ``unit``, stand in the hover."""
    told = np.stack([counts, np.full(len(counts), mean)], -1)
    figure = go.Figure(go.Bar(x=list(names), y=shares, customdata=told, marker_color=palette.DEAD, showlegend=False,
                              meta={"x": "group", "y": "dropped_share", "customdata": [unit.replace(" ", "_"), "dropped_share_of_the_layer"]},
                              hovertemplate=f"%{{x}}: %{{y:.1%}} of %{{customdata[0]:,.0f}} {unit} lost<extra></extra>"))  # fmt: skip
    line = {"type": "line", "x0": 0, "x1": 1, "xref": "x domain", "y0": mean, "y1": mean, "yref": "y", "line": {"color": "#888", "dash": "dot"},
            "name": "whole layer", "showlegend": True}  # fmt: skip  # a word at the line would lie on a bar
    return _sized(figure, 300, legend=_ABOVE, showlegend=True, shapes=[line], xaxis={"title": what, "type": "category"},
                  yaxis={"title": f"share of {unit} lost", "tickformat": ".0%", "rangemode": "tozero"})  # fmt: skip


def enrichment_map(found: Preferences, names: Sequence[str], groups: np.ndarray, experts: np.ndarray, theme: str) -> go.Figure:
    """Groups x experts in the orders given: log2 enrichment, drawn within +-3; cells that are not significant carry a small cross,
    where any could be.

    Transparent markers over the cells take hover and clicks, which Plotly heatmaps do not pass on; customdata[0] is the expert.
    """
    cell = np.ix_(groups, experts)
    z = np.clip(found.enrichment[cell], -OCTAVES, OCTAVES)
    z[:, found.count.sum(0)[experts] < LEAST_USES] = np.nan  # too rarely used for a colour to mean anything
    x = [str(e) for e in experts]
    figure = go.Figure(
        go.Heatmap(z=z.astype(np.float32), x=x, y=list(names), colorscale=palette.scale(palette.LOAD[theme]), zmin=-OCTAVES, zmax=OCTAVES,
                   xgap=1, ygap=1, hoverinfo="skip", meta=AGAIN)
    )  # fmt: skip
    _times_bar(figure, "times as often as elsewhere")
    row, column = (a.ravel() for a in np.indices(z.shape))
    weak = ~found.significant[cell].ravel() & (not found.missing)
    figure.add_scatter(x=[x[c] for c in column[weak]], y=[names[r] for r in row[weak]], mode="markers", hoverinfo="skip", showlegend=False, meta=AGAIN,
                       marker=_crosses(z.ravel()[weak], theme))  # fmt: skip
    told = np.stack([np.broadcast_to(experts, z.shape), *(getattr(found, n)[cell] for n in ("share", "elsewhere", "lift", "low", "high", "q")),
                     *(np.broadcast_to(n[groups][:, None], z.shape) for n in (found.tokens, found.documents)),
                     *(getattr(found, n)[cell] for n in ("count", "enrichment", "p", "significant", "within"))], -1).reshape(z.size, -1)  # fmt: skip
    effect = "%{customdata[4]:.1f} to %{customdata[5]:.1f}"
    if np.isfinite(found.within).any():
        effect = f"%{{customdata[10]:.1f}} over all tokens (95%: {effect}), %{{customdata[13]:.1f}} within documents"
    _cells_over(
        figure, [x[c] for c in column], [names[r] for r in row], told,
        "%{y}, expert %{customdata[0]:.0f}<br>used for %{customdata[1]:.1%} of its %{customdata[7]:,} tokens, %{customdata[2]:.1%}"
        " elsewhere<br>lift %{customdata[3]:.2f}, log2 enrichment " + effect + ", q = %{customdata[6]:.2g}<extra></extra>",
        {"x": None, "y": "group", "customdata": ["expert", "share", "elsewhere", "lift", "log2_enrichment_low", "log2_enrichment_high", "q",
                                                 "group_tokens", "documents", "count", "log2_enrichment", "p", "significant", "log2_enrichment_within"]},
    )  # fmt: skip
    figure.update_xaxes(
        title="expert",
        type="category",
        categoryorder="array",
        categoryarray=x,
        range=[-0.5, len(x) - 0.5],
        constrain="domain",
        **_numbers(len(x)),
    )
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], type="category", categoryorder="array", categoryarray=list(names))
    return _sized(figure, max(280, 28 * len(names) + 130), OVER)


def _crosses(z: np.ndarray, theme: str) -> dict[str, Any]:
    """Markers of cells of these colours [n] that chance alone could give."""
    ink = {"color": np.nan_to_num(z).astype(np.float32), "cmin": -OCTAVES, "cmax": OCTAVES, "colorscale": palette.ink(palette.LOAD[theme])}
    return {"symbol": "x-thin", "size": 5, "line": {"width": 1.25} | ink}


def _times_bar(figure: go.Figure, title: str) -> None:
    """The colour bar of a map of log2, above it, so that a narrow page is left to the cells; what lies beyond either end has the end's colour.

    Its title is a text of its own: Plotly sets that of a bar which hangs from the top of the figure onto the bar, and the axis'
    title onto the axis' numbers if the bar stands on the plot instead.
    """
    words, ends = [_times(o) for o in range(-OCTAVES, OCTAVES + 1)], list(range(-OCTAVES, OCTAVES + 1))
    figure.data[0].colorbar = {"tickvals": ends, "ticktext": [f"≤{words[0]}", *words[1:-1], f"≥{words[-1]}"], "orientation": "h", "thickness": 10,
                               "lenmode": "pixels", "len": 220, "x": 0, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top", "ypad": 22}  # fmt: skip
    figure.add_annotation(
        text=title, showarrow=False, xref="paper", x=0, xanchor="left", yref="paper", y=1, yanchor="bottom", yshift=OVER - 20
    )


def _times(octaves: int) -> str:
    """2 to the power of ``octaves`` as a reader says it: ⅛×, 1×, 16×."""
    return {-3: "⅛×", -2: "¼×", -1: "½×"}.get(octaves, f"{2**octaves:,}×" if octaves >= 0 else f"1/{2**-octaves:,}×")


def _numbers(n: int, step: int | None = None) -> dict[str, Any]:
    """An axis of n experts: up to LABELLED every one has its number, upright or on its side, since the order need not tell it; above, every ``step``."""
    return {"dtick": 1 if n <= LABELLED else step, "autotickangles": [0, 90], "tickfont": {"size": 12 if n <= LABELLED // 2 else 9}}


def _cells_over(figure: go.Figure, x: Any, y: Sequence[str], told: np.ndarray, hover: str, meta: Any) -> None:
    """Transparent markers over a heatmap's cells: they take hover and clicks, which Plotly's heatmaps do not pass on to Streamlit."""
    unseen = {"marker": {"opacity": 0.001}}
    draw = go.Scatter if len(told) <= 1_024 else go.Scattergl  # SVG takes a second from some thousand markers on
    figure.add_trace(draw(x=x, y=y, mode="markers", showlegend=False, customdata=told, name=UNSEEN, meta=meta, hovertemplate=hover,
                          marker={"symbol": "square", "size": 20, "opacity": 0.001, "color": "#888"}, selected=unseen, unselected=unseen))  # fmt: skip


def enrichment_bars(names: Sequence[str], uses: Sequence[GroupUse], mark: str | None = None) -> go.Figure:
    """Enrichment of one expert by group, on an axis in octaves, with 95% intervals; bars that are not significant are faded,
    where any could be; the group ``mark`` is framed."""
    value, low, high = (np.array([getattr(u, n) for u in uses], float) for n in ("enrichment", "low", "high"))
    figure = go.Figure(
        go.Bar(y=list(names), x=value, orientation="h",
               customdata=np.array([[u.share, u.elsewhere, u.count, u.n, u.q, u.significant, u.documents, u.lift, u.low, u.high] for u in uses]),
               meta={"x": "log2_enrichment", "y": "group", "customdata": ["share", "elsewhere", "count", "n", "q", "significant", "documents", "lift", "low", "high"]},
               error_x={"type": "data", "symmetric": False, "array": np.nan_to_num(high - value), "arrayminus": np.nan_to_num(value - low),
                        "color": "#888", "thickness": 1},
               marker={"color": palette.AMOUNT["light"][3], "opacity": [1.0 if u.significant or not u.tested else 0.25 for u in uses],
                       "line": {"color": "#888", "width": [3 if u.group == mark else 0 for u in uses]}},
               hovertemplate="%{y}: used for %{customdata[0]:.1%} (%{customdata[2]:,} of %{customdata[3]:,} tokens), %{customdata[1]:.1%} elsewhere,"
                             " q = %{customdata[4]:.2g}<extra></extra>")
    )  # fmt: skip
    reach = [x for x in (value, low, high) for x in x[np.isfinite(x)]]
    first, last = int(np.floor(min(reach, default=0.0))), int(np.ceil(max(reach, default=0.0)))
    octaves = [o for o in range(min(first, 0), max(last, 0) + 1) if last - first <= 10 or o % 2 == 0]
    figure.update_xaxes(
        title="times as often as elsewhere", zeroline=True, zerolinecolor="#888", tickvals=octaves, ticktext=[_times(o) for o in octaves]
    )
    figure.update_yaxes(autorange="reversed", type="category")
    return _sized(figure, max(200, 26 * len(names) + 80))


def information_bars(rows: Sequence[str], bits: np.ndarray, chance: np.ndarray, ceiling: np.ndarray) -> go.Figure:
    """Mutual information per layer [L] in bits, beside what shuffled labels give, chance [3, L]: mean, low, high; a tick at the most possible."""
    figure, named = go.Figure(), {"x": "layer", "y": "bits"}
    figure.add_bar(
        x=list(rows), y=bits, name="measured", meta=named, marker_color=palette.AMOUNT["light"][3], hovertemplate="%{x}: %{y:.3f} bits<extra></extra>"
    )  # fmt: skip
    figure.add_bar(x=list(rows), y=chance[0], name="labels shuffled over documents", meta=named | {"customdata": ["low", "high"]}, marker_color="#9a9a9a",
                   customdata=chance[1:].T, error_y={"type": "data", "symmetric": False, "array": chance[2] - chance[0],
                                                     "arrayminus": chance[0] - chance[1], "color": "#888", "thickness": 1},
                   hovertemplate="%{x}: %{y:.3f} bits by chance (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>")  # fmt: skip
    figure.add_scatter(x=list(rows), y=ceiling, mode="markers", name="the most possible", meta=named,
                       marker={"symbol": "line-ew-open", "size": 24, "line": {"width": 2}, "color": "#888"},
                       hovertemplate="%{x}: at most %{y:.3f} bits<extra></extra>")  # fmt: skip
    figure.update_layout(barmode="group", legend=_ABOVE)
    figure.update_yaxes(title="bits", rangemode="tozero")
    figure.update_xaxes(type="category")
    return _sized(figure, 300)


def lift_map(lift: np.ndarray, rows: str, columns: str, theme: str, weak: np.ndarray | None = None) -> go.Figure:
    """Experts x experts: log2 of observed over expected, fixed at 1/8 to 8 times; empty where nothing is expected.

    Cells that are ``weak``, bool as ``lift``, carry a small cross.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.clip(np.log2(lift), -OCTAVES, OCTAVES).astype(np.float32)
    figure = go.Figure(
        go.Heatmap(z=z, x=np.arange(z.shape[1]), y=np.arange(len(z)), customdata=lift, colorscale=palette.scale(palette.LOAD[theme]), zmin=-OCTAVES, zmax=OCTAVES,
                   meta={"x": "other", "y": "expert", "z": None, "customdata": ["lift"]}, hoverongaps=False,
                   hovertemplate="%{y} and %{x}: %{customdata:.2f} × expected<extra></extra>")
    )  # fmt: skip
    if weak is not None and weak.any():
        row, column = np.nonzero(weak)
        figure.add_scatter(x=column, y=row, mode="markers", hoverinfo="skip", showlegend=False, meta=AGAIN, marker=_crosses(z[weak], theme))
    _times_bar(figure, "times as often as by load alone")
    figure.update_xaxes(title=columns, range=[-0.5, z.shape[1] - 0.5], constrain="domain", **_numbers(z.shape[1]))
    figure.update_yaxes(title=rows, range=[len(z) - 0.5, -0.5], scaleanchor="x", constrain="domain", **_numbers(len(z)))
    return _sized(figure, 540, OVER)


def _sized(figure: go.Figure, height: int, top: int = 16, **layout: Any) -> go.Figure:
    """The figure at its height; ``layout`` in the same call, since every call of an ``update_`` method takes two milliseconds."""
    figure.update_layout(
        height=height, margin={"l": 8, "r": 8, "t": top, "b": 8}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", **layout
    )
    return figure
