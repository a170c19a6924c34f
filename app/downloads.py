"""Every table of a run, in every format: one row of controls, the same on each page that offers it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import streamlit as st

from analysis.export import FORMATS, TABLES, export_bytes
from analysis.trace import Trace


def downloads(trace: Trace, tables: Sequence[str] = tuple(TABLES)) -> None:
    """Choose a table and a format and take the file, which is made on the click."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    table = row.selectbox("Table", tables, key="table", width=180, help="; ".join(f"{n}: {TABLES[n].definition}" for n in tables))
    kind = row.selectbox("Format", FORMATS, key="format", width=120, help="Parquet and JSON are exact; CSV escapes text for spreadsheets.")
    row.download_button("Download", data=partial(export_bytes, trace, table, kind), key="download", on_click="ignore",
                        file_name=f"{re.sub(r'[^a-z0-9._-]', '_', trace.name)}-{table}.{kind}")  # fmt: skip
