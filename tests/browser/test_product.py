"""The interface as a product in real Chromium: WCAG by axe on every page, the tour, and the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect

from .acts import rest, still
from .screenshots import PAGES
from .served import served

SEEN = (*PAGES, "load?tour=2", "load?run=gone")
LOOKS = {("light", 1280): SEEN, ("dark", 390): SEEN, ("dark", 1280): (few := ("overview", "load")), ("light", 390): few}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    runs = tmp_path_factory.mktemp("product") / "runs"
    runs.mkdir()
    (runs / "damaged").mkdir()
    (runs / "damaged" / "run.json").write_text('{"schema')
    with served(runs) as url:
        yield url


def opened(browser: Browser | BrowserContext, address: str, page: str) -> Page:
    """A page at rest, wide where the context does not say otherwise."""
    it = browser.new_page(viewport={"width": 1280, "height": 900}) if isinstance(browser, Browser) else browser.new_page()
    it.set_default_timeout(60_000)
    it.goto(f"{address}/{page}")
    it.get_by_test_id("stMainBlockContainer").locator("h1").first.wait_for()
    rest(it)
    return it


@pytest.mark.parametrize(("theme", "width"), LOOKS)
def test_axe_finds_nothing_worse_than_minor_and_nothing_runs_over(browser: Browser, address: str, theme: Any, width: int) -> None:
    """Every page light and wide, and dark and narrow; two of them the other way round: colours and widths do not depend on each other.

    What axe calls minor is left out: the one such is the role of Streamlit's own file uploader.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    bad = {}
    for page in LOOKS[theme, width]:
        it = opened(context, address, "" if page == "overview" else page)
        still(it)  # text that fades in has too little contrast
        found = [
            (v["impact"], v["id"], [n["html"][:200] for n in v["nodes"]])
            for v in Axe().run(it).response["violations"]
            if v["impact"] != "minor"
        ]
        over = it.get_by_test_id("stMain").evaluate("e => e.scrollWidth - e.clientWidth")
        it.close()
        if found or over > 0:
            bad[page] = found, over
    context.close()
    assert bad == {}


def test_the_tour_goes_through_five_pages_and_closes(browser: Browser, address: str) -> None:
    page = opened(browser, address, "")
    expect(page.locator(".st-key-tour")).to_have_count(0)
    page.get_by_text("New here? Take the tour").click()
    for step, where in enumerate(("tokens", "load", "expert", "capacity", "runs"), start=1):
        expect(page.locator(".st-key-tour")).to_contain_text(f"Tour, {step} of 5")
        page.wait_for_url(lambda url, w=where, s=step: f"/{w}?" in url and f"tour={s}" in url)
        rest(page)
        if step < 5:
            page.get_by_role("button", name="Next →").click()
    page.get_by_role("link", name="← Back").click()
    expect(page.locator(".st-key-tour")).to_contain_text("Tour, 4 of 5")
    page.get_by_role("button", name="Close the tour").click()
    expect(page.locator(".st-key-tour")).to_have_count(0)
    page.wait_for_url(lambda url: "tour=" not in url)
    page.close()


def test_an_expert_is_found_by_typing(browser: Browser, address: str) -> None:
    page = opened(browser, address, "expert?run=demo-run")
    box = page.get_by_role("textbox", name="Go to", exact=True)
    box.fill("L3 E5")
    box.press("Enter")
    expect(page.get_by_role("heading", name="Layer 3, expert 5")).to_be_visible()
    page.wait_for_url(lambda url: "layer=layer+3" in url and "expert=5" in url)
    box.fill("L99 E5")
    box.press("Enter")
    expect(page.get_by_text("names no single expert")).to_be_visible()
    page.close()


def test_find_in_the_strip_counts_and_steps(browser: Browser, address: str) -> None:
    page = opened(browser, address, "tokens?run=demo-run")
    box, told = page.locator(".find"), page.locator(".count")
    box.fill("sqlite")
    expect(told).to_contain_text("1 of ")
    first = page.locator(".token.at").first.get_attribute("data-at")
    box.press("Enter")
    expect(told).to_contain_text("2 of ")
    assert page.locator(".token.at").first.get_attribute("data-at") != first
    box.press("Shift+Enter")
    expect(told).to_contain_text("1 of ")
    box.fill("no such token here")
    expect(told).to_have_text("no token has it")
    page.close()


def test_a_damaged_run_is_listed_as_such_and_can_be_deleted(browser: Browser, address: str) -> None:
    page = opened(browser, address, "runs")
    expect(page.get_by_role("combobox", name="Run to delete")).to_have_value("damaged")
    page.close()


def test_singular_and_plural() -> None:
    from app.text import counted

    assert [counted(n, "token") for n in (0, 1, 2_300)] == ["0 tokens", "1 token", "2,300 tokens"]
    assert counted(2, "entry", "entries") == "2 entries"
