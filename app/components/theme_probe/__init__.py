"""The theme probe: tells Python whether the browser shows the page dark, so that Plotly's colours follow a switch.

Streamlit's own ``st.context.theme`` does not rerun the script when the theme is switched (streamlit#11920); this component
runs again whenever the theme changes, and reruns the script only where what Python believes is wrong.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

_probe = st.components.v2.component(
    "routerscope_theme_probe", html="<i></i>\n", js=(Path(__file__).parent / "probe.js").read_text(encoding="utf-8")
)


def theme_probe() -> str:
    """ "light" or "dark", as the browser shows the page; draws nothing."""
    seen = getattr(_probe(key="theme-probe", on_theme_change=lambda: None, height=1), "theme", None)
    return seen or ("dark" if st.context.theme.type == "dark" else "light")
