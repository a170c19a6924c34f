"""What the tests in a real browser share: one page for each test, and a count of what went wrong in it that must stay at nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

VIEWS = ("tokens", "load", "capacity", "specialization", "expert", "model", "runs", "glossary")


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A wide page of a context of its own; ``address`` is the served app of the file of tests."""
    with watched(browser, address) as page:
        yield page


@contextmanager
def watched(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page in whose whole life nothing goes wrong: raises at the end of the block if anything did. ``options`` are the context's."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **options})
    troubles = watch(context, address)
    page = context.new_page()
    page.set_default_timeout(60_000)
    try:
        yield page
        assert page.evaluate("window.__pwn") is None
    finally:
        context.close()
    assert troubles == []


def watch(context: BrowserContext, address: str) -> list[str]:
    """What goes wrong in a context from now on, in words: errors in the console and of scripts, dialogs, requests to other hosts or by
    beacon, requests that failed. A request that the browser gave up because the page was left has not failed."""
    troubles: list[str] = []
    context.on("console", lambda m: troubles.append(f"console: {m.text}") if m.type == "error" and not probe(m.location["url"]) else None)
    context.on("weberror", lambda e: troubles.append(f"script: {e.error}"))
    context.on("dialog", lambda d: (troubles.append(f"dialog: {d.message}"), d.dismiss()))
    context.on("request", lambda r: troubles.append(f"foreign: {r.url}") if foreign(r.url, address) or "beacon" in r.url else None)
    context.on("requestfailed", lambda r: troubles.append(f"failed: {r.url} {r.failure}") if r.failure != "net::ERR_ABORTED" else None)
    context.on("page", lambda p: p.on("websocket", lambda w: troubles.append(f"foreign: {w.url}") if foreign(w.url, address) else None))
    context.on("response", lambda r: troubles.append(f"status {r.status}: {r.url}") if r.status >= 400 and not probe(r.url) else None)
    return troubles


def probe(url: str) -> bool:
    """Streamlit's own search for its base path: on a deep link it first asks below the page's path, and gets 404."""
    return urlparse(url).path in {f"/{v}/_stcore/{w}" for v in VIEWS for w in ("health", "host-config")}


def foreign(url: str, address: str) -> bool:
    return urlparse(url).scheme in ("http", "https", "ws", "wss") and urlparse(url).netloc != urlparse(address).netloc
