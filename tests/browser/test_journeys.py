"""One way through the app for each kind of user, in real Chromium; what they came for is compared with what ``analysis`` answers.

The page that walks them (conftest.py) counts console errors, failed requests and requests to other hosts: none of each.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, expect

from analysis import __version__, expert_capacity
from analysis.balance import relative_load
from analysis.capacity import capacity_curves, pool_curves, shuffled_curves
from analysis.capacity_answer import drops_in_words, mean_curves, range_in_words, shuffle_shares
from analysis.cards import expert_card
from analysis.findings import first_finding
from analysis.glossary import GLOSSARY
from analysis.overflow import FACTORS
from analysis.passages import passages
from analysis.slots import PRESETS
from analysis.specialization import by_label
from analysis.stability import maxvio_table
from analysis.store import open_run
from analysis.token_classes import prose_example
from analysis.trace import Trace
from tests.test_report import opened

from .acts import choose, open_figures, rest, save, taken, unfold
from .conftest import watched
from .served import served
from .test_figures import SVG, chunks, told_by

TEXT = "A letter from the harbour, opened in winter.\n" + 6 * (
    "The river was high that spring, and the children were told to keep away from it.\ndef area(width, height):\n    return width * height\n"
    "La pluie tombe depuis ce matin sur les toits de la ville.\nSELECT name FROM users WHERE age > 30;\n"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journeys") / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with served(runs) as url:
        yield url


@pytest.fixture(scope="module")
def run() -> Trace:
    return open_run("data/demo-run")


def told(page: Page) -> str:
    """All text of the page at rest, in one line."""
    rest(page)
    return " ".join(page.get_by_test_id("stMainBlockContainer").inner_text().split())


def view(page: Page) -> tuple[list[str], list[str]]:
    """What the page at rest says, and what is chosen on it."""
    rest(page)
    said = page.get_by_test_id("stMainBlockContainer").locator("h1, h2, [data-testid=stCaptionContainer]").all_inner_texts()
    return said, [box.input_value() for box in page.get_by_role("combobox").all()]


def table(page: Page, at: int) -> list[list[float | str]]:
    """The rows of a table as a screen reader is told them."""
    grid = page.get_by_test_id("stDataFrame").nth(at)
    grid.scroll_into_view_if_needed()
    grid.locator("tbody tr").first.wait_for(state="attached")
    return [[number(cell) for cell in row.locator("td").all_text_contents()] for row in grid.locator("tbody tr").all()]


def number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def test_a_newcomer_takes_the_tour_and_plays_with_capacity(page: Page, address: str, run: Trace) -> None:
    """What does a router do, does an expert really "do" Chinese, and what is capacity?"""
    last, finding = run.layers[-1], first_finding(run)
    assert finding is not None
    page.goto(address)
    expect(page.get_by_role("heading", name=finding.claim)).to_be_visible()
    page.get_by_text("New here? Take the tour").click()
    tour = page.locator(".st-key-tour")

    expect(tour).to_contain_text("Tour, 1 of 5")
    document, position = prose_example(run)
    at = run.document_range(document)[0] + position
    word = run.tokens["token"][at].as_py()
    assert run.documents["label"][document].as_py() == "english" and word.strip().isalpha()
    expect(tour).to_contain_text(f"“{word}” went to")
    first = run.routing(last.index, at, at + 1)
    for expert, weight in zip(first.experts[0], first.weights[0], strict=True):
        expect(tour).to_contain_text(f"expert {expert}")
        expect(tour).to_contain_text(f"{weight:.0%}")
    expect(page.locator(f".token.chosen[data-at='{position}']")).to_have_count(1)
    page.locator(".text .token[data-at='7']").click()
    expect(page.get_by_role("heading", name="Token 7:")).to_be_visible()
    start = run.document_range(document)[0]
    seventh = run.routing(last.index, start + 7, start + 8)
    most = int(seventh.experts[0, seventh.weights[0].argmax()])
    expect(page.locator(".hover")).to_contain_text(f"at {last.title}: expert {most} ({seventh.weights.max():.3f})")

    tour.get_by_role("button", name="Next →").click()
    expect(tour).to_contain_text("Tour, 2 of 5")
    busiest = max(relative_load(run.stats.load(x.index)).max() for x in run.layers)
    expect(tour).to_contain_text(f"gets {busiest:.2f} times; n = {run.stats.n_tokens(0):,} tokens")
    tour.get_by_role("button", name="Next →").click()
    expect(tour).to_contain_text("Tour, 3 of 5")
    expect(tour).to_contain_text(finding.claim)
    card = expert_card(run, finding.site, finding.expert)
    expect(page.get_by_role("heading", name=card.description)).to_be_visible()
    tour.get_by_role("button", name="Next →").click()
    expect(tour).to_contain_text("Tour, 4 of 5")
    slots = expert_capacity(tokens=1_024, n_experts=last.n_experts, top_k=last.top_k, factor=1.25)
    expect(tour).to_contain_text(f"1.25 gives {slots:,}")
    expect(page.get_by_role("combobox", name="Tokens per batch")).to_have_value("1,024")  # the page below speaks of the same batches
    expect(page.get_by_text(f"{slots:,} slots per expert")).to_be_visible()
    expect(page.get_by_text("each expert gets 2 slots")).to_be_visible()  # the lesson is open
    tour.get_by_role("button", name="Next →").click()
    expect(tour).to_contain_text("Tour, 5 of 5")
    expect(page.get_by_role("button", name="Record", exact=True)).to_be_visible()
    expect(tour.get_by_role("button", name="Next →")).to_have_count(0)
    expect(page.get_by_role("checkbox", name="Each paragraph is a text of its own")).to_be_checked()

    page.get_by_role("link", name="Capacity", exact=True).click()
    expect(tour).to_have_count(0)
    page.get_by_text("How it works: six tokens").click()
    wanted = (3, 2, 1)  # tokens that want each expert in the lesson
    for factor in (1.0, 1.5, 0.5):
        slots = expert_capacity(tokens=6, n_experts=3, top_k=1, factor=factor)
        kept = sum(min(n, slots) for n in wanted)
        page.get_by_test_id("stButtonGroup").filter(has_text="Factor in this lesson").get_by_text(f"{factor:g}", exact=True).click()
        expect(page.get_by_text(f"each expert gets {slots} slots. {6 - kept} of 6 tokens find")).to_be_visible()
        expect(page.get_by_text(f"{3 * slots - kept} of {3 * slots} slots stay empty")).to_be_visible()


def test_a_pretraining_engineer_asks_what_factor_is_needed(page: Page, browser: Browser, address: str, run: Trace) -> None:
    """Is load even, from batch to batch too, and which capacity factor drops less than 1 %? The answer as a file and as a link."""
    page.goto(f"{address}/load")
    relative = [relative_load(run.stats.load(x.index)) for x in run.layers]
    worst = int(np.argmax([r.max() for r in relative]))
    claim = f"{run.layers[worst].title.capitalize()} has the busiest expert of all: expert {relative[worst].argmax()} gets {relative[worst].max():.2f} times"
    expect(page.get_by_role("heading", name=claim)).to_be_visible()
    choose(page, "A batch is", "4,096 tokens")
    for order, mixed in (("documents shuffled (seed 0)", 0), ("documents as recorded", None)):
        choose(page, "Filled with", order)
        rows = maxvio_table(run, 4_096, mixed).to_pylist()
        most = max(rows, key=lambda r: r["spread"])
        said = f"{run.layers[most['site']].title.capitalize()} varies most: the standard deviation of its MaxVio over {most['batches']} batches is {most['spread']:.2f};"
        expect(page.get_by_text(said)).to_be_visible()
    expect(page).to_have_url(re.compile("batch=4096.*filled=recorded"))

    page.get_by_role("link", name="Capacity", exact=True).click()
    unfold(page, "Change the assumptions")
    choose(page, "Capacity as in", PRESETS["switch"].title)
    choose(page, "Documents per batch", "64")
    each = shuffled_curves(run, range(20), FACTORS, PRESETS["switch"].policy, "documents", size=64, preset="switch")
    curves = pa.concat_tables([table for _, table in each])
    pooled = pool_curves(mean_curves(curves))
    now = next(r for r in pooled.to_pylist() if r["factor"] == 1.25)
    answer = drops_in_words(now, 1.25, " over all layers", now["chance_dropped_share"])
    expect(page.get_by_role("heading", name=f"{answer}.")).to_be_visible()
    expect(page.get_by_text(f"; {range_in_words(shuffle_shares(curves, 1.25))};")).to_be_visible()
    least = min(r["factor"] for r in pooled.to_pylist() if r["dropped_share"] <= 0.01)
    expect(page.get_by_text(f"To drop 1% or less: CF {least:g} pooled")).to_be_visible()

    name, data = save(page, "CSV")
    assert name == "demo-run-curves.csv"
    rows = [r for r in pa_csv.read_csv(io.BytesIO(data)).to_pylist() if r["factor"] == 1.25]
    assert len(rows) == 20 * len(run.layers)
    assert sum(r["dropped"] for r in rows) / sum(r["assignments"] for r in rows) == pytest.approx(now["dropped_share"], abs=1e-12)

    with watched(browser, address) as other:  # a colleague's browser, which has seen nothing of this
        other.goto(page.url)
        expect(other.get_by_role("heading", name=f"{answer}.")).to_be_visible()
        expect(other.get_by_role("combobox", name="Capacity as in")).to_have_value(PRESETS["switch"].title)
        assert view(other) == view(page)


def test_a_serving_engineer_takes_the_decisions_home(page: Page, address: str, run: Trace, tmp_path: Path) -> None:
    """How skewed is each layer, what would a limit per document cost, what does the model weigh; and every decision as Parquet."""
    page.goto(f"{address}/load")
    for layer in (run.layers[0], run.layers[3]):
        choose(page, "Layer", layer.title)
        expect(
            page.get_by_role("heading", name=f"{layer.title.capitalize()}: {layer.n_experts} experts, top-{layer.top_k}")
        ).to_be_visible()
        expect(
            page.get_by_text(f"n = {run.stats.n_tokens(layer.index):,} tokens, {run.stats.load(layer.index).sum():,} assignments.")
        ).to_be_visible()
    name, data = save(page, "CSV")
    load = {(r["layer"], r["expert"]): r for r in pa_csv.read_csv(io.BytesIO(data)).to_pylist()}
    assert name == "demo-run-load.csv" and len(load) == sum(x.n_experts for x in run.layers)
    skew = {x.layer: max(r["relative"] for (at, _), r in load.items() if at == x.layer) for x in run.layers}
    assert skew == {x.layer: pytest.approx(relative_load(run.stats.load(x.index)).max()) for x in run.layers}

    page.get_by_role("link", name="Capacity", exact=True).click()
    unfold(page, "Change the assumptions")
    for shown, scope in (("each document alone", "document"), ("the whole run at once", "run")):
        choose(page, "Routed together", shown)
        pooled = pool_curves(capacity_curves(run, FACTORS, PRESETS["megatron"].policy, scope, preset="megatron"))
        now = next(r for r in pooled.to_pylist() if r["factor"] == 1.25)
        answer = drops_in_words(now, 1.25, " over all layers", now["chance_dropped_share"])
        expect(page.get_by_role("heading", name=f"{answer}.")).to_be_visible()

    page.get_by_role("link", name="Model", exact=True).click()
    metric = page.get_by_test_id("stMetric")
    expect(metric.filter(has_text="Active per token")).to_contain_text(f"{run.model.active_parameters / 1e6:,.1f} M")
    expect(metric.filter(has_text="Share active")).to_contain_text(f"{run.model.active_parameters / run.model.parameters:.1%}")

    page.get_by_role("link", name="Runs", exact=True).click()
    choose(page, "Table", "decisions")
    name, data = save(page, "PARQUET")
    (tmp_path / name).write_bytes(data)
    rows, about = pq.read_table(tmp_path / name), json.loads(pq.read_schema(tmp_path / name).metadata[b"routerscope"])
    assert about["run"] == "demo-run" and len(rows) == sum(run.stats.n_tokens(x.index) for x in run.layers)
    for layer in run.layers:
        mine = rows.filter(np.equal(rows["site"].to_numpy(), layer.index))
        ids = np.concatenate([mine[f"expert_{i}"].to_numpy() for i in range(layer.top_k)])
        assert np.array_equal(np.bincount(ids, minlength=layer.n_experts), run.stats.load(layer.index))


def test_an_interpretability_researcher_follows_a_token_of_their_own_text(page: Page, address: str, runs: Path) -> None:
    """Paste, record, step through layers by key, find a token, look at its expert, and come back to where one was."""
    page.goto(f"{address}/runs")
    page.get_by_label("Text to route").fill(TEXT)
    page.get_by_label("Text to route").press("Control+Enter")
    page.get_by_label("Name of the run (optional)").fill("mine")
    page.get_by_label("Name of the run (optional)").press("Tab")
    rest(page)
    page.get_by_role("button", name="Record", exact=True).click()
    page.get_by_text("Open it on the Tokens page").click(timeout=120_000)
    spans = page.locator(".text .token")
    expect(spans.first).to_be_visible()
    run = open_run(runs / "mine")
    assert b"".join(run.tokens["token_bytes"].to_pylist()).decode() == TEXT
    texts = run.tokens["token"].to_pylist()

    word, found = next((w, i) for i, t in enumerate(texts) if len(w := t.strip().lower()) > 3 and sum(w in x.lower() for x in texts) == 1)
    page.locator(".find").fill(word)
    expect(page.locator(".count")).to_contain_text("1 of 1")
    assert page.locator(".token.at").first.get_attribute("data-at") == str(found)
    page.locator(".token.at").first.click()
    expect(page.get_by_role("heading", name=f"Token {found}:")).to_be_visible()
    page.locator(".strip .text").press("ArrowUp")
    page.locator(".strip .text").press("ArrowUp")
    layer = run.layers[-3]
    expect(page.locator(".title")).to_have_text(layer.title)
    routed = run.routing(layer.index, found, found + 1)
    expert = int(routed.experts[0, routed.weights[0].argmax()])
    expect(page.locator(".hover")).to_contain_text(f"at {layer.title}: expert {expert} ({routed.weights.max():.3f})")
    page.wait_for_url(lambda url: f"layer={layer.title.replace(' ', '+')}" in url and f"token={found}" in url)
    was = page.url

    page.get_by_role("link", name="Expert", exact=True).click()
    box = page.get_by_role("textbox", name="Go to", exact=True)
    box.wait_for()
    rest(page)
    box.fill(f"L{layer.layer} E{expert}")
    box.press("Enter")
    card = expert_card(run, layer.index, expert)
    expect(page.get_by_role("heading", name=f"Layer {layer.layer}, expert {expert}: {card.description}")).to_be_visible()
    rest(page)
    shown = passages(run, layer.index, expert)
    assert shown and page.locator(".strip.compact").count() == len(shown)
    for passage in shown:
        assert f"{passage.used} of {len(passage.texts)} tokens use it, gate weights sum to {passage.mass:.1f}" in told(page)
    grids = [table(page, i) for i in range(page.get_by_test_id("stDataFrame").count())]
    assert card.partners
    for others in (card.partners, card.sources, card.targets):
        told_first = [n for n in others if n.count][:8]
        rows = [[n.expert, n.lift, "not known", n.count, "not tested"] for n in told_first]  # one document says nothing about others
        assert not others or rows in grids

    for _ in range(4):  # the jump is one step back, the page another
        if page.url == was:
            break
        page.go_back()
        rest(page)
        page.wait_for_timeout(500)
    assert page.url == was
    expect(page.get_by_role("heading", name=f"Token {found}:")).to_be_visible()
    expect(page.locator(".title")).to_have_text(layer.title)
    expect(page.locator(f".token.chosen[data-at='{found}']").first).to_be_visible()


def test_a_paper_author_takes_a_figure_its_numbers_its_definition_and_the_report(
    page: Page, browser: Browser, address: str, run: Trace, tmp_path: Path
) -> None:
    """The same figure twice, exact, with definition, n and version on it; and the whole run as a file for the appendix."""
    page.goto(f"{address}/specialization?run=demo-run&layer=layer+5")
    found = by_label(run, 5)
    gap = np.where(found.significant, found.share - found.elsewhere, 0)
    first = gap.max(1).argmax()
    expect(
        page.get_by_role("heading", name=f"At layer 5, {found.groups[first]} goes above all to expert {gap[first].argmax()}, ")
    ).to_be_visible()
    open_figures(page, "single column, 3.3 in")
    name, svg = save(page, "SVG")
    root = ElementTree.fromstring(svg)
    about = json.loads(root.findtext(f"{SVG}metadata") or "")
    assert name == "demo-run-enrichment-by-label-layer_5.svg" and root.get("width") == "3.3in"
    n = f"{found.tokens.sum():,} tokens of {len(run.documents):,} documents"
    assert about["definition"].startswith("Experts of layer 5. Colour: the share") and about["n"] == n
    assert (about["run"], about["routerscope"], about["settings"]["layer"]) == ("demo-run", __version__, "layer 5")
    name, png = save(page, "PNG")
    assert name.endswith("layer_5.png") and int.from_bytes(chunks(png)[b"IHDR"][0][:4], "big") == 990  # 3.3 in at 300 dots per inch
    assert json.loads(told_by(png)["routerscope"]) == about
    cells = {}
    for kind, read in (("CSV", pa_csv.read_csv), ("PARQUET", pq.read_table)):
        rows = read(io.BytesIO(save(page, kind)[1])).to_pylist()
        cells[kind] = {(r["group"], r["expert"]): r["log2_enrichment"] for r in rows}
    i, j = found.groups.index("chinese"), 15
    assert len(cells["CSV"]) == found.count.size and cells["CSV"][("chinese", j)] == cells["PARQUET"][("chinese", j)] == pytest.approx(
        found.enrichment[i, j], rel=1e-6
    )

    entry = GLOSSARY["log2_enrichment"]
    with page.context.expect_page() as tab:
        page.get_by_role("link", name=entry.title, exact=True).click()
    expect(tab.value.get_by_role("heading", name=entry.title, exact=True)).to_be_visible()
    assert entry.definition[1:] in told(tab.value) and f"Source: {entry.source}." in told(tab.value)

    page.get_by_role("link", name="Overview", exact=True).click()
    name, report = taken(page, page.get_by_role("button", name="Save this run as one HTML file"))
    (tmp_path / name).write_bytes(report)
    finding = first_finding(run)
    assert finding is not None
    with opened(browser, tmp_path / name) as paper:  # which asserts that the file itself is the one request
        expect(paper.get_by_role("heading", name=finding.claim)).to_be_visible()
        expect(paper.locator(".js-plotly-plot").first).to_be_visible()
        expect(paper.get_by_text(f"Routerscope {__version__}").first).to_be_visible()
