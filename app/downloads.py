"""Everything a page gives away: tables in every format, the same row of controls on each page, and figures as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import streamlit as st

from analysis.export import FORMATS, TABLES, computed_bytes, export_bytes
from analysis.trace import Trace

from . import charts
from .selection import picture_kind


def figure_config(trace: Trace, what: str) -> dict[str, Any]:
    """Plotly's options for the figure called ``what``: saved as the header says, in a file named after run and figure."""
    return charts.config(picture_kind(), trace.name, what)


def downloads(trace: Trace, tables: Sequence[str] = tuple(TABLES)) -> None:
    """Choose a table and a format and take the file, which is made on the click."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    table = row.selectbox("Table", tables, key="table", width=180, help="; ".join(f"{n}: {TABLES[n].definition}" for n in tables))
    kind = row.selectbox("Format", FORMATS, key="format", width=120, help="Parquet and JSON are exact; CSV escapes text for spreadsheets.")
    row.download_button("Download", data=partial(export_bytes, trace, table, kind), key="download", on_click="ignore",
                        file_name=f"{charts.file_name(trace.name, table)}.{kind}")  # fmt: skip


def computed_downloads(trace: Trace, tables: Mapping[str, tuple[str, pa.Table]], settings: Mapping[str, Any]) -> None:
    """The same for tables a page computed: name -> (what a row is, rows); ``settings`` go into the file."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    table = row.selectbox("Table", list(tables), key="table", width=220, help="; ".join(f"{n}: {what}" for n, (what, _) in tables.items()))
    kind = row.selectbox("Format", FORMATS, key="format", width=120, help="Parquet and JSON carry run, settings and definitions.")
    what, rows = tables[table]
    row.download_button("Download", data=partial(computed_bytes, trace, rows, what, settings, kind), key="download", on_click="ignore",
                        file_name=f"{charts.file_name(trace.name, table.replace(' ', '-'))}.{kind}")  # fmt: skip
