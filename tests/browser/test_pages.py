"""The main job in real Chromium against the served app; every test also counts console errors and foreign requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, WebSocketRoute, expect
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from analysis.findings import first_finding
from analysis.specialization import by_label, seriation
from analysis.store import open_run
from analysis.writing import RunWriter
from app import palette
from app.report import report_html
from app.text import visible_token
from tests.nasty import NASTY
from tests.synthetic import PLAIN, card, make_part, site

from .acts import rest
from .conftest import watch
from .served import served


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "runs"
    folder.mkdir()
    with RunWriter.open(folder / "nasty", card(PLAIN, NASTY[1]), {}) as writer:
        writer.write(make_part(PLAIN, [400, *[8] * 80], texts=NASTY, labels=NASTY, names=NASTY, n_ids=len(NASTY)))
        writer.commit()
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with served(runs) as url:
        yield url


def download(page: Page) -> str:
    """Press CSV once the page has come to rest, and return the file's text."""
    page.locator("[data-test-script-state=notRunning]").wait_for()
    with page.expect_download() as got:
        page.get_by_role("button", name="CSV", exact=True).click()
    return Path(got.value.path()).read_text()


def test_the_page_of_these_tests_counts_each_kind_of_trouble(browser: Browser, address: str) -> None:
    context = browser.new_context()
    troubles, page = watch(context, address), context.new_page()
    page.goto("about:blank")
    with page.expect_websocket():
        page.evaluate("""async () => {
            await fetch("http://other.invalid/x").catch(() => 0);
            console.error("said");
            setTimeout(() => { throw new Error("thrown"); });
            alert("asked");
            try { new WebSocket("ws://other.invalid/y"); } catch {}
        }""")
    page.goto(f"{address}/_stcore/metrics")  # a closed route
    context.close()
    assert {t.split()[0].rstrip(":") for t in troubles} == {"foreign", "failed", "console", "script", "dialog", "status"}
    assert any("x" in t for t in troubles) and [t for t in troubles if t.startswith("foreign: ws")] == ["foreign: ws://other.invalid/y"]


def test_first_view(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.get_by_role("heading", name="What does this router do?")).to_be_visible()
    expect(page.get_by_role("heading", name="is used for")).to_be_visible()
    expect(page.locator(".js-plotly-plot .heatmaplayer image").first).to_be_visible()


def test_switch_layer_and_click_a_token(page: Page, address: str) -> None:
    page.goto(f"{address}/tokens?run=demo-run")
    text = page.locator(".text .token")
    expect(text.first).to_be_visible()
    page.get_by_role("button", name="previous layer").click()
    expect(page.locator(".title", has_text="layer 4")).to_be_visible()
    trace = open_run(Path("data/demo-run"))
    text.nth(3).click()
    expect(page.get_by_role("heading", name="Token 3:")).to_be_visible()
    best = trace.routing(4, 3, 4)
    top = int(best.experts[0, best.weights[0].argmax()])
    expect(page.locator(".hover")).to_contain_text(f"at layer 4: expert {top} (")
    page.locator(".strip .text").press("ArrowRight")
    expect(page.get_by_role("heading", name="Token 4:")).to_be_visible()


def test_overview_shows_the_finding_and_leads_to_the_token(page: Page, address: str) -> None:
    page.goto(address)
    strip = page.locator(".strip")
    expect(strip.locator("button.chip[aria-pressed=true]")).to_have_count(1)
    strip.locator(".token").nth(5).click()
    expect(page.get_by_role("heading", name="Token 5:")).to_be_visible()
    assert "doc=" in page.url and "token=5" in page.url
    expect(page.locator(".token.chosen")).to_have_count(1)


def test_a_link_opens_the_same_view_and_back_undoes(page: Page, address: str) -> None:
    page.goto(f"{address}/tokens?run=demo-run&layer=layer+2&doc=4&token=9")
    expect(page.locator(".title", has_text="layer 2")).to_be_visible()
    expect(page.get_by_role("heading", name="Token 9:")).to_be_visible()
    expect(page.locator(".token.chosen[data-at='9']")).to_have_count(1)
    page.locator(".token[data-at='3']").first.click()
    expect(page.get_by_role("heading", name="Token 3:")).to_be_visible()
    page.get_by_role("button", name="next layer").click()
    page.wait_for_url("**layer=layer+3**")
    expect(page.get_by_role("combobox", name="Layer")).to_have_value("layer 3")
    assert "doc=4" in page.url and "token=3" in page.url
    page.go_back()
    expect(page.locator(".title", has_text="layer 2")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("heading", name="Token 9:")).to_be_visible()
    expect(page.locator(".token.chosen[data-at='9']")).to_have_count(1)


