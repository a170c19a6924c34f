"""The Specialization page."""

import json
import re
from pathlib import Path

import pyarrow.compute as pc
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from analysis import jackknife, specialization, token_classes
from analysis.capture import capture
from analysis.jackknife import vocabulary_interval
from analysis.repetition import repetition
from analysis.specialization import by_label, by_position
from analysis.store import open_run
from analysis.token_classes import by_class
from analysis.token_use import document_use, leading_ids, top_tokens_of
from analysis.vocabulary import VARIANTS, context_independence, input_tokens
from app import charts, served_tokens
from app.captions import preferences_headline
from app.text import plain
from tests import tiny
from tests.synthetic import PLAIN

from .pages import ROOT, numbers_of, shown, store


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two checkpoints of a model over the same texts, and of one of them over others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    texts = ["def f(x): return x" * 3, "Il pleut." * 5, "选择文件 🎉 now"]
    for name, seed, mine in (("early", 0, texts), ("final", 1, texts), ("elsewhere", 1, [t.upper() + "." for t in texts])):
        model = tiny.build("olmoe", seed=seed)
        capture(model, tiny.tokenizer(), mine, labels=["code", "french", "chinese"], out=folder / name)
    return folder


def test_two_runs_are_compared_where_they_are_over_the_same_tokens(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analysis.paths import saturation

    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(checkpoints))
    monkeypatch.chdir(ROOT)
    test = shown("specialization", "early")
    test.segmented_control(key="by").set_value("runs").run()
    assert test.selectbox(key="vs").options == ["final"] and test.query_params["vs"] in ("final", ["final"])
    rows = saturation(open_run(checkpoints / "early"), open_run(checkpoints / "final")).to_pylist()
    least = min(rows, key=lambda r: r["saturation"])
    said = plain(f"agree least at layer {least['layer']}: of the experts a token is sent to, {least['saturation']:.0%} are")
    assert any(said in m.value for m in test.markdown) and not test.exception
    offered = [t.segmented_control(key="by").options for t in (test, shown("specialization", "elsewhere"))]
    assert ["two runs" in str(o) for o in offered] == [True, False]
    alone = shown("specialization", "elsewhere")
    alone.query_params["by"] = "runs"
    assert "No other run here is over the same tokens" in alone.run().error[0].value and not alone.exception


def test_every_layer_side_by_side_is_each_layers_own_map(runs: Path) -> None:
    test = shown("specialization", "demo-run")
    test.query_params["every_layer"] = "open"
    test.run()
    assert not test.exception
    [grid] = [f for f in test.session_state["_figures"] if f.name.endswith("every-layer")]
    trace = open_run(ROOT / "data" / "demo-run")
    found = [by_label(trace, x.index) for x in trace.layers]
    drawn = charts.rows(grid.figure)
    assert drawn.num_rows == sum(f.count.size for f in found) and pc.sum(drawn["significant"]).as_py() == sum(
        f.significant.sum() for f in found
    )
    assert [t.name for t in grid.figure.data] == [
        f"{x.title}: {int((f.significant & (f.lift >= 1.5)).any(0).sum())} of 16 experts" for x, f in zip(trace.layers, found, strict=True)
    ]
    assert "by label, every layer" in test.selectbox(key="table").options


