"""The theme probe: tells Python whether the browser shows the page dark, so that Plotly's colours follow a switch.

Streamlit's own ``st.context.theme`` does not rerun the script when the theme is switched (streamlit#11920); this component
runs again whenever the theme changes, and reruns the script only where what Python believes is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

_probe = st.components.v2.component(
    "routerscope_theme_probe", html="<i></i>\n", js=(Path(__file__).parent / "probe.js").read_text(encoding="utf-8")
)


def theme_probe(drawn: str, page: str, query: str | None, on_change: Callable[[], None]) -> None:
    """Put the probe at the end of a page that was drawn for the theme ``drawn``; it draws nothing itself.

    ``query`` replaces the query of the address, while it is that of ``page`` (its url_path), without a step of history, which Streamlit has
    no call for.
    """
    _probe(key="theme-probe", data={"drawn": drawn, "page": page, "query": query}, on_theme_change=on_change, height=1)


def probed_theme() -> str | None:
    """ "light" or "dark" as the browser shows the page; None before the probe has answered once."""
    told = (st.session_state.get("theme-probe") or {}).get("theme")
    return told if told in ("light", "dark") else None