@pytest.mark.parametrize(
    ("left_page", "path", "title"), [("Load", "load", "Who carries the load"), ("Overview", "", "What does this router do")]
)
def test_the_choices_of_a_page_that_was_left_do_not_come_into_the_address_of_the_next(
    page: Page, address: str, left_page: str, path: str, title: str
) -> None:
    """The words of a page from when it begins are held back until Back was pressed, and those of the page that was come back to until
    the browser has taken them in: what a busy machine does now and then."""
    held: list[bytes | str] | None = None
    armed, ended = False, False
    socket: WebSocketRoute | None = None

    def from_server(message: bytes | str) -> None:
        nonlocal held, ended
        assert socket is not None
        kind = ForwardMsg.FromString(message).WhichOneof("type") if isinstance(message, bytes) else ""
        if held is not None:
            held.append(message)
            ended |= kind == "script_finished"
            return
        socket.send(message)
        if armed and kind == "navigation":  # the address is that of the page asked for, nothing of it is drawn
            held = []

    def between(route: WebSocketRoute) -> None:
        nonlocal socket
        socket = route
        route.connect_to_server().on_message(from_server)

    page.route_web_socket(re.compile("stream"), between)
    page.goto(f"{address}/tokens?run=demo-run&layer=layer+2&doc=4&token=9")
    expect(page.get_by_role("heading", name="Token 9:")).to_be_visible()
    page.wait_for_url("**&map=expert**")  # what the page fills in by itself is in the address, too
    rest(page)
    before, armed = page.url, True
    page.get_by_role("link", name=left_page, exact=True).click()
    page.wait_for_url(re.compile(rf"^{address}/{path}(\?|$)"))
    while not ended:
        page.wait_for_timeout(100)
    left, held, armed = held, [], False
    page.go_back()
    page.wait_for_url("**/tokens**")
    assert socket is not None and left is not None
    for message in left:
        socket.send(message)
    expect(page.get_by_role("heading", name=title)).to_be_visible()
    page.wait_for_timeout(1_000)  # the last thing a page draws puts its choices into the address
    assert page.url == before
    later, held = held, None
    for message in later:
        socket.send(message)
    expect(page.get_by_role("heading", name="Token 9:")).to_be_visible()
    rest(page)
    assert page.url == before


def test_back_to_another_layer_leaves_one_strip_in_its_place(page: Page, address: str) -> None:
    page.goto(f"{address}/tokens?run=demo-run&layer=layer+2&doc=4")
    expect(page.locator(".title")).to_have_text("layer 2")
    rest(page)
    page.locator(".strip .text").press("ArrowDown")  # layer 0 is on top of every picture, so down is the next layer
    page.wait_for_url("**layer=layer+3**")
    rest(page)
    page.evaluate("""() => {
        window.__most = 0;
        const count = () => document.querySelectorAll("[class*=st-key-strip-room] [data-testid=stBidiComponentIsolated]").length;
        new MutationObserver(() => { window.__most = Math.max(window.__most, count()); }).observe(document, { childList: true, subtree: true });
    }""")
    page.go_back()
    expect(page.locator(".title")).to_have_text("layer 2")
    rest(page)
    page.locator(".strip .text").press("ArrowUp")
    page.wait_for_url("**layer=layer+1**")
    expect(page.get_by_role("combobox", name="Layer")).to_have_value("layer 1")
    rest(page)
    assert page.evaluate("window.__most") == 1


