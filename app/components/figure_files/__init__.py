"""Two buttons that make a figure an SVG or a PNG in the browser, with plotly.js from our own origin.

The figure is laid out anew for paper at the size asked for; title, definition, n, run, settings and version go into the file's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

_HERE = Path(__file__).parent
_files = st.components.v2.component(
    "routerscope_figure_files",
    html='<span class="files"><button class="svg">SVG</button><button class="png">PNG</button><span class="said" role="status"></span></span>\n',
    css=(_HERE / "files.css").read_text(encoding="utf-8"),
    js=(_HERE / "files.js").read_text(encoding="utf-8"),
)


def figure_files(order: Mapping[str, Any]) -> None:
    """Draw the buttons; ``order`` is what files.js reads."""
    _files(data=dict(order), key="figure-files", width="content")
