"""The Expert page."""

import json
import shutil
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from analysis import cards
from analysis.cards import neighbours
from analysis.neighbours import expert_similarities
from analysis.pair_tests import coactivation_test, flow_test
from analysis.passages import passages
from analysis.significance import ALPHA
from analysis.store import open_run
from app.text import plain
from tests.synthetic import PLAIN

from .pages import ROOT, shown, store


def test_an_expert_without_tokens_says_so(runs: Path) -> None:
    store(runs / "short", PLAIN, [1])
    test = shown("expert", "short")
    used = open_run(runs / "short").stats.load([x.title for x in PLAIN].index(test.selectbox(key="layer").value))
    test.selectbox(key="expert").set_value(str(int(used.argmin()))).run()
    assert "No token of this run uses this expert" in test.info[0].value and not test.exception
    assert all("nan" not in m.value for m in test.metric)


def test_weights_are_compared_where_the_model_of_the_run_is_here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = shown("expert", "demo-run")
    test.query_params.update({"layer": "layer 2", "expert": "7"})
    test.run()
    found = expert_similarities(ROOT / "data" / "demo-model", open_run(ROOT / "data" / "demo-run").layers[2])
    others = np.delete(np.arange(16), 7)
    nearest = others[np.argsort(-found.whole[7, others])][:8]
    table = next(d.value for d in test.dataframe if "all its weights" in d.value)
    assert table["expert"].tolist() == nearest.tolist() and table["all its weights"].tolist() == found.whole[7, nearest].tolist()
    assert list(table.columns[2:]) == list(found.matrices) and any(plain(f"{found.mean:.4f}") in c.value for c in test.caption)
    other = tmp_path / "changed"
    shutil.copytree(ROOT / "data" / "demo-model", other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    monkeypatch.setenv("ROUTERSCOPE_MODELS", f"changed={other}")
    test.run()
    assert any("is not among the models of this machine" in c.value for c in test.caption) and not test.exception


def test_whom_an_expert_works_with_is_tested(runs: Path) -> None:
    """Before, beside and after it, those first that meet it more than chance gives; all of them among the tables."""
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    for key, value in {"run": "demo-run", "layer": "layer 3", "expert": "5"}.items():
        test.query_params[key] = value
    test.switch_page("views/expert.py")
    test.run()
    trace = open_run(ROOT / "data" / "demo-run")
    shown_, used = [d.value for d in test.dataframe if "than chance" in d.value], int(trace.stats.load(3)[5])
    tests = (flow_test(trace, 2), True), (coactivation_test(trace, 3), False), (flow_test(trace, 3), False)
    for table, (found, column), where in zip(
        shown_, tests, ("Before, at layer 2", "For the same tokens", "After, at layer 4"), strict=True
    ):
        rows = neighbours(found, 5, used, column)
        assert table["expert"].tolist() == [x.expert for x in rows if x.count][:8]
        assert table["lift"].tolist() == [x.lift for x in rows if x.count][:8]
        words = {("more", 1), ("less", -1), ("unclear", 0), ("mixed", 0)}
        assert set(zip(table["than chance"], [x.direction for x in rows if x.count], strict=False)) <= words
        unsure = {x.expert for x in rows if x.q > ALPHA}
        assert set(table["expert"][table["than chance"] == "unclear"]) == unsure & set(table["expert"])
        low, high = (float(x) for x in table["95% interval"][0].split(" to "))
        assert (low, high) == (pytest.approx(rows[0].low, abs=0.006), pytest.approx(rows[0].high, abs=0.006))
        more, less = (sum(x.direction == d for x in rows) for d in (1, -1))
        said = f"{where}: of {len(rows)} experts, {more} more often than chance gives and {less} less often."
        assert any(plain(said) in m.value for m in test.markdown)
    assert {"partners", "sources", "targets"} <= set(test.selectbox(key="table").options) and not test.exception
    assert any(f"n = {used:,} tokens of 75 documents in the run" in c.value.replace("\\", "") for c in test.caption)


def test_what_statistics_tell_comes_first_and_the_rest_in_its_place(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until kinds of text are counted the heading says so and the numbers stand; leaving then loses nothing, and what is at rest says nothing of it."""

    def left(*_: object, **__: object) -> None:
        raise InterruptedError

    st.cache_resource.clear()
    with monkeypatch.context() as counting:
        counting.setattr(cards, "one_pass", left)
        stopped = shown("expert", "demo-run")
    headings = [m.value for m in stopped.markdown if m.value.startswith("## ")]
    assert stopped.exception and len(headings) == 1 and headings[0].endswith("counting what kinds of text and token use it …")
    assert stopped.selectbox(key="counting").disabled
    [texts] = stopped.get("plotly_chart")  # from counts alone
    assert [h.value for h in stopped.header] == ["Which texts use it?", "Which kinds of token?"]
    test = shown("expert", "demo-run")
    assert not test.exception and [m.value for m in test.metric] == [m.value for m in stopped.metric] != []
    assert not [m.value for m in test.markdown if "counting" in m.value] and test.selectbox(key="of").value == "all"
    assert test.get("plotly_chart")[0].proto.spec == texts.proto.spec


def test_what_was_clicked_is_marked_and_its_passages_are_offered(runs: Path) -> None:
    trace = open_run(ROOT / "data" / "demo-run")
    test = shown("expert", "demo-run")
    test.query_params.update({"layer": "layer 5", "expert": "15", "of": "label-chinese"})
    test.run()
    found = passages(trace, 5, 15, label="chinese")
    assert not test.exception and found and any("documents of chinese where it weighs most" in c.value for c in test.caption)
    width = json.loads(test.get("plotly_chart")[0].proto.spec)["data"][0]
    assert [y for y, w in zip(width["y"], width["marker"]["line"]["width"], strict=True) if w] == ["chinese"]
    links = [x.proto for x in test.main if x.type == "page_link"]
    assert [parse_qs(x.query_string) for x in links if x.label.startswith("See it")] == [
        {"run": ["demo-run"], "layer": ["layer 5"], "doc": [str(p.document + 1)], "token": [str(p.position)]} for p in found
    ]


def test_few_layers_keep_the_documents_of_their_tokens(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another expert of a layer costs no pass, nor does one that was seen; a layer seen long ago is counted again for a new one."""
    st.cache_resource.clear()
    asked, use = [], cards.document_use
    monkeypatch.setattr(cards, "document_use", lambda trace, counts, *a, **k: asked.append(counts.site) or use(trace, counts, *a, **k))
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    test.query_params["run"] = "demo-run"
    test.switch_page("views/expert.py")
    for layer, expert in ((0, 1), (0, 2), (1, 1), (2, 1), (3, 1), (4, 1), (0, 1), (0, 3)):
        test.query_params.update({"layer": f"layer {layer}", "expert": str(expert)})
        assert not test.run().exception
    assert asked == [0, 1, 2, 3, 4, 0]