def test_an_expert_has_one_hue_wherever_it_is_shown(page: Page, address: str) -> None:
    trace = open_run(Path("data/demo-run"))
    hued = [palette.hued(trace.stats.load(x.index)) for x in trace.layers]

    def hue(layer: int, expert: int) -> str:
        return palette.EXPERTS[hued[layer].index(expert)] if expert in hued[layer] else palette.OTHER

    def chips(within: str) -> list[list[str]]:
        return page.locator(within).evaluate_all("all => all.map((e) => [e.textContent, e.style.getPropertyValue('--hue')])")

    for document in (4, 19):
        page.goto(f"{address}/tokens?run=demo-run&layer=layer+5&doc={document}&token=3")
        expect(page.locator(".hop")).to_have_count(len(trace.layers))
        shown = [[int(told.split()[1]), colour] for told, colour in chips(".legend button.chip")]
        assert len(shown) > 4 and shown == [[e, hue(5, e)] for e, _ in shown]
        wanted = []
        row = trace.document_range(document - 1)[0] + 3
        for layer in trace.layers:
            routing = trace.routing(layer.index, row, row + 1)
            pairs = sorted(zip(routing.weights[0].tolist(), routing.experts[0].tolist(), strict=True), reverse=True)
            wanted += [[f"expert {e} ({w:.0%})", hue(layer.index, e)] for w, e in pairs]
        assert chips(".path .chip") == wanted
    page.goto(address)
    alone = page.locator(".legend button.chip[aria-pressed=true]")
    expect(alone).to_have_count(1)
    finding = first_finding(trace)
    assert finding is not None and finding.expert not in hued[finding.site]
    assert chips(".legend button.chip[aria-pressed=true]")[0][1] == palette.PICKED
    alone.click()
    assert [[int(t.split()[1]), c] for t, c in chips(".legend button.chip") if t.startswith(f"expert {finding.expert} ")] == [
        [finding.expert, palette.OTHER]
    ]


LAST = "Take the glossary"  # the heading below the entries


def test_a_search_of_the_glossary_is_a_link_and_back_undoes_it(page: Page, address: str) -> None:
    page.goto(f"{address}/glossary?term=maxvio")
    expect(page.locator("h2")).to_have_text(["MaxVio", "MaxVio per document", LAST])
    page.get_by_role("textbox").first.fill("gini")
    page.get_by_role("textbox").first.press("Enter")
    expect(page.locator("h2")).to_have_text(["Gini", LAST])
    page.wait_for_url("**/glossary?*term=gini*")
    page.go_back()
    expect(page.locator("h2")).to_have_text(["MaxVio", "MaxVio per document", LAST])
    expect(page.get_by_role("textbox").first).to_have_value("maxvio")


def test_another_document_starts_without_a_token(page: Page, address: str) -> None:
    page.goto(f"{address}/tokens?run=demo-run&doc=4&token=9")
    expect(page.get_by_role("heading", name="Token 9:")).to_be_visible()
    choice = page.get_by_role("combobox", name="Document")
    choice.click()
    choice.press_sequentially("7 ·")
    page.get_by_role("option", name="7 · ").first.wait_for()
    choice.press("Enter")
    expect(page.get_by_role("heading", name="Token 9:")).to_have_count(0)
    page.wait_for_url(lambda url: "doc=7" in url and "token=" not in url)


