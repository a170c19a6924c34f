"""A drawn figure as what leaves the app: plain values for another page, JSON for paper, a table of what it shows."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from plotly.offline import get_plotlyjs

from app import palette

from .drawing import AGAIN, BAR, UNSEEN

_WHOLE = frozenset({"expert", "other", "place", "tokens", "group_tokens", "documents", "count", "n", "assignments"})  # columns of integers


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
