"""Figures of expert capacity: slots, curves over capacity factors, who loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app import palette

from .drawing import ABOVE, numbers, sized


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
    return sized(figure, 360, barmode="stack", legend=ABOVE, yaxis={"title": "assignments", "rangemode": "tozero"},
                  xaxis={"title": "expert, busiest first", "type": "category", **numbers(len(order))})  # fmt: skip


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
    figure.update_layout(legend=ABOVE)
    figure.update_xaxes(title="slot", dtick=1, range=[0.4, max(capacity, int(loads.max())) + 0.9], showgrid=False)
    figure.update_yaxes(categoryorder="array", categoryarray=[f"expert {e}" for e in reversed(range(n_experts))], showgrid=False,
                        range=[-0.6, n_experts - 0.4])  # fmt: skip
    return sized(figure, 300)


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
    return sized(figure, 360, legend=ABOVE, shapes=[line], xaxis={"title": "capacity factor"},
                  yaxis={"title": "share", "tickformat": "~%", "range": [0, 1]})  # fmt: skip


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
    return sized(figure, 300, legend=ABOVE, showlegend=True, shapes=[line], xaxis={"title": what, "type": "category"},
                  yaxis={"title": f"share of {unit} lost", "tickformat": "~%", "rangemode": "tozero"})  # fmt: skip