def test_charts_follow_a_switch_of_theme(page: Page, address: str) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(f"{address}/load")
    for theme in ("light", "dark", "light"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_function(
            "even => document.querySelector('.js-plotly-plot')?.data?.[0].colorscale[3][1] === even", arg=palette.LOAD[theme][3]
        )


def test_layer_in_the_link_opens_that_layer(page: Page, address: str) -> None:
    page.goto(f"{address}/load?run=demo-run&layer=layer+2")
    expect(page.get_by_role("heading", name="Layer 2: 16 experts")).to_be_visible()
    assert download(page).count("\n") == 6 * 16 + 1


def test_capacity_from_the_lesson_to_the_text_and_the_file(page: Page, address: str) -> None:
    page.goto(f"{address}/capacity?run=demo-run&scope=document&cf=1")
    expect(page.get_by_role("heading", name="CF 1 drops")).to_be_visible()
    page.get_by_text("How it works: six tokens").click()
    expect(page.get_by_text("1 of 6 tokens")).to_be_visible()
    page.get_by_role("slider").first.press("ArrowRight")
    expect(page.get_by_role("heading", name="CF 1.05 drops")).to_be_visible()
    page.wait_for_url("**cf=1.05**")
    page.get_by_text("in the text", exact=True).click()
    expect(page.locator(".token.lost, .token.partly").first).to_be_visible()
    assert download(page).count("\n") == 6 * 76 + 1


def test_hostile_text_is_shown_exactly(page: Page, address: str, runs: Path) -> None:
    page.goto(f"{address}/tokens?run=nasty")
    expect(page.locator(".text .token").first).to_be_visible()
    rows = open_run(runs / "nasty").tokens.slice(0, 400).to_pylist()
    assert {r["token"] for r in rows} == set(NASTY)
    assert "".join(page.locator(".text .token").all_text_contents()) == "".join(visible_token(r["token"]) for r in rows)


@pytest.mark.parametrize("view", ["", "load?pieces=label", "capacity?who=label", "capacity?who=token", "specialization?by=label",
                                  "specialization?by=token", "expert", "model", "runs", "glossary"])  # fmt: skip
def test_hostile_text_does_nothing_on_any_page(page: Page, address: str, view: str) -> None:
    page.goto(f"{address}/{view}{'&' if '?' in view else '?'}run=nasty")
    page.get_by_test_id("stMainBlockContainer").locator("h1").wait_for()
    page.locator("[data-test-script-state=notRunning]").wait_for()
    assert page.locator(".stMain img[src='x'], .stMain iframe, .stMain svg[onload]").count() == 0  # the rest is the fixture's


def record(page: Page, name: str) -> None:
    page.get_by_label("Name of the run (optional)").fill(name)
    page.get_by_label("Name of the run (optional)").press("Tab")
    page.wait_for_timeout(600)
    page.get_by_role("button", name="Record", exact=True).click()
    expect(page.get_by_text("Open it on the Tokens page")).to_be_visible(timeout=120_000)


def test_paste_record_open_delete(page: Page, address: str, runs: Path) -> None:
    page.goto(f"{address}/runs")
    page.get_by_label("Text to route").fill("The king said: 选择 café.")
    page.get_by_label("Text to route").press("Control+Enter")
    record(page, "pasted")
    assert "".join(x.decode("latin-1") for x in open_run(runs / "pasted").tokens["token_bytes"].to_pylist()).encode("latin-1").decode() == (
        "The king said: 选择 café."
    )
    page.get_by_text("Open it on the Tokens page").click()
    expect(page.locator(".text .token").first).to_contain_text("The")
    page.goto(f"{address}/runs")
    choice = page.get_by_role("combobox", name="Run to delete")
    choice.click()
    choice.press_sequentially("pasted")
    page.get_by_role("option", name="pasted").wait_for()
    choice.press("Enter")
    page.get_by_text("Yes, delete this run").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(choice).to_have_value("nasty")
    assert not (runs / "pasted").exists()


@pytest.mark.parametrize(
    ("name", "content", "n"),
    [
        ("a.txt", "Hello there", 1),
        ("a.csv", "text,label\none two,x\nthree,y\n", 2),
        ("a.jsonl", json.dumps({"text": "uno", "label": "es"}), 1),
    ],
)
def test_upload_each_kind_of_file(page: Page, address: str, runs: Path, name: str, content: str, n: int) -> None:
    page.goto(f"{address}/runs")
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "text/plain", "buffer": content.encode()})
    expect(page.get_by_text(name)).to_be_visible()
    record(page, "up-" + name.replace(".", "-"))
    assert len(open_run(runs / ("up-" + name.replace(".", "-"))).documents) == n


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("b.txt", b"\xff\xfe\x00", "UTF-16"), ("b.csv", b"a,b\n1,2", "no text column"), ("b.jsonl", b"{", "not valid JSON"),
     ("c.txt", b"long " * 3_000, "the limit is 2,048")],
)  # fmt: skip
def test_bad_uploads_get_one_sentence(page: Page, address: str, name: str, content: bytes, message: str) -> None:
    page.goto(f"{address}/runs")
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "text/plain", "buffer": content})
    expect(page.get_by_text(name)).to_be_visible()
    page.wait_for_timeout(1_500)
    page.get_by_role("button", name="Record", exact=True).click()
    expect(page.get_by_text(message)).to_be_visible()
    expect(page.get_by_text(name).first).to_be_visible()


