"""Figures: the one call that draws one on a page, and the row at a page's foot that gives its figures away as files.

A figure's definition and n stand under it, and go with it into every file together with the run, the settings of the page
and the version. SVG and PNG are drawn by plotly.js in the browser, in a style for paper, at the size asked for; what a figure
shows goes out as CSV and Parquet. Nothing of this is sent to the browser before a person opens the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

import streamlit as st

from analysis.export import computed_bytes, describe_computed
from analysis.trace import Trace

from . import charts
from .components.figure_files import figure_files
from .downloads import buttons
from .model_card import origin
from .text import show_note, visible_name

# Width and height in CSS pixels (96 to the inch; None: as drawn), size of text in pixels, pixels of a PNG per inch.
SIZES: Mapping[str, tuple[str, float | None, float | None, float, int]] = MappingProxyType(
    {
        "single": ("single column, 3.3 in", 3.3 * 96, None, 8 / 72 * 96, 300),
        "double": ("double column, 6.75 in", 6.75 * 96, None, 8 / 72 * 96, 300),
        "slide": ("slide, 1280 × 720", 1280, 720, 20, 96),
        "screen": ("as on screen", None, None, 12, 192),
    }
)


@dataclass(frozen=True)
class Shown:
    """A figure as this run of the script drew it: its file's name, its element's key, what it shows and of how much."""

    trace: Trace
    name: str
    key: str
    figure: Any
    definition: str
    n: str
    how: str = ""

    @property
    def told(self) -> str:
        """Definition and how it is computed."""
        return f"{self.definition} {self.how}".strip()

    @property
    def caption(self) -> str:
        """What goes with it into a file."""
        return f"{self.told} n = {self.n}."


def begin() -> None:
    """Before a page draws: no figure yet."""
    st.session_state["_figures"] = []


def show_figure(trace: Trace, figure: Any, name: str, *, key: str, alt: str, definition: str, n: str, how: str = "", **options: Any) -> Any:
    """Draw a figure with its caption and keep it for ``take_figures``; returns what st.plotly_chart does.

    ``name`` goes into its files' names, ``definition`` says in a sentence or two what is shown and what chance would give, ``n`` of
    how much ("3,000 tokens"); ``how``, what only a careful reader asks (settings, tests, corrections), stands behind a question mark
    and in the files. All may hold data text. ``options`` go to st.plotly_chart.
    """
    event = st.plotly_chart(figure, key=key, alt=alt, config=dict(charts.BAR), **options)
    shown = Shown(trace, charts.file_name(trace.name, name), key, figure, definition, n, how)
    show_note(f"{definition} n = {n}.", how)
    st.session_state["_figures"].append(shown)
    return event


@st.fragment
def take_figures() -> None:
    """The row at the foot of a page that drew figures: which one, how large, and as what."""
    shown = {s.name: s for s in st.session_state["_figures"]}
    if not shown:
        return
    box = st.expander("Take the figures", on_change="rerun", key="take-figures")
    if not box.open:
        return
    row = box.container(horizontal=True, vertical_alignment="bottom")
    prefix = len(charts.file_name(next(iter(shown.values())).trace.name, ""))
    name = row.selectbox("Figure", list(shown), format_func=lambda n: n[prefix:].replace("-", " "), key="take-figure", width=300)
    size = row.selectbox("Size", list(SIZES), format_func=lambda s: SIZES[s][0], key="take-size", width=210)
    captioned = row.toggle(
        "Caption in the picture",
        value=True,
        key="take-caption",
        help="What it shows, n, the run and the version; they are in the file's metadata in any case.",
    )
    chosen = shown[name]
    settings = {k: v for k, v in st.session_state["_chosen"].items() if k != "run"}
    with row:
        figure_files(_order(chosen, size, captioned, settings))
    what = f"one row per mark of the figure. {chosen.told}"
    box.caption("SVG, PNG and Parquet carry definition, n, run, settings and version. CSV holds the numbers alone.")
    buttons(
        row, lambda kind: partial(_rows, chosen, what, settings | {"figure": name, "n": chosen.n}, kind), name, ("csv", "parquet"), "take"
    )


def _rows(shown: Shown, what: str, settings: Mapping[str, Any], kind: str) -> bytes:
    return computed_bytes(shown.trace, charts.rows(shown.figure), what, settings, kind)


def _order(shown: Shown, size: str, captioned: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the browser needs to make the files: the figure, its place on the page, size, caption, and what goes along."""
    _, width, height, font, dpi = SIZES[size]
    about = describe_computed(shown.trace, shown.told, settings)
    about = {"figure": shown.name, "definition": about.pop("row"), "n": shown.n, **about}
    return {
        "figure": charts.printed(shown.figure),
        "place": f".st-key-{shown.key} .js-plotly-plot",
        "name": shown.name,
        "width": width,
        "height": height,
        "font": font,
        "dpi": dpi,
        "caption": visible_name(f"{shown.caption} {origin(shown.trace)}"),
        "captioned": captioned,
        "software": f"Routerscope {about['routerscope']}",
        "about": json.dumps(about),
        "query": urlencode(st.session_state["_chosen"]),
    }
