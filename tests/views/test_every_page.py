"""Every page over every kind of run, and what all of them have in common."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from analysis.capture import capture
from analysis.glossary import search
from analysis.trace import SiteRouting
from analysis.writing import RunWriter
from app.text import plain
from tests import tiny
from tests.families import FAMILIES
from tests.nasty import NASTY
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, card, make_part, site

from .pages import ROOT, shown, store

KINDS = {"plain": PLAIN, "many": MANY, "streams": TWO_STREAMS, "top1": (site(0, 8, 1),)}
CAPTURED = ("jetmoe", "longcat_flash", "zaya", "doge", "llama4")


def test_an_address_of_runs_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
    monkeypatch.chdir(ROOT)
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180).run()
    assert not test.exception and [e.value.replace("\\", "") for e in test.error] == [
        "ROUTERSCOPE_RUNS names an address, and the dashboard lists a folder: copy runs to one (python -m analysis copy)"
    ]


def test_an_unknown_run_in_the_link_is_said(runs: Path) -> None:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    test.query_params["run"] = "<b>gone</b>"
    test.run()
    assert any("which is not here" in e.value for e in test.error)


def test_demo_run_opens_first_with_a_finding(runs: Path) -> None:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180).run()
    assert test.selectbox(key="run").value == "demo-run"
    assert any("is used for" in m.value for m in test.markdown)
    assert any("n \\= " in c.value for c in test.caption)


@pytest.mark.parametrize("page", ["overview", "tokens", "load", "capacity", "specialization", "expert", "model", "runs", "glossary"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[1], [700, *[20] * len(NASTY)]], ids=["one token", "documents"])
def test_every_page_over_every_kind_of_run(runs: Path, page: str, kind: str, lengths: list[int]) -> None:
    store(runs / kind, KINDS[kind], lengths)
    test = shown(page, kind)
    assert not test.exception and test.title
    if page == "overview":
        assert test.metric[0].value == f"{sum(lengths) * len({x.stream for x in KINDS[kind]}):,}"
    assert_harmless(test)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tour_over_every_kind_of_run(runs: Path, kind: str) -> None:
    store(runs / kind, KINDS[kind], [1, *[20] * len(NASTY)])
    test = shown("overview", kind)
    for step, page in enumerate(("tokens", "load", "expert", "capacity", "runs"), 1):
        test.query_params["tour"] = str(step)
        test.switch_page(f"views/{page}.py")
        test.run()
        assert not test.exception and any(plain(f"Tour, {step} of 5:") in c.value for c in test.caption)
        assert_harmless(test)
    assert test.checkbox(key="paragraphs").value


@pytest.mark.parametrize("link", [{"by": "label"}, {"by": "class"}, {"by": "token"}, {"who": "label"}, {"who": "token"}, {"who": "text"},
                                  {"pieces": "label"}, {"token": "3", "doc": "2"}], ids=str)  # fmt: skip
def test_every_way_to_look_shows_hostile_text_as_text(runs: Path, link: dict[str, str]) -> None:
    page = {"by": "specialization", "who": "capacity", "pieces": "load", "token": "tokens"}[next(iter(link))]
    store(runs / "hostile", PLAIN, [20] * len(NASTY))
    test = shown(page, "hostile")
    test.query_params.update(link)
    test.run()
    assert not test.exception and all(test.query_params[k] in (v, [v]) for k, v in link.items())
    assert_harmless(test)


def assert_harmless(test: AppTest) -> None:
    """Nothing of the run's text is markup: in no Markdown, and in no string of a figure, which Plotly would read as HTML."""
    for element in [*test.markdown, *test.caption, *test.error, *test.info]:
        unescaped = re.sub(r"\\[!-/:-@\[-`{-~]", "", element.value)
        assert "![" not in unescaped and "<" not in unescaped
    for figure in test.get("plotly_chart"):
        found = re.findall(r"</?[A-Za-z!]\w*", json.dumps(json.loads(figure.proto.spec)))
        assert set(found) <= {"<br", "<extra", "</extra"}, found


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs captured from families with two sites per layer, special classes, product keys, one routed layer."""
    folder = tmp_path_factory.mktemp("captured")
    for family in CAPTURED:
        capture(
            FAMILIES[family].build(), tiny.tokenizer(), ["def f(x): return x", "Il pleut."], labels=["python", None], out=folder / family
        )
    return folder


@pytest.mark.parametrize("page", ["overview", "tokens", "load", "capacity", "runs"])
@pytest.mark.parametrize("family", CAPTURED)
def test_every_page_over_runs_of_departing_families(captured: Path, monkeypatch: pytest.MonkeyPatch, page: str, family: str) -> None:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(captured))
    monkeypatch.chdir(ROOT)
    test = shown(page, family)
    assert not test.exception and not test.error and test.title
    assert test.selectbox(key="run").value == family


@pytest.mark.parametrize("page", ["tokens", "load", "specialization", "expert"])
def test_the_layer_chosen_first_is_that_of_the_headline(runs: Path, page: str) -> None:
    part = make_part(PLAIN, [300] * 4)
    busy = part.routing[0].experts.copy()
    busy[::3] = [5, 6]
    with RunWriter.open(runs / "busy", card(PLAIN), {}) as writer:
        writer.write(replace(part, routing=(SiteRouting(busy, part.routing[0].weights, busy), part.routing[1])))
        writer.commit()
    assert shown(page, "busy").selectbox(key="layer").value == "layer 0"


def test_too_few_documents_are_a_headline_without_crosses_and_faded_bars(runs: Path) -> None:
    with RunWriter.open(runs / "few", card(PLAIN), {}) as writer:
        writer.write(make_part(PLAIN, [60] * 6, labels=("a", "b")))
        writer.commit()
    said = plain("Too few documents to tell: with 3 and 3 the smallest possible p is 0.10.")
    for page in ("specialization", "expert"):
        test = shown(page, "few")
        assert not test.exception and any(said in m.value for m in (*test.markdown, *test.caption))
        drawn = json.loads(test.get("plotly_chart")[0].proto.spec)["data"]
        assert len(drawn[1]["x"]) == 0 if page == "specialization" else set(drawn[0]["marker"]["opacity"]) == {1}


@pytest.mark.parametrize("page", ["load", "specialization", "expert"])
def test_numbers_lead_to_their_entries_in_the_glossary(runs: Path, page: str) -> None:
    found = [x for c in shown(page, "demo-run").caption for x in re.findall(r"\]\(glossary\?run=demo-run&term=(\w+)\)", c.value)]
    assert len(found) >= 4 and all(search(name)[0].name == name for name in found)