@pytest.mark.parametrize("by", ["class", "position"])
def test_kinds_of_token_are_read_once(runs: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's decisions once, whatever is looked at next; the tokens' texts once for all layers side by side."""
    asked, texts, read, coded = [], [], specialization.one_pass, token_classes.class_codes
    for module in (specialization, token_classes):
        monkeypatch.setattr(module, "one_pass", lambda trace, site, *r, **options: asked.append(site) or read(trace, site, *r, **options))
    monkeypatch.setattr(token_classes, "class_codes", lambda *a: texts.append(a[1]) or coded(*a))
    st.cache_resource.clear()
    test = shown("specialization", "demo-run")
    test.query_params["by"] = by
    test.run()
    trace = open_run(ROOT / "data" / "demo-run")
    expected = {"class": by_class, "position": by_position}[by](trace, asked[0])
    said = plain(preferences_headline(expected, trace.layers[asked[0]]))
    assert not test.exception and any(said in m.value for m in test.markdown)
    del asked[1:], texts[:]
    test.query_params["every_layer"] = "open"
    test.run()
    assert not test.exception and sorted(asked) == [x.index for x in trace.layers]
    assert texts == {"class": ["decoder"], "position": []}[by]
    test.run()
    assert len(asked) == len(trace.layers)


def test_neighbouring_tokens_are_tested_where_they_can_be(runs: Path) -> None:
    store(runs / "one-token-each", PLAIN, [1, 1])
    for run in ("demo-run", "one-token-each"):
        test = shown("specialization", run)
        test.query_params.update({"by": "flow", "repeats": "open"})
        test.run()
        assert not test.exception
        assert any(plain("the run holds no document of two tokens") in c.value for c in test.caption) == (run != "demo-run")
        drawn = [f for f in test.session_state["_figures"] if f.key == "repetition"]
        assert len(drawn) == (run == "demo-run")
        if drawn:
            trace = open_run(ROOT / "data" / "demo-run")
            assert charts.rows(drawn[0].figure)["share"].to_pylist()[: len(trace.layers)] == [
                repetition(trace, x.index).first for x in trace.layers
            ]
            assert "repetition" in test.selectbox(key="table").options


@pytest.mark.parametrize("variant", VARIANTS)
def test_specialization_by_token_is_that_of_the_token_asked_for(runs: Path, variant: str) -> None:
    trace = open_run(ROOT / "data" / "demo-run")
    test = shown("specialization", "demo-run")
    test.query_params.update({"by": "token", "token_is": variant, "layer": "layer 5"})
    test.run()
    alone = context_independence(VARIANTS[variant](trace, 5))
    share = plain(f"accounts for {alone.share:.0%} of what it could")
    assert any(share in m.value for m in test.markdown) and not test.exception
    bits = plain(f"{alone.plug_in:.2f} of at most {alone.ceiling:.2f} bits; {alone.floor:.2f} when")
    assert any(bits in c.value for c in test.caption)
    assert len({round(context_independence(f(trace, 5)).plug_in, 2) for f in VARIANTS.values()}) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_vocabulary_specialization_has_an_interval_over_documents(runs: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = open_run(ROOT / "data" / "demo-run")
    found = vocabulary_interval(trace, VARIANTS[variant](trace, 3))
    st.cache_resource.clear()
    test = shown("specialization", "demo-run")
    test.query_params.update({"by": "token", "token_is": variant, "layer": "layer 3"})
    test.run()
    said = plain(f": {found.value:.3f}, 95% interval {found.low:.3f} to {found.high:.3f}")
    assert not test.exception and found.low < found.value < found.high
    assert any(said in c.value and "Each of 75 documents" in c.proto.help for c in test.caption)
    monkeypatch.setattr(jackknife, "one_pass", None)  # a second view reads nothing
    assert not test.run().exception and any(said in c.value for c in test.caption)


def test_a_run_of_too_few_documents_says_that_it_has_no_interval(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jackknife, "FEWEST", 76)
    st.cache_resource.clear()
    test = shown("specialization", "demo-run")
    test.query_params["by"] = "token"
    assert not test.run().exception
    assert any(plain("no interval here: fewer than 76 documents") in c.value for c in test.caption)


def test_what_reads_every_decision_waits_until_its_part_is_opened(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, whole = [], served_tokens.vocabulary_table
    monkeypatch.setattr(
        served_tokens, "vocabulary_table", lambda trace, **options: asked.append(options["layers"]) or whole(trace, **options)
    )
    st.cache_resource.clear()
    test = shown("specialization", "demo-run")
    test.query_params["by"] = "token"
    assert not test.run().exception and asked == []
    test.query_params["follow"] = "open"
    test.run()
    assert not test.exception and asked == [[i] for i in range(len(open_run(ROOT / "data" / "demo-run").layers))]
    assert any("different ids" in c.proto.help and plain("95% interval") in c.value and "75 documents" in c.value for c in test.caption)
    trace = open_run(ROOT / "data" / "demo-run")
    lines = next(json.loads(c.proto.spec)["data"] for c in test.get("plotly_chart") if "it reads" in c.proto.spec)
    for line, variant in zip(lines, VARIANTS, strict=False):
        found = vocabulary_interval(trace, VARIANTS[variant](trace, 3))
        bars = [numbers_of(line["error_y"][end])[3] for end in ("arrayminus", "array")]
        assert bars == pytest.approx([found.value - found.low, found.high - found.value]) and numbers_of(line["y"])[3] == pytest.approx(
            found.value
        )
    assert "error_y" not in lines[3] or not lines[3]["error_y"].get("array")
    test.run()
    assert len(asked) == len(set(map(tuple, asked)))  # kept


def test_tokens_that_documents_cannot_tell_from_chance_stand_apart(runs: Path) -> None:
    trace = open_run(ROOT / "data" / "demo-run")
    counts = input_tokens(trace, 5)
    every = range(counts.classes)
    found = top_tokens_of(trace, counts, every, most=8, use=document_use(trace, counts, leading_ids(counts, every)))
    test = shown("specialization", "demo-run")
    test.query_params.update({"by": "token", "layer": "layer 5"})
    test.run()
    frame = test.dataframe[0].value
    beyond, untold = (frame[c].tolist() for c in frame.columns)
    told = [sum(t.q <= 0.05 for t in uses) for uses in found]
    assert [x.count("x (") for x in beyond] == told and 0 < sum(told) < sum(map(len, found))
    assert [x.count("x (") for x in untold] == [len(uses) - n for uses, n in zip(found, told, strict=True)]
    assert not any("Its unit is the document" not in c.proto.help for c in test.caption if "in brackets" in c.value) and not test.exception


def test_tokens_by_lift_stand_while_their_documents_are_counted(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large run; they carry the lifts that they keep, and nothing that only documents tell."""

    def left(*_: object, **__: object) -> None:
        raise InterruptedError

    st.cache_resource.clear()
    first = ("demo-run", {"by": "token", "layer": "layer 5"})
    with monkeypatch.context() as reading:
        reading.setattr(jackknife, "one_pass", left)
        small = asked_for(*first)
        reading.setattr(served_tokens, "LONG", 1)
        st.cache_resource.clear()
        stopped = asked_for(*first)
    assert small.exception and stopped.exception and not small.dataframe
    [column] = stopped.dataframe[0].value.columns
    assert "is being counted" in column and any("from counts alone" in c.value for c in stopped.caption)
    test = asked_for(*first)
    assert not test.exception and not any("from counts alone" in c.value for c in test.caption)
    early, late = stopped.dataframe[0].value, test.dataframe[0].value
    for one, row in zip(early[column], late.to_numpy().tolist(), strict=True):
        lifts = sorted(re.findall(r"([\d.]+)x", one), key=float)
        assert lifts == sorted(re.findall(r"([\d.]+)x", "".join(row)), key=float) and "(" not in one.replace("(1/", "")


def asked_for(run: str, choices: dict[str, str]) -> AppTest:
    """The page with these choices in its address."""
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    for key, value in {"run": run, **choices}.items():
        test.query_params[key] = value
    test.switch_page("views/specialization.py")
    return test.run()


@pytest.mark.parametrize("by", ["pairs", "flow"])
def test_pairs_are_tested_and_crossed_out(by: str) -> None:
    """The headline names an interval and a count of tested pairs; the map has as many crosses as there are pairs left over."""
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    for key, value in {"by": by, "run": "demo-run", "layer": "layer 2"}.items():
        test.query_params[key] = value
    test.switch_page("views/specialization.py")
    test.run()
    assert not test.exception and not test.error
    found = re.search(r"times as often as their loads alone give .95% [\d.]+ to [\d.]+.; ([\d,]+) of ([\d,]+) pairs differ beyond chance",
                      " ".join(m.value.replace("\\", "") for m in test.markdown))  # fmt: skip
    assert found
    figure = json.loads(test.get("plotly_chart")[0].proto.spec)
    crosses = next(t for t in figure["data"] if t.get("type") == "scatter")
    assert len(numbers_of(crosses["x"])) == (int(found[2]) - int(found[1])) * (2 if by == "pairs" else 1)
