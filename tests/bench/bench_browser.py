"""What a person waits for, in Chromium against the served app, medians: python -m tests.bench.bench_browser"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser.served import chromium, served

ROUNDS = 5
TEXT = ("The king said to the messenger: go to the city, and tell them what you have seen in the field. " * 8)[:760]  # about 200 tokens
expect.set_options(timeout=60_000)


def painted(page: Page) -> None:
    """A Plotly heatmap has been drawn."""
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()


def first_view(page: Page, address: str) -> None:
    page.goto(address)
    painted(page)


def paste(page: Page, address: str, name: str) -> Callable[[], None]:
    """Ready to record: the text is in, the name is set; the answer presses Record and waits for the token map."""
    page.goto(f"{address}/runs")
    page.get_by_label("Text to route").fill(TEXT)
    page.get_by_label("Text to route").press("Control+Enter")
    page.get_by_label("Name of the run (optional)").fill(name)
    page.get_by_label("Name of the run (optional)").press("Tab")
    page.locator("[data-test-script-state=notRunning]").wait_for()

    def record() -> None:
        page.get_by_role("button", name="Record", exact=True).click()
        page.get_by_text("Open it on the Tokens page").click()
        painted(page)

    return record


def slide(page: Page, i: int) -> None:
    """One step of the capacity slider until the sentence has changed."""
    page.get_by_role("slider").first.press("ArrowRight")
    expect(page.get_by_role("heading", name=f"CF {1.05 + 0.05 * i:g} drops")).to_be_visible()


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def main() -> None:
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as scratch, served(Path(scratch) / "runs") as address, chromium() as browser:
        for i in range(ROUNDS):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(120_000)
            note("first view of the demo run, from goto to the painted heatmap", seconds(lambda: first_view(page, address)))  # noqa: B023
            record = paste(page, address, f"bench-{i}")
            note("200 pasted tokens, from Record to the painted token map", seconds(record))
            page.goto(f"{address}/capacity?run=demo-run&scope=document&cf=1")
            expect(page.get_by_role("heading", name="CF 1 drops")).to_be_visible()
            page.locator("[data-test-script-state=notRunning]").wait_for()
            note("one step of the capacity slider", statistics.median(seconds(lambda j=j: slide(page, j)) for j in range(4)))  # type: ignore[misc]  # noqa: B023
            page.close()
    for name, values in figures.items():
        print(f"{name}: {statistics.median(values):.2f} s (first {values[0]:.2f}, median of {len(values)})")


if __name__ == "__main__":
    main()
