"""The tables a page gives away: every format, the same row of controls on each page. Figures are in app/figures.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from analysis.export import FORMATS, MOST_ROWS, TABLES, computed_bytes, export_bytes, growing_rows
from analysis.trace import Trace

from . import charts

_ABOUT = MappingProxyType(
    {
        "csv": "For spreadsheets: text is escaped so that no cell runs as a formula. The numbers alone, without run, settings or definitions.",
        "parquet": "Exact, and smallest: best for the decisions of a long run. Carries the run, the settings and the definitions.",
        "json": "Exact; carries the run, the settings and the definitions.",
    }
)


def downloads(trace: Trace) -> None:
    """Choose a table of the run and a format and take the file, which is made on the click; what takes settings has its page.

    A file is made in memory, all of it: in the place of one that would fill it stands the command that writes it.
    """
    tables = [n for n, t in TABLES.items() if not t.settings]
    row = st.container(horizontal=True, vertical_alignment="bottom")
    table = row.selectbox("Table", tables, key="table", width=180, help="; ".join(f"{n}: {TABLES[n].definition}" for n in tables))
    if (rows := growing_rows(trace, table)) > MOST_ROWS:
        st.info(f"{rows:,} rows are too many for a download, which takes {MOST_ROWS:,}. From a shell the file is written piece by piece:")
        st.code(f"python -m analysis export RUN --table {table} --format parquet -o FILE", language="sh")
        return
    buttons(row, lambda kind: partial(export_bytes, trace, table, kind), charts.file_name(trace.name, table))


def computed_downloads(
    trace: Trace, tables: Mapping[str, tuple[str, pa.Table | Callable[[], pa.Table]]], settings: Mapping[str, Any]
) -> None:
    """The same for tables a page computed: name -> (what a row is, rows, or what makes them on the click); ``settings`` go into the file."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    table = row.selectbox("Table", list(tables), key="table", width=220, help="; ".join(f"{n}: {what}" for n, (what, _) in tables.items()))
    what, rows = tables[table]

    def file(kind: str) -> bytes:
        made = rows() if callable(rows) else rows
        # A table that names its layers, or is over all of them, is not of the layer chosen on the page.
        every = "metric" in made.column_names or ("site" in made.column_names and pc.count_distinct(made["site"]).as_py() > 1)
        return computed_bytes(trace, made, what, {k: v for k, v in settings.items() if k != "layer" or not every}, kind)

    buttons(row, lambda kind: partial(file, kind), charts.file_name(trace.name, table.replace(" ", "-")))


def table_downloads(name: str, what: str, rows: pa.Table) -> None:
    """The buttons for a table of no run; ``what`` says what a row is."""
    buttons(st.container(horizontal=True), lambda kind: partial(computed_bytes, None, rows, what, {}, kind), name)


def buttons(row: Any, data: Callable[[str], Callable[[], bytes]], name: str, kinds: Sequence[str] = FORMATS, key: str = "download") -> None:
    """One button per format: nothing reruns between choosing a format and the click, which would lose the file."""
    for kind in kinds:
        row.download_button(f"{kind.upper()}", data=data(kind), key=f"{key}-{kind}", on_click="ignore",
                            file_name=f"{name}.{kind}", help=_ABOUT[kind])  # fmt: skip
