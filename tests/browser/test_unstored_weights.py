"""The token strip of a run without gate weights: experts by falling weight, and not a number that was not stored."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import expect

from analysis.capture import capture
from analysis.store import open_run
from tests import tiny

from .conftest import watched
from .served import chromium, served


def test_the_strip_shows_experts_and_no_weights(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    capture(tiny.build("olmoe"), tiny.tokenizer(), ["now and then"], labels=["a"], out=runs / "bare", weights="none")
    trace = open_run(runs / "bare")
    with served(runs) as address, chromium() as browser, watched(browser, address) as page:
        page.goto(f"{address}/tokens?run=bare&token=2&layer=layer+1")
        hover = page.locator(".hover")
        chosen = ", ".join(f"expert {e}" for e in trace.experts(1)[2])
        expect(hover).to_have_text(f"token 2 “w” at layer 1: {chosen}", timeout=60_000)
        expect(page.locator(".path .here .chip")).to_have_text([f"expert {e}" for e in trace.experts(1)[2]])
