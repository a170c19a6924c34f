"""The tables a page gives away: every format, the same row of controls on each page. Figures are in app/figures.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import streamlit as st

from analysis.export import FORMATS, TABLES, computed_bytes, export_bytes
from analysis.trace import Trace

from . import charts

_ABOUT = MappingProxyType(
    {
        "csv": "For spreadsheets: text is escaped so that no cell runs as a formula.",
        "parquet": "Exact, and smallest: best for the decisions of a long run.",
        "json": "Exact; carries the run, the settings and the definitions.",
    }
)


def downloads(trace: Trace, tables: Sequence[str] = tuple(TABLES)) -> None:
    """Choose a table and a format and take the file, which is made on the click."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    table = row.selectbox("Table", tables, key="table", width=180, help="; ".join(f"{n}: {TABLES[n].definition}" for n in tables))
    buttons(row, lambda kind: partial(export_bytes, trace, table, kind), charts.file_name(trace.name, table))


def computed_downloads(trace: Trace, tables: Mapping[str, tuple[str, pa.Table]], settings: Mapping[str, Any]) -> None:
    """The same for tables a page computed: name -> (what a row is, rows); ``settings`` go into the file."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    table = row.selectbox("Table", list(tables), key="table", width=220, help="; ".join(f"{n}: {what}" for n, (what, _) in tables.items()))
    what, rows = tables[table]
    buttons(row, lambda kind: partial(computed_bytes, trace, rows, what, settings, kind),
            charts.file_name(trace.name, table.replace(" ", "-")))  # fmt: skip


def buttons(row: Any, data: Callable[[str], Callable[[], bytes]], name: str, kinds: Sequence[str] = FORMATS, key: str = "download") -> None:
    """One button per format: nothing reruns between choosing a format and the click, which would lose the file."""
    for kind in kinds:
        row.download_button(f"{kind.upper()}", data=data(kind), key=f"{key}-{kind}", on_click="ignore",
                            file_name=f"{name}.{kind}", help=_ABOUT[kind])  # fmt: skip