def test_two_tabs_do_not_mix(browser: Browser, address: str, runs: Path) -> None:
    tabs = [browser.new_context().new_page() for _ in range(2)]
    for i, tab in enumerate(tabs):
        tab.goto(f"{address}/runs")
        tab.get_by_label("Text to route").fill(f"only in tab {i}")
        tab.get_by_label("Text to route").press("Control+Enter")
        tab.get_by_label("Name of the run (optional)").fill(f"tab-{i}")
        tab.get_by_label("Name of the run (optional)").press("Tab")
        tab.wait_for_timeout(800)
    for tab in tabs:
        tab.get_by_role("button", name="Record", exact=True).click()
    for i, tab in enumerate(tabs):
        expect(tab.get_by_text("Open it on the Tokens page")).to_be_visible(timeout=120_000)
        assert f"run=tab-{i}" in (tab.get_by_role("link", name="Open it on the Tokens page").get_attribute("href") or "")
        assert "".join(open_run(runs / f"tab-{i}").tokens["token"].to_pylist()) == f"only in tab {i}"
        tab.context.close()


def test_the_whole_run_as_one_file(page: Page, address: str, runs: Path) -> None:
    page.goto(f"{address}/?run=nasty")
    page.locator("[data-test-script-state=notRunning]").wait_for()
    with page.expect_download() as got:
        page.get_by_role("button", name="Save this run as one HTML file").click()
    assert got.value.suggested_filename == "nasty-report.html"
    assert Path(got.value.path()).read_text(encoding="utf-8") == report_html(open_run(runs / "nasty"))


@pytest.mark.parametrize("view", ["", "load", "tokens"])
def test_a_cell_of_a_load_map_leads_to_its_expert(page: Page, address: str, view: str) -> None:
    page.goto(f"{address}/{view}?run=demo-run")
    figure = page.locator(".js-plotly-plot").filter(has=page.locator(".cbaxis")).last
    figure.scroll_into_view_if_needed()
    area = figure.locator(".nsewdrag").first.bounding_box()
    assert area is not None
    page.mouse.click(area["x"] + area["width"] * 2.5 / 16, area["y"] + area["height"] * 1.5 / 6)  # expert 2 of layer 1
    expect(page.get_by_role("heading", name="Layer 1, expert 2:")).to_be_visible()
    rest(page)  # the address follows when all is counted
    assert "layer=layer+1" in page.url and "expert=2" in page.url


def test_a_map_of_more_cells_than_are_drawn_one_by_one_is_seen_and_leads_on(page: Page, address: str, runs: Path) -> None:
    """The page's policy forbids what WebGL needs: Plotly then lays a grey box over the whole figure."""
    layers = tuple(site(i, 32, 2) for i in range(33))
    with RunWriter.open(runs / "deep", card(layers), {}) as writer:
        writer.write(make_part(layers, [20] * 6))
        writer.commit()
    page.goto(f"{address}/load?run=deep")
    figure = page.locator(".js-plotly-plot").filter(has=page.locator(".cbaxis")).first
    expect(figure.locator(".heatmaplayer image")).to_have_count(1)
    area = figure.locator(".nsewdrag").first.bounding_box()
    assert area is not None and page.locator(".no-webgl").count() == 0
    page.mouse.click(area["x"] + area["width"] * 20.5 / 32, area["y"] + area["height"] * 4.5 / 33)
    expect(page.get_by_role("heading", name="Layer 4, expert 20:")).to_be_visible()


def test_a_cell_of_the_specialization_map_takes_its_label_along_and_a_passage_leads_to_its_tokens(page: Page, address: str) -> None:
    found = by_label(open_run("data/demo-run"), 5)
    groups, experts = (x.tolist() for x in seriation(found.enrichment))
    row, column = groups.index(found.groups.index("chinese")), experts.index(15)
    page.goto(f"{address}/specialization?run=demo-run&layer=layer+5")
    figure = page.locator(".js-plotly-plot").filter(has=page.locator(".cbaxis")).first
    area = figure.locator(".nsewdrag").first.bounding_box()
    assert area is not None
    page.mouse.click(area["x"] + area["width"] * (column + 0.5) / len(experts), area["y"] + area["height"] * (row + 0.5) / len(groups))
    expect(page.get_by_text("documents of chinese where it weighs most")).to_be_visible(timeout=60_000)
    assert "layer=layer+5" in page.url and "expert=15" in page.url and "of=label-chinese" in page.url
    page.get_by_text("See it on the Tokens page").first.click()
    expect(page.get_by_role("heading", name=re.compile(r"^Token \d+:"))).to_be_visible(timeout=60_000)
    assert "layer=layer+5" in page.url and "doc=" in page.url and "token=" in page.url
