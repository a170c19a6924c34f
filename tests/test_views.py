"""Every page over several runs, without a browser: no exception, and what must be on screen is."""

import json
import re
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from analysis.capture import capture
from analysis.trace import LayerInfo
from analysis.writing import RunWriter

from . import tiny
from .families import FAMILIES
from .synthetic import MANY, PLAIN, TWO_STREAMS, card, make_part, site

ROOT = Path(__file__).parent.parent
NASTY = [
    "<script>alert(1)</script>",
    "![b](http://127.0.0.1:9/x)",
    "\u202eabc",
    "\0",
    "$x^2$",
    ":material/home:",
    "`",
    "</span>",
    "é选🎉",
    "",
]
CAPTURED = ("jetmoe", "longcat_flash", "zaya", "doge", "llama4")
KINDS = {"plain": PLAIN, "many": MANY, "streams": TWO_STREAMS, "top1": (site(0, 8, 1),)}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path


def store(folder: Path, layers: tuple[LayerInfo, ...], lengths: list[int]) -> None:
    with RunWriter.open(folder, card(layers, "<img src=x onerror=alert(1)>"), {}) as writer:
        writer.write(make_part(layers, lengths, texts=NASTY, labels=["![l](http://127.0.0.1:9/l)", None]))
        writer.commit()


def shown(page: str, run: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
    test.query_params["run"] = run
    test.run()
    if page != "overview":
        test.switch_page(f"views/{page}.py")
        test.run()
    return test


@pytest.mark.parametrize("page", ["overview", "tokens", "load", "capacity", "specialization", "expert", "model", "runs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[1], [30, 700]], ids=["one token", "documents"])
def test_every_page_over_every_kind_of_run(runs: Path, page: str, kind: str, lengths: list[int]) -> None:
    store(runs / kind, KINDS[kind], lengths)
    test = shown(page, kind)
    assert not test.exception and test.title
    if page == "overview":
        assert test.metric[0].value == f"{sum(lengths) * len({x.stream for x in KINDS[kind]}):,}"
    for element in [*test.markdown, *test.caption]:
        unescaped = re.sub(r"\\[!-/:-@\[-`{-~]", "", element.value)
        assert "![" not in unescaped and "<" not in unescaped


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_every_figure_is_saved_as_the_header_says_under_a_name_of_its_own(runs: Path, kind: str) -> None:
    store(runs / "mine", PLAIN, [30, 700])
    names = []
    for page in ("overview", "tokens", "load", "capacity", "specialization", "expert"):
        test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
        test.query_params.update({"run": "mine", "figure": kind})
        test.run()
        test.switch_page(f"views/{page}.py").run()
        figures = [json.loads(f.proto.config)["toImageButtonOptions"] for f in test.get("plotly_chart")]
        assert figures and {f["format"] for f in figures} == {kind} and test.query_params["figure"] in (kind, [kind])
        here = [f["filename"] for f in figures]
        assert len(set(here)) == len(here) and all(re.fullmatch(r"mine-[\w.-]+", n) for n in here)
        names += here
    assert len(names) >= 9 and "mine-load-map" in names


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


def test_demo_run_opens_first_with_a_finding(runs: Path) -> None:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30).run()
    assert test.selectbox(key="run").value == "demo-run"
    assert any("is used for" in m.value for m in test.markdown)
    assert any("n \\= " in c.value for c in test.caption)


def test_bad_prompts_get_a_sentence_and_stay(runs: Path) -> None:
    test = shown("runs", "demo-run")
    test.button(key="record").click().run()
    assert "Paste some text" in test.error[0].value
    test.text_area(key="pasted").set_value("kept text").run()
    test.text_input(key="run_name").set_value("Bad Name!").run()
    test.button(key="record").click().run()
    assert "run name" in test.error[0].value and test.text_area(key="pasted").value == "kept text"


def test_an_unknown_run_in_the_link_is_said(runs: Path) -> None:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
    test.query_params["run"] = "<b>gone</b>"
    test.run()
    assert any("not on this server" in e.value for e in test.error)


def test_capacity_answers_as_the_engine_does(runs: Path) -> None:
    from analysis.capacity import apply_capacity
    from analysis.store import open_run

    test = shown("capacity", "demo-run")
    for name, value in {"at": "layer 3", "preset": "megatron", "scope": "document", "cf": "1", "policy": "position"}.items():
        test.query_params[name] = value
    test.run()
    share = apply_capacity(open_run(ROOT / "data" / "demo-run"), 1.0, "position", "document", layers=[3]).summary()["dropped_share"]
    assert any(f"drops {100 * share:.1f}" in m.value.replace("\\", "") for m in test.markdown)
    assert test.select_slider(key="cf").value == "1"


def test_what_if_answers_from_the_example_and_starts_again_with_another(runs: Path) -> None:
    test = shown("model", "demo-run")
    assert [m.value for m in test.metric][-3:] == ["1,760.0 B", "440.0 B", "25.0%"]
    test.selectbox(key="experts").set_value("16").run()
    assert test.metric[-1].value == "12.5%" and any("no longer those of the example" in c.value for c in test.caption)
    test.selectbox(key="example").set_value("64x16b").run()
    assert [m.value for m in test.metric][-3:] == ["1,024.0 B", "128.0 B", "12.5%"]
