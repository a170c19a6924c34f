"""What a person does on a page of the app, in the words of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Locator, Page, TimeoutError, expect


def rest(page: Page) -> None:
    """Until the script of the page has ended."""
    page.locator("[data-test-script-state=notRunning]").first.wait_for()


def still(page: Page) -> None:
    """Until nothing fades or slides any more; what pulses for ever does not count."""
    page.evaluate("""() => Promise.all(document.getAnimations()
        .filter((a) => a.effect.getComputedTiming().endTime < Infinity).map((a) => a.finished.catch(() => {})))""")


@contextmanager
def rerun(page: Page, timeout: float = 60_000) -> Iterator[None]:
    """Around an act that the script answers: at the end of the block, until it has run once more. Asking whether it rests right after
    the act is too early: it may not have started. It has to rest before, too: a run that the act cuts short goes over into the next
    one without a word to the page."""
    rest(page)
    page.evaluate("""() => {
        const app = document.querySelector('[data-test-script-state]');
        window.__runs = 0;
        window.__watch?.disconnect();
        window.__watch = new MutationObserver(() => { if (app.dataset.testScriptState === 'running') window.__runs += 1; });
        window.__watch.observe(app, { attributes: true, attributeFilter: ['data-test-script-state'] });
    }""")
    yield
    page.wait_for_function("() => window.__runs > 0", timeout=timeout)
    rest(page)


def unfold(page: Page, name: str) -> None:
    """Open what is folded away under a name the address keeps: the script runs for it."""
    page.get_by_text(name).wait_for()
    with rerun(page):
        page.get_by_text(name).click()


def choose(page: Page, label: str, wanted: str) -> None:
    """Pick from a list by typing what it shows."""
    box = page.get_by_role("combobox", name=label, exact=True)
    box.wait_for()  # before the page's first run, too, nothing runs
    rest(page)
    if box.input_value() == wanted:
        return
    for again in (True, False):  # a page that is drawn anew meanwhile, for the theme or on a busy machine, closes the list: then once more
        box.click()
        box.press("Control+a")  # what was typed before, and not picked, may stand there as if it were
        box.press_sequentially(wanted)
        page.get_by_role("option", name=wanted).first.wait_for()
        try:
            with rerun(page, 15_000 if again else 60_000):
                box.press("Enter")
        except TimeoutError:
            if not again:
                raise
        else:
            break
    expect(box).to_have_value(wanted)


def taken(page: Page, button: Locator) -> tuple[str, bytes]:
    """The name and content of the file that a button gives, once the page has come to rest."""
    rest(page)
    with page.expect_download() as got:
        button.click()
    return got.value.suggested_filename, Path(got.value.path()).read_bytes()


def save(page: Page, kind: str) -> tuple[str, bytes]:
    """A file of the last row of the page that gives files of this kind."""
    return taken(page, page.get_by_role("button", name=kind, exact=True).last)


def open_figures(page: Page, size: str) -> None:
    """The row that gives the page's figures away, with a size chosen."""
    page.locator(".js-plotly-plot").first.wait_for()
    rest(page)
    page.get_by_text("Take the figures").click()
    expect(page.get_by_role("combobox", name="Size", exact=True)).to_be_visible()
    choose(page, "Size", size)
