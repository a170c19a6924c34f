"""Figures of what experts are used for: enrichment of groups, information per layer, pairs of experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.cards import GroupUse
from analysis.information import Information
from analysis.jackknife import DocumentInterval
from analysis.specialization import Preferences
from app import palette

from .drawing import ABOVE, AGAIN, MOST_MARKS, OCTAVES, OVER, cells_over, crosses, numbers, sized, times_bar, times_ticks

GRID = 2  # small maps side by side: half of a telephone's width still shows a row of 64 experts
LEAST_USES = 20  # tokens an expert must have for its row of effects to be coloured
TALLEST = 3_900  # pixels of a map's rows, however many


def enrichment_map(found: Preferences, names: Sequence[str], groups: np.ndarray, experts: np.ndarray, theme: str) -> go.Figure:
    """Groups x experts in the orders given: log2 enrichment, drawn within +-3; cells that are not significant carry a small cross,
    where any could be, or are empty where there are more than MOST_MARKS.

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
    times_bar(figure, "times as often as elsewhere")
    row, column = (a.ravel() for a in np.indices(z.shape))
    weak = ~found.significant[cell].ravel() & (not found.missing)
    if weak.sum() > MOST_MARKS:
        figure.data[0].z = np.where(weak.reshape(z.shape), np.nan, z).astype(np.float32)
    else:
        figure.add_scatter(x=[x[c] for c in column[weak]], y=[names[r] for r in row[weak]], mode="markers", hoverinfo="skip", showlegend=False, meta=AGAIN,
                           marker=crosses(z.ravel()[weak], theme))  # fmt: skip
    told = np.stack([np.broadcast_to(experts, z.shape), *(getattr(found, n)[cell] for n in ("share", "elsewhere", "lift", "low", "high", "q")),
                     *(np.broadcast_to(n[groups][:, None], z.shape) for n in (found.tokens, found.documents)),
                     *(getattr(found, n)[cell] for n in ("count", "enrichment", "p", "significant", "within"))], -1).reshape(z.size, -1)  # fmt: skip
    effect = "%{customdata[4]:.1f} to %{customdata[5]:.1f}"
    if np.isfinite(found.within).any():
        effect = f"%{{customdata[10]:.1f}} over all tokens (95%: {effect}), %{{customdata[13]:.1f}} within documents"
    cells_over(
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
        **numbers(len(x)),
    )
    row = min(28.0, TALLEST / max(len(names), 1))
    dense = {"dtick": 1 if row >= 11 else None, "tickfont": {"size": 9}} if row < 18 else {}
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], type="category", categoryorder="array", categoryarray=list(names), **dense)
    return sized(figure, max(280, round(row * len(names)) + 130), OVER)


