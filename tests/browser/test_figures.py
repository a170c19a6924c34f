"""Figures as files in real Chromium: their size, their metadata read back, and nothing hostile in them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import parse_qs, urlparse
from xml.etree import ElementTree

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from analysis import __version__
from analysis.writing import RunWriter
from app import charts
from tests.synthetic import PLAIN
from tests.test_report import FIRST, hostile_part, hostile_trace

from .acts import choose, open_figures, rerun, rest, save
from .conftest import watched
from .served import served

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    runs = tmp_path_factory.mktemp("figures") / "runs"
    runs.mkdir()
    with RunWriter.open(runs / "nasty", replace(hostile_trace().model, warnings=()), {}) as writer:
        writer.write(hostile_part())
        writer.commit()
    with served(runs) as url:
        yield url


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """On a dark page, whose figures go to light paper."""
    with watched(browser, address, color_scheme="dark") as page:
        yield page


def chunks(png: bytes) -> dict[bytes, list[bytes]]:
    """The chunks of a PNG by type, every checksum checked."""
    found: dict[bytes, list[bytes]] = {}
    at = 8
    while at < len(png):
        n, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        content = png[at + 8 : at + 8 + n]
        assert zlib.crc32(kind + content) == int.from_bytes(png[at + 8 + n : at + 12 + n], "big")
        found.setdefault(kind, []).append(content)
        at += 12 + n
    return found


def told_by(png: bytes) -> dict[str, str]:
    pairs = [content.split(b"\0\0\0\0\0", 1) for content in chunks(png)[b"iTXt"]]
    return {key.decode(): text.decode() for key, text in pairs}


def test_a_hostile_run_leaves_as_svg_and_png_of_the_size_asked_for(page: Page, address: str) -> None:
    page.goto(f"{address}/?run=nasty")
    open_figures(page, "single column, 3.3 in")
    name, data = save(page, "SVG")
    root = ElementTree.fromstring(data)
    assert name == "nasty-load-map.svg" and root.get("width") == "3.3in" and root.get("viewBox", "").startswith("0 0 316.8 ")
    about = json.loads(root.findtext(f"{SVG}metadata") or "")
    assert about["run"] == "nasty" and about["n"] == "1,200 tokens per layer" and about["routerscope"] == __version__
    assert FIRST in about["definition"] and about["recorded"] and parse_qs(urlparse(about["url"]).query)["run"] == ["nasty"]
    desc = root.findtext(f"{SVG}desc") or ""
    assert FIRST in desc and "n = 1,200 tokens per layer" in desc and f"Routerscope {__version__}" in desc
    assert {e.tag for e in root.iter()}.isdisjoint({f"{SVG}{t}" for t in ("script", "a", "foreignObject", "image", "iframe")})
    assert not [k for e in root.iter() for k in e.attrib if k.startswith("on") or "href" in k]
    written = " ".join("".join(e.itertext()) for e in root.findall(f"{SVG}text"))
    assert written.replace(" ", "") == desc.replace(" ", "")  # the caption stands under the figure, whole
    assert len([e for e in root.iter(f"{SVG}rect") if e.get("fill", "").startswith("rgb(")]) == sum(
        x.n_experts for x in PLAIN
    )  # cells are shapes
    name, png = save(page, "PNG")
    header, told = chunks(png)[b"IHDR"][0], told_by(png)
    assert name == "nasty-load-map.png" and int.from_bytes(header[:4], "big") == 990  # 3.3 in at 300 dots per inch
    assert chunks(png)[b"pHYs"][0] == (11_811).to_bytes(4, "big") * 2 + b"\1"
    assert told["Description"] == desc and told["Software"] == f"Routerscope {__version__}" and json.loads(told["routerscope"]) == about
    page.set_content("<p>")
    page.evaluate("text => document.body.append(new DOMParser().parseFromString(text, 'image/svg+xml').documentElement)", data.decode())


def test_a_slide_without_its_caption_and_the_numbers_it_shows(page: Page, address: str) -> None:
    page.goto(f"{address}/load?run=nasty")
    open_figures(page, "slide, 1280 × 720")
    with rerun(page):
        page.get_by_text("Caption in the picture").click()
    choose(page, "Figure", "maxvio batch 1024")
    name, data = save(page, "SVG")
    root = ElementTree.fromstring(data)
    assert (name, root.get("width"), root.get("height")) == ("nasty-maxvio-batch-1024.svg", "1280", "720")
    assert root.findall(f"{SVG}text") == [] and "MaxVio" in (root.findtext(f"{SVG}desc") or "")
    size = chunks(save(page, "PNG")[1])[b"IHDR"][0][:8]
    assert (int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big")) == (1280, 720)
    name, rows = save(page, "CSV")
    assert name == "nasty-maxvio-batch-1024.csv" and rows.decode().splitlines()[0] == '"series","layer","maxvio","low","high"'


BOXES = """plot => Object.fromEntries(Object.entries({ numbers: '.xtick text', title: '.xtitle', bar: '.cbfills', said: '.annotation-text' })
    .map(([name, where]) => [name, [...plot.querySelectorAll(where)].map((e) => e.getBoundingClientRect().toJSON())]))"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_map_has_every_number_and_no_word_on_another(page: Page, address: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1_600})
    page.goto(f"{address}/specialization?run=demo-run")
    figure = page.locator(".st-key-cells-label .js-plotly-plot")
    figure.locator(".xtitle").wait_for()
    rest(page)
    page.wait_for_timeout(1_500)  # figures are painted after the script has ended
    boxes = figure.evaluate(BOXES)
    numbers, (title,), (bar,), (said,) = boxes["numbers"], boxes["title"], boxes["bar"], boxes["said"]
    assert len(numbers) == 16 and all(a["right"] <= b["left"] for a, b in zip(numbers, numbers[1:], strict=False))
    assert title["top"] >= max(n["bottom"] for n in numbers) and said["bottom"] <= bar["top"] + 1 and bar["right"] <= width


SHARES = np.array([0.0, 0.004, 0.015])
OF_SHARES = {
    "who pays": charts.share_bars(("a", "b", "c"), SHARES, np.arange(3), 0.01, "label"),
    "by layer": charts.layer_lines(["0", "1", "2"], [("same", SHARES, None)], "saturation"),
    "by factor": charts.overflow_curves(SHARES, SHARES[None], SHARES[None], np.stack([SHARES] * 3), 1.0),
}


@pytest.mark.parametrize("name", OF_SHARES)
def test_the_ticks_of_small_shares_say_where_they_stand(browser: Browser, name: str) -> None:
    page = browser.new_page()
    page.set_content(OF_SHARES[name].to_html(full_html=False))
    page.evaluate("Plotly.relayout(document.querySelector('.js-plotly-plot'), { 'yaxis.range': [0, 0.02] })")
    ticks = page.evaluate("[...document.querySelectorAll('.ytick text')].map((t) => [t.__data__.x, t.textContent])")
    page.close()
    assert len(ticks) > 2 and [said for at, said in ticks if float(said.removesuffix("%")) != pytest.approx(100 * at)] == []


def test_nothing_of_the_row_is_sent_before_it_is_opened(page: Page, address: str) -> None:
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if "plotly.min" in r.url else None)
    page.goto(f"{address}/load?run=demo-run")
    page.locator(".js-plotly-plot").first.wait_for()
    rest(page)
    assert (
        asked == []
        and page.get_by_role("button", name="SVG").count() == 0
        and page.locator(".modebar-btn[data-title^=Download]").count() == 0
    )
