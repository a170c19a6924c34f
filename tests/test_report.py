"""The report: one file, drawn in a real browser without a request, and nothing hostile in a run does anything in it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from analysis import __version__, open_run
from analysis.__main__ import main
from analysis.findings import first_finding
from analysis.trace import LayerInfo, Part, SiteRouting, Trace
from app import palette, text
from app.report import report_html, write_report
from app.strip_data import first_text

from .nasty import NASTY
from .synthetic import MANY, PLAIN, TWO_STREAMS, card, make_part, make_trace, site

DEMO = Path(__file__).parent.parent / "data" / "demo-run"
FIGURES = ("load-map", "capacity", "labels", "information")
FIRST, SECOND = NASTY[1], NASTY[4]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(open_run(DEMO), path)
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "report.html"
    write_report(hostile_trace(), path)
    return path


def hostile_part() -> Part:
    """Hostile tokens and labels; at layer 0 the first label goes to experts 0 and 1 alone."""
    part = make_part(PLAIN, [100] * 12, labels=[FIRST, SECOND], texts=NASTY, n_ids=len(NASTY))
    mine = np.array([label == FIRST for label in part.tokens["label"].to_pylist()])
    other = np.where(part.routing[0].experts[:, :1] % 2, 2, 4) + np.arange(2)
    planted = np.where(mine[:, None], np.arange(2), other).astype(part.routing[0].experts.dtype)
    return replace(part, routing=(SiteRouting(planted, part.routing[0].weights, planted), *part.routing[1:]))


def hostile_trace() -> Trace:
    """The same with hostile names, notes and warnings."""
    layers = tuple(replace(x, note=FIRST) for x in PLAIN)
    model = replace(card(layers, FIRST), architecture=SECOND, digest=FIRST, warnings=(SECOND, "\ud800"))
    return replace(make_trace(layers, [hostile_part()], name=FIRST), model=model, options={"created": SECOND})


@contextmanager
def opened(browser: Browser, path: Path, **options: object) -> Iterator[Page]:
    """The file in a page of its own; at the end: one request, for the file itself, no error, nothing executed."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **options)  # type: ignore[arg-type]
    page = context.new_page()
    requests, troubles = [], []
    page.on("request", lambda r: requests.append(r.url) if not r.url.startswith(("data:", "blob:")) else None)
    page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: troubles.append(str(e)))
    page.on("dialog", lambda d: (troubles.append(d.message), d.dismiss()))
    page.goto(path.as_uri())
    yield page
    pwned = page.evaluate("window.__pwn")
    context.close()
    assert (pwned, troubles, requests) == (None, [], [path.as_uri()])


def test_the_demo_report_is_small_and_drawn_from_disk(browser: Browser, demo: Path) -> None:
    assert demo.stat().st_size < 5e6
    with opened(browser, demo) as page:
        expect(page.get_by_role("heading", level=2)).to_have_count(7)
        for name in ("load-map", "labels"):
            expect(page.locator(f"#figure-{name} .heatmaplayer image")).to_be_visible()
        assert page.locator("#figure-capacity .scatterlayer .js-line").count() >= 3
        expect(page.locator("#figure-information .barlayer .point")).to_have_count(2 * len(open_run(DEMO).layers))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_strip_steps_through_the_layers(browser: Browser, demo: Path) -> None:
    trace = open_run(DEMO)
    with opened(browser, demo) as page:
        token = page.locator("#strip .token").first
        page.locator(".legend .chip[aria-pressed=true]").click()  # all experts, not the finding's alone
        seen = []
        for layer in reversed(trace.layers):
            expect(page.locator("#strip .title")).to_have_text(layer.title)
            token.hover()
            seen.append(page.locator("#strip .hover").inner_text())
            page.get_by_role("button", name="previous layer").click()
        finding = first_finding(trace)
        assert finding is not None
        row, _ = trace.document_range(first_text(trace, finding).document["document"], "decoder")
        for told, layer in zip(seen, reversed(trace.layers), strict=True):
            routing = trace.routing(layer.index, row, row + 1)
            best = int(routing.experts[0][routing.weights[0].argmax()])
            assert f"at {layer.title}: expert {best} (" in told


def test_dark_and_light(browser: Browser, demo: Path) -> None:
    with opened(browser, demo, color_scheme="dark") as page:
        expect(page.locator("#figure-load-map .heatmaplayer image")).to_be_visible()
        drawn = "[getComputedStyle(document.body).backgroundColor, document.getElementById('figure-load-map').data[0].colorscale[3][1]]"
        assert page.evaluate(drawn) == ["rgb(20, 24, 29)", palette.LOAD["dark"][3]]
        page.emulate_media(color_scheme="light")
        for _ in range(100):  # not wait_for_function: it polls by eval, which the report's policy refuses
            if page.evaluate(drawn) == ["rgb(255, 255, 255)", palette.LOAD["light"][3]]:
                break
            page.wait_for_timeout(100)
        assert page.evaluate(drawn) == ["rgb(255, 255, 255)", palette.LOAD["light"][3]]