def enrichment_grid(
    titles: Sequence[str], found: Sequence[Preferences], names: Sequence[str], groups: np.ndarray, experts: Sequence[np.ndarray], theme: str
) -> go.Figure:
    """A small map per site in columns of two, groups in one order, ``experts`` [E] in the order of each site; as ``enrichment_map``.

    Cells that are not significant are empty, where any could be: a cross would fill so small a cell.
    """
    rows = -(-len(found) // GRID)
    height = (max(64, 13 * len(names)) + 40) * rows + OVER
    figure = make_subplots(
        rows, GRID, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=30 / (height - OVER)
    )
    for i, (site, order) in enumerate(zip(found, experts, strict=True)):
        cell, row, column = np.ix_(groups, order), i // GRID + 1, i % GRID + 1
        z = np.clip(site.enrichment[cell], -OCTAVES, OCTAVES).astype(np.float32)
        z[:, site.count.sum(0)[order] < LEAST_USES] = np.nan
        if not site.missing:
            z[~site.significant[cell]] = np.nan
        told = np.stack([np.broadcast_to(order, z.shape), *(getattr(site, n)[cell] for n in (
            "share", "elsewhere", "lift", "enrichment", "low", "high", "q", "count", "significant"))], -1)  # fmt: skip
        figure.add_heatmap(
            z=z, x=np.arange(len(order)), y=list(names), customdata=told, row=row, col=column, hoverongaps=False, name=titles[i],
            colorscale=palette.scale(palette.LOAD[theme]), zmin=-OCTAVES, zmax=OCTAVES, showscale=not i,
            meta={"x": None, "y": "group", "z": None, "customdata": ["expert", "share", "elsewhere", "lift", "log2_enrichment", "log2_enrichment_low",
                                                                     "log2_enrichment_high", "q", "count", "significant"]},
            hovertemplate="%{y}, expert %{customdata[0]:.0f}<br>used for %{customdata[1]:.1%}, %{customdata[2]:.1%} elsewhere<br>lift %{customdata[3]:.2f},"
                          " q = %{customdata[7]:.2g}<extra>" + titles[i] + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, zeroline=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_annotations(font_size=12)
    times_bar(figure, "times as often as elsewhere")
    return sized(figure, height, OVER)


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
    ticks = times_ticks(min(reach, default=0.0), max(reach, default=0.0))
    figure.update_xaxes(title="times as often as elsewhere", zeroline=True, zerolinecolor="#888", **ticks)
    figure.update_yaxes(autorange="reversed", type="category")
    return sized(figure, max(200, 26 * len(names) + 80))


def information_bars(rows: Sequence[str], found: Sequence[Information], endless: Sequence[DocumentInterval]) -> go.Figure:
    """Mutual information per layer in bits, beside what shuffled labels give, with its range; a tick at the most possible, and a diamond
    with its interval at what endless documents would give, where that is known."""
    bits, ceiling = (np.array([getattr(x, name) for x in found]) for name in ("plug_in", "ceiling"))
    chance = np.array([[x.floor, x.low, x.high] for x in found]).T
    known = np.array([[np.nan] * 3 if x.missing else [x.value, x.low, x.high] for x in endless]).T
    figure, named = go.Figure(), {"x": "layer", "y": "bits"}
    figure.add_bar(
        x=list(rows), y=bits, name="measured", meta=named, marker_color=palette.AMOUNT["light"][3], hovertemplate="%{x}: %{y:.3f} bits<extra></extra>"
    )  # fmt: skip
    figure.add_bar(x=list(rows), y=chance[0], name="labels shuffled over documents", meta=named | {"customdata": ["low", "high"]}, marker_color="#9a9a9a",
                   customdata=chance[1:].T, error_y={"type": "data", "symmetric": False, "array": chance[2] - chance[0],
                                                     "arrayminus": chance[0] - chance[1], "color": "#888", "thickness": 1},
                   hovertemplate="%{x}: %{y:.3f} bits by chance (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>")  # fmt: skip
    if np.isfinite(known).any():
        figure.add_scatter(x=list(rows), y=known[0], mode="markers", name="endless documents, 95%", meta=named | {"customdata": ["low", "high"]}, customdata=known[1:].T,
                           error_y={"type": "data", "symmetric": False, "array": known[2] - known[0], "arrayminus": known[0] - known[1], "color": palette.DEAD, "thickness": 2},
                           marker={"color": palette.DEAD, "symbol": "diamond", "size": 7},
                           hovertemplate="%{x}: %{y:.3f} bits from endless documents like these (95%: %{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>")  # fmt: skip
    figure.add_scatter(x=list(rows), y=ceiling, mode="markers", name="the most possible", meta=named,
                       marker={"symbol": "line-ew-open", "size": 24, "line": {"width": 2}, "color": "#888"},
                       hovertemplate="%{x}: at most %{y:.3f} bits<extra></extra>")  # fmt: skip
    figure.update_layout(barmode="group", legend=ABOVE)
    figure.update_yaxes(title="bits", rangemode="tozero")
    figure.update_xaxes(type="category")
    return sized(figure, 300)


def lift_map(lift: np.ndarray, rows: str, columns: str, theme: str, weak: np.ndarray | None = None) -> go.Figure:
    """Experts x experts: log2 of observed over expected, fixed at 1/8 to 8 times; empty where nothing is expected.

    Cells that are ``weak``, bool as ``lift``, carry a small cross, or are empty where there are more than MOST_MARKS.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.clip(np.log2(lift), -OCTAVES, OCTAVES).astype(np.float32)
    if weak is not None and weak.sum() > MOST_MARKS:
        z, weak = np.where(weak, np.nan, z).astype(np.float32), None
    figure = go.Figure(
        go.Heatmap(z=z, x=np.arange(z.shape[1]), y=np.arange(len(z)), customdata=lift, colorscale=palette.scale(palette.LOAD[theme]), zmin=-OCTAVES, zmax=OCTAVES,
                   meta={"x": "other", "y": "expert", "z": None, "customdata": ["lift"]}, hoverongaps=False,
                   hovertemplate="%{y} and %{x}: %{customdata:.2f} × expected<extra></extra>")
    )  # fmt: skip
    if weak is not None and weak.any():
        row, column = np.nonzero(weak)
        figure.add_scatter(x=column, y=row, mode="markers", hoverinfo="skip", showlegend=False, meta=AGAIN, marker=crosses(z[weak], theme))
    times_bar(figure, "times as often as by load alone")
    figure.update_xaxes(title=columns, range=[-0.5, z.shape[1] - 0.5], constrain="domain", **numbers(z.shape[1]))
    figure.update_yaxes(title=rows, range=[len(z) - 0.5, -0.5], scaleanchor="x", constrain="domain", **numbers(len(z)))
    return sized(figure, 540, OVER)
