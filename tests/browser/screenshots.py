"""Screenshots of every page, light and dark, wide and narrow: ``make screenshots``; docs/ shows the light wide ones."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page

from .served import chromium, served

PAGES = ("overview", "tokens", "load", "capacity", "specialization", "expert", "model", "runs", "glossary")
SIZES = {1280: 900, 390: 844}


def opened(browser: Browser, address: str, name: str, theme: str = "light", width: int = 1280) -> Page:
    """A page of the app that has come to rest; the caller closes it."""
    page = browser.new_page(viewport={"width": width, "height": SIZES[width]}, color_scheme=theme)
    page.goto(f"{address}/{'' if name == 'overview' else name}")
    page.get_by_test_id("stMainBlockContainer").locator("h1").first.wait_for(timeout=60_000)
    page.locator("[data-test-script-state=notRunning]").first.wait_for(timeout=120_000)
    page.wait_for_timeout(1_500)  # figures are painted after the script has ended
    return page


def take(folder: Path, wanted: list[str]) -> None:
    """Write PAGE-THEME-WIDTH.png for every combination below ``folder``; docs/pictures has PAGE-light-1280 as PAGE.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, served(Path(scratch) / "runs") as address, chromium() as browser:
        for name in wanted:
            for theme in ("light", "dark"):
                for width in SIZES:
                    page = opened(browser, address, name, theme, width)
                    page.screenshot(path=folder / f"{name}-{theme}-{width}.png")
                    if width == 1280:
                        page.get_by_test_id("stMain").evaluate("e => e.scrollTo(0, 700)")
                        page.wait_for_timeout(1_500)
                        page.screenshot(path=folder / f"{name}-{theme}-{width}-below.png")
                    page.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/screenshots"))
    parser.add_argument("pages", nargs="*", default=list(PAGES))
    arguments = parser.parse_args()
    take(arguments.out, arguments.pages)
