"""How far a page moves under a reader's eyes while its first view arrives: cumulative layout shift, as Chromium measures it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from .acts import rest
from .conftest import watched
from .served import served

# What Streamlit itself moves does not count: its skeleton of a page, when the first elements take its place (0.05 to 0.21 here).
OBSERVE = """
window.__shift = 0;
const skeleton = (e) => e.sources.some((s) => s.node?.dataset?.testid === "stMainBlockContainer");
new PerformanceObserver((list) => { for (const e of list.getEntries()) if (!e.hadRecentInput && !skeleton(e)) window.__shift += e.value; })
    .observe({ type: "layout-shift", buffered: true });
"""
# Measured: 0.000 to 0.005. Without the room that style.css keeps, 0.20 to 0.22 on the first two and 0.07 on Capacity.
MOST = 0.02
VIEWS = ("", "tokens", "load", "capacity", "specialization", "expert")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    runs = tmp_path_factory.mktemp("layout") / "runs"
    runs.mkdir()
    with served(runs) as url:
        yield url


def test_nothing_moves_far_while_a_page_arrives(browser: Browser, address: str) -> None:
    shifts = {}
    for view in VIEWS:
        with watched(browser, address) as page:
            page.add_init_script(OBSERVE)
            page.goto(f"{address}/{view}")
            page.locator(".js-plotly-plot").first.wait_for()
            rest(page)
            page.wait_for_timeout(1_500)  # figures are painted after the script has ended
            shifts[view] = page.evaluate("window.__shift")
    assert max(shifts.values()) <= MOST, shifts
