"""What a person waits for, in Chromium against the served app, medians: python -m tests.bench.bench_browser"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from playwright.async_api import Browser, async_playwright
from playwright.sync_api import Browser as SyncBrowser
from playwright.sync_api import Page, expect

from analysis.writing import RunWriter
from tests.browser.served import FLAGS, chromium, served
from tests.synthetic import card, make_part, site

ROUNDS = 5
LONG = 4_096  # tokens of the long prompt, in the shape of OLMoE: 16 layers of 64 experts, top-8
SESSIONS = 8
PAGES = ("", "tokens", "load", "capacity", "specialization", "expert", "model", "glossary")
TEXT = ("The king said to the messenger: go to the city, and tell them what you have seen in the field. " * 8)[:760]  # about 200 tokens
expect.set_options(timeout=60_000)


def painted(page: Page) -> None:
    """A Plotly heatmap has been drawn."""
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()


def first_view(page: Page, address: str) -> None:
    page.goto(address)
    painted(page)


def first_visit(browser: SyncBrowser, address: str) -> float:
    """Seconds of the first view in a browser that has nothing stored of the app."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    took = seconds(lambda: first_view(page, address))
    page.locator("[data-test-script-state=notRunning]").wait_for()
    page.close()
    return took


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


def slide(page: Page) -> float:
    """Seconds from a key on the capacity slider until the sentence that has changed is painted, by the browser's own clock."""
    page.evaluate("""() => {
        const told = () => [...document.querySelectorAll("h2")].map((h) => h.textContent).find((t) => t.startsWith("CF "));
        addEventListener("keydown", () => { window.__pressed = performance.now(); }, { capture: true, once: true });
        const was = told();
        window.__painted = new Promise((done) => new MutationObserver((_, watch) => {
            if (!told() || told() === was) return;
            watch.disconnect();
            requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - window.__pressed)));
        }).observe(document.body, { childList: true, subtree: true, characterData: true }));
    }""")
    page.get_by_role("slider").first.press("ArrowRight")
    took: float = page.evaluate("() => window.__painted")
    page.locator("[data-test-script-state=notRunning]").wait_for()
    return took / 1000


def record_long(folder: Path) -> None:
    """A run of one prompt of LONG tokens."""
    layers = tuple(site(i, 64, 8) for i in range(16))
    with RunWriter.open(folder, card(layers), {}) as writer:
        writer.write(make_part(layers, [LONG], texts=[f" word{i}" for i in range(997)]))
        writer.commit()


def tokens_painted(page: Page) -> None:
    """Every token of the long prompt stands in the strip, the heatmap below is drawn, and the browser has shown it."""
    page.locator(".strip .text .token").nth(LONG - 1).wait_for()
    page.locator(".st-key-token_map .heatmaplayer image").first.wait_for()
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def long_prompt(page: Page, address: str) -> Callable[[], None]:
    """The Overview of the long run is open; the answer goes to its tokens and waits for strip and heatmap."""
    first_view(page, f"{address}/?run=long")
    page.locator("[data-test-script-state=notRunning]").wait_for()

    def follow() -> None:
        page.get_by_role("link", name="Tokens", exact=True).click()
        tokens_painted(page)

    return follow


async def walk(browser: Browser, address: str) -> list[str]:
    """One session: every page after the other, on the demo run; what went wrong."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    page, troubles = await context.new_page(), []
    page.set_default_timeout(240_000)
    known = {f"/{p}/_stcore/{w}" for p in PAGES for w in ("health", "host-config")}  # Streamlit looks for its base path on a deep link
    page.on("console", lambda m: troubles.append(m.text) if m.type == "error" and urlparse(m.location["url"]).path not in known else None)
    page.on("pageerror", lambda e: troubles.append(str(e)))
    page.on("response", lambda r: troubles.append(f"{r.status} {r.url}") if r.status >= 400 and urlparse(r.url).path not in known else None)
    for name in PAGES:
        await page.goto(f"{address}/{name}?run=demo-run")
        await page.locator("h1").first.wait_for()
        await page.locator("[data-test-script-state=notRunning]").wait_for()
        if await page.get_by_text("Something went wrong").count():
            troubles.append(f"{name}: the page failed")
    await context.close()
    return troubles


async def crowd(address: str) -> list[str]:
    """SESSIONS sessions at once; all their troubles."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        found = await asyncio.gather(*(walk(browser, address) for _ in range(SESSIONS)))
        await browser.close()
    return [trouble for one in found for trouble in one]


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def main() -> None:
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as scratch, served(Path(scratch) / "runs") as address, chromium() as browser:
        record_long(Path(scratch) / "runs" / "long")
        for i in range(ROUNDS):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(120_000)
            note(
                f"{LONG:,} tokens, 16 layers of 64 experts: from the click on Tokens to strip and heatmap painted",
                seconds(long_prompt(page, address)),
            )
            note("first view of the demo run, from goto to the painted heatmap", first_visit(browser, address))
            record = paste(page, address, f"bench-{i}")
            note("200 pasted tokens, from Record to the painted token map", seconds(record))
            page.goto(f"{address}/capacity?run=demo-run&cf=1")
            expect(page.get_by_role("heading", name="CF 1 drops")).to_be_visible()
            page.locator("[data-test-script-state=notRunning]").wait_for()
            note("one step of the capacity slider, until the sentence is painted", statistics.median(slide(page) for _ in range(4)))
            page.close()
    with tempfile.TemporaryDirectory() as scratch, served(Path(scratch) / "runs") as address:
        took = time.monotonic()
        troubles = asyncio.run(crowd(address))
        log = (Path(scratch) / "server.log").read_text()
        failures = [line for line in log.splitlines() if "Traceback" in line or "ERROR" in line or "error " in line]
        print(f"{SESSIONS} sessions at once, {len(PAGES)} pages each: {len(troubles)} errors in the browsers, {len(failures)} on the server,"
              f" {time.monotonic() - took:.1f} s", *troubles[:5], *failures[:5], sep="\n  ")  # fmt: skip
    print(f"on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, values in figures.items():
        print(f"{name}: {statistics.median(values):.2f} s (first {values[0]:.2f}, median of {len(values)})")


if __name__ == "__main__":
    main()
