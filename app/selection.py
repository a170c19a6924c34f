"""What is selected, and its place in the URL: the run in the header of every page, a layer, a document."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from analysis.store import RunError, open_run
from analysis.trace import Trace

from .runs_folder import all_runs
from .text import show_error


@st.cache_resource(max_entries=8, show_spinner=False)
def _opened(folder: str, created: str) -> Trace:
    return open_run(folder)


def run_picker() -> Trace:
    """The header of a page: choose a run (``?run=``) and get its Trace. Stops the page with a sentence where it cannot."""
    runs = {n: r for n, r in all_runs().items() if r.complete}
    if not runs:
        st.info("No run is recorded yet. Record one on the Runs page, or make the demo run with `make demo-run`.")
        st.stop()
    asked = st.query_params.get("run")
    if asked is not None and asked not in runs:
        show_error(f"Run {asked[:64]} is not on this server; the first one in the list is shown instead.")
    name = st.selectbox("Run", list(runs), key="run", bind="query-params", width=320)
    try:
        return _opened(str(runs[name].folder), runs[name].created)
    except RunError as error:
        show_error(str(error))
        st.stop()


def open_named(folder: Path, created: str) -> Trace:
    """The Trace of a listed run, from the same cache as the header's."""
    return _opened(str(folder), created)


def layer_picker(trace: Trace) -> int:
    """Choose a site (``?layer=``); returns LayerInfo.index."""
    titles = [x.title for x in trace.layers]
    chosen = st.selectbox("Layer", titles, index=len(titles) - 1, key="layer", bind="query-params", width=200)
    return titles.index(chosen)


def document_picker(trace: Trace) -> int:
    """Choose a document (``?doc=``) by number, with its name and label beside it; returns the document id."""
    stream = trace.layers[0].stream
    rows = [r for r in trace.documents.to_pylist() if r["stack"] == stream]
    names = {f"{r['document'] + 1}": f"{r['document'] + 1} · {r['name']}" + (f" · {r['label']}" if r["label"] else "") for r in rows}
    chosen = st.selectbox("Document", list(names), format_func=lambda n: names[n], key="doc", bind="query-params", width=320)
    return int(chosen) - 1


def theme() -> str:
    """ "light" or "dark", as the browser shows the page."""
    return "dark" if st.context.theme.type == "dark" else "light"