@pytest.mark.parametrize("kind, begins", [("SVG", b"<svg"), ("PNG", b"\x89PNG")])
def test_figures_are_saved_under_the_policy_with_what_they_are(browser: Browser, demo: Path, kind: str, begins: bytes) -> None:
    with opened(browser, demo) as page:
        figure = page.locator("#figure-load-map")
        figure.hover()
        with page.expect_download() as got:
            figure.locator(f".modebar-btn[data-title='Save as {kind}']").click()
        assert got.value.suggested_filename == f"demo-run-load-map.{kind.lower()}"
        content = Path(got.value.path()).read_bytes()
        assert content.startswith(begins)
        told = content.decode(errors="ignore")
        for what in ("48,616 tokens per layer", '"run":"demo-run"', f'"routerscope":"{__version__}"'):
            assert what in told.replace("&quot;", '"'), what
        assert figure.locator(".modebar-btn[data-title^=Download]").count() == 0


@pytest.mark.parametrize("bypass", [False, True], ids=["policy", "without the policy"])
def test_hostile_runs_do_nothing(browser: Browser, hostile: Path, bypass: bool) -> None:
    trace = hostile_trace()
    with opened(browser, hostile, bypass_csp=bypass) as page:
        expect(page.locator("#figure-labels .heatmaplayer image")).to_be_visible()
        assert page.title().startswith(FIRST) and FIRST in page.locator("h1").inner_text()
        claim = page.get_by_role("heading", level=2).first.inner_text()
        assert re.search(r"expert [01] is used for 100%", claim) and FIRST in claim  # the planted label made the finding
        shown = page.locator("#strip .token").all_text_contents()
        rows = trace.stream_tokens("decoder").slice(0, len(shown))
        assert len(shown) == 100 and shown == [text.visible_token(t) for t in rows["token"].to_pylist()]
        ticks = page.locator("#figure-labels .ytick text").all_text_contents()
        assert sorted(ticks) == sorted(text.visible_name(label)[:21] + "…" for label in (FIRST, SECOND))
        page.locator("#figure-labels .scatterlayer .point").last.hover(force=True)
        expect(page.locator("#figure-labels .hoverlayer")).to_contain_text("expert")
        assert page.locator("img, iframe, object, embed, a[href], [onerror], [onmouseover]").count() == 0
        assert page.locator("script").count() == 4  # data, plotly packed, the page's own, plotly as unpacked


def test_a_changed_script_does_not_run(browser: Browser, demo: Path, tmp_path: Path) -> None:
    bad = base64.b64encode(gzip.compress(b"window.__pwn = 1; window.Plotly = {}")).decode()
    changed = tmp_path / "changed.html"
    changed.write_text(re.sub(r'(id="plotly">)[^<]+', lambda m: m[1] + bad, demo.read_text()))
    page = browser.new_page()
    page.goto(changed.as_uri())
    expect(page.locator("#figure-load-map")).to_have_text(re.compile("cannot draw the figures"))
    assert page.evaluate("window.__pwn") is None and page.locator("#strip .token").count() > 50
    page.close()


KINDS: dict[str, tuple[tuple[LayerInfo, ...], list[int], list[str | None]]] = {
    "plain": (PLAIN, [30, 70], ["a", "b"]),
    "300 experts": (MANY, [30, 70], ["a", "b"]),
    "two streams": (TWO_STREAMS, [30, 70], ["a", None]),
    "top-1": ((site(0, 8, 1),), [30, 70], ["a", "b"]),
    "one token": (PLAIN, [1], ["a"]),
    "no labels": (PLAIN, [30, 70], [None]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bare", [False, True], ids=["tokens", "statistics alone"])
def test_every_kind_of_run(kind: str, bare: bool) -> None:
    layers, lengths, labels = KINDS[kind]
    trace = make_trace(layers, [make_part(layers, lengths, labels=labels)])
    page = report_html(replace(trace, source=None, load_tokens=None) if bare else trace)
    wanted = {"load-map"} | (set() if bare else {"capacity"}) | (set() if kind == "no labels" else {"labels", "information"})
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert set(data["figures"]) == wanted and (data["strip"] is None) == bare
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == len(wanted)
    for caption in captions:
        assert "n = " in caption and f"Run made-up; Routerscope {__version__}." in caption
    assert "nan" not in re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\{\{\w+\}\}", page)


def test_the_command(tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.html"
    assert main(["report", str(DEMO), "-o", str(target)]) == 0
    assert f"mine.html: {target.stat().st_size / 1e6:.1f} MB" in capsys.readouterr().out
    assert target.read_bytes() == demo.read_bytes() and target.stat().st_mode & 0o777 == 0o600  # the same run, the same file
    assert main(["report", str(tmp_path / "nothing"), "-o", str(target)]) == 2
    assert target.read_bytes() == demo.read_bytes() and list(tmp_path.iterdir()) == [target]
