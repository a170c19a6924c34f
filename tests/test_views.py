"""Every page over several runs, without a browser: no exception, and what must be on screen is."""

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pyarrow.compute as pc
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from analysis import jackknife, vocabulary
from analysis.capture import capture
from analysis.cards import neighbours, passages
from analysis.glossary import TERMS, search
from analysis.jackknife import vocabulary_interval
from analysis.metrics import METRICS
from analysis.neighbours import expert_similarities
from analysis.pair_tests import coactivation_test, flow_test
from analysis.repetition import repetition
from analysis.significance import ALPHA
from analysis.specialization import by_label
from analysis.store import open_run
from analysis.token_use import document_use, leading_ids, top_tokens_of
from analysis.trace import LayerInfo, SiteRouting
from analysis.vocabulary import VARIANTS, context_independence, input_tokens
from analysis.writing import RunWriter
from app import charts
from app.text import plain, visible_token

from . import tiny
from .families import FAMILIES
from .nasty import NASTY
from .synthetic import MANY, PLAIN, TWO_STREAMS, card, make_part, make_parts, site

ROOT = Path(__file__).parent.parent
CAPTURED = ("jetmoe", "longcat_flash", "zaya", "doge", "llama4")
KINDS = {"plain": PLAIN, "many": MANY, "streams": TWO_STREAMS, "top1": (site(0, 8, 1),)}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path


def store(folder: Path, layers: tuple[LayerInfo, ...], lengths: list[int]) -> None:
    """A run of random routing where every token, label and name is hostile."""
    with RunWriter.open(folder, card(layers, NASTY[1]), {}) as writer:
        writer.write(make_part(layers, lengths, texts=NASTY, labels=[*NASTY, None], names=NASTY[1:], n_ids=len(NASTY)))
        writer.commit()


def test_an_address_of_runs_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
    monkeypatch.chdir(ROOT)
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180).run()
    assert not test.exception and [e.value.replace("\\", "") for e in test.error] == [
        "ROUTERSCOPE_RUNS names an address, and the dashboard lists a folder: copy runs to one (python -m analysis copy)"
    ]


def shown(page: str, run: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    test.query_params["run"] = run
    test.run()
    if page != "overview":
        test.switch_page(f"views/{page}.py")
        test.run()
    return test


def test_a_document_is_shown_where_the_tokens_of_the_other_parts_cannot_be_read(runs: Path) -> None:
    """And one of theirs is an error that names the file."""
    with RunWriter.open(runs / "two", card(PLAIN), {}) as writer:
        for part in make_parts(PLAIN):
            writer.write(part)
        writer.commit()
    for path in sorted((runs / "two" / "tokens").iterdir())[1:]:
        path.write_bytes(bytes(path.stat().st_size))
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    for key, value in {"doc": "1", "run": "two"}.items():
        test.query_params[key] = value
    test.switch_page("views/tokens.py")
    test.run()
    assert not test.exception and not test.error and test.title[0].value == "Which expert does each token go to?"
    test.query_params["doc"] = "4"
    test.run()
    assert not test.exception and plain("two/tokens/part-00001.parquet is damaged") in test.error[0].value


def test_load_shows_what_it_can_where_the_counts_of_token_ids_cannot_be_read_and_heals(runs: Path) -> None:
    store(runs / "torn", PLAIN, [60] * 4)
    path = runs / "torn" / "token_stats.parquet"
    sound = path.read_bytes()
    path.write_bytes(bytes(len(sound)))
    test = shown("load", "torn")
    assert not test.exception and plain("torn/token_stats.parquet is damaged") in test.error[0].value
    titles = [h.value for h in test.header]
    assert "How stable is it from batch to batch?" in titles and "Over layers" not in titles
    path.write_bytes(sound)
    test.run()
    assert not test.exception and not test.error and "Over layers" in [h.value for h in test.header]


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


def test_pasted_paragraphs_are_counted_where_they_are_texts_of_their_own(runs: Path) -> None:
    store(runs / "plain", PLAIN, [3])
    test = shown("runs", "plain")
    test.text_area(key="pasted").set_value("One.\n\nTwo.\nStill two.").run()
    assert not test.checkbox(key="paragraphs").value and not any("pasted" in c.value for c in test.caption)
    test.checkbox(key="paragraphs").check().run()
    assert any("2 paragraphs pasted" in c.value for c in test.caption)


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


def test_demo_run_opens_first_with_a_finding(runs: Path) -> None:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180).run()
    assert test.selectbox(key="run").value == "demo-run"
    assert any("is used for" in m.value for m in test.markdown)
    assert any("n \\= " in c.value for c in test.caption)


def test_bad_prompts_get_a_sentence_and_stay(runs: Path) -> None:
    test = shown("runs", "demo-run")
    test.button(key="record").click().run()
    assert test.error[0].value.startswith(plain("Nothing was recorded: paste some text"))
    test.text_area(key="pasted").set_value("kept text").run()
    test.text_input(key="run_name").set_value("Bad Name!").run()
    test.button(key="record").click().run()
    assert "run name" in test.error[0].value and test.text_area(key="pasted").value == "kept text"


def test_an_unknown_run_in_the_link_is_said(runs: Path) -> None:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    test.query_params["run"] = "<b>gone</b>"
    test.run()
    assert any("which is not here" in e.value for e in test.error)


def test_capacity_answers_as_the_engine_does(runs: Path) -> None:
    from analysis.capacity import apply_capacity

    test = shown("capacity", "demo-run")
    for name, value in {"at": "layer 3", "preset": "megatron", "scope": "document", "cf": "1", "policy": "position"}.items():
        test.query_params[name] = value
    test.run()
    share = apply_capacity(open_run(ROOT / "data" / "demo-run"), 1.0, "position", "document", layers=[3]).summary()["dropped_share"]
    assert any(f"drops {100 * share:.1f}" in m.value.replace("\\", "") for m in test.markdown)
    assert test.select_slider(key="cf").value == "1"


def test_capacity_is_told_over_shuffles_and_one_shuffle_can_be_chosen(runs: Path) -> None:
    from analysis.capacity import apply_capacity, capacity_curves, pool_curves
    from analysis.capacity_answer import percent

    test = shown("capacity", "demo-run")
    run = open_run(ROOT / "data" / "demo-run")
    shares = [apply_capacity(run, 1.25, "position", "documents", size=16, mixed=s).summary()["dropped_share"] for s in range(20)]
    chance = pool_curves(capacity_curves(run, [1.25], "position", "documents", size=16, mixed=0))["chance_dropped_share"][0].as_py()
    said = f"CF 1.25 drops {np.mean(shares):.1%} of assignments over all layers; by chance {percent(chance)}."
    assert any(plain(said) in m.value for m in test.markdown)
    told = next(c for c in test.caption if plain(f"; {min(shares):.1%} to {max(shares):.1%} over 20 shuffles; only 5 batches") in c.value)
    assert plain("in 5 batches of 16 documents, the last of 11") in told.help
    test.selectbox(key="mix").set_value("7").run()
    one = apply_capacity(run, 1.25, "probability", "documents", size=16, mixed=7).summary()
    assert any(plain(f"drops {one['dropped_share']:.1%} of assignments over all layers") in m.value for m in test.markdown)
    said = f"Lost with them: {one['gate_mass_lost_share']:.1%} of the gate weight and {one['top1_dropped_share']:.1%} of first choices."
    assert any(plain(said) in c.value and "shuffles" not in c.value for c in test.caption) and test.query_params["mix"] in ("7", ["7"])
    said = plain("Assumptions: Megatron-LM, served by probability, 16 documents per batch, documents shuffled (seed 7).")
    assert said in [c.value for c in test.caption]


@pytest.mark.parametrize(
    ("link", "opened", "said"),
    [
        ({}, False, "Megatron-LM, served by probability, 16 documents per batch, mean of 20 shuffles"),
        ({"preset": "switch", "tokens": "2048", "scope": "tokens", "mix": "recorded"}, True, "Switch Transformer, served by position, 2,048 tokens per"
         " batch, documents as recorded"),
        ({"scope": "run", "policy": "batch_priority", "assumptions": "closed"}, False, "Megatron-LM, served by batch priority, the whole run at once"),
        ({"assumptions": "open"}, True, "Megatron-LM, served by probability, 16 documents per batch, mean of 20 shuffles"),
        ({"policy": "luck"}, True, "Megatron-LM, served by probability, 16 documents per batch, mean of 20 shuffles"),
    ],
)  # fmt: skip
def test_the_assumptions_are_told_in_a_line_and_open_where_one_is_set(runs: Path, link: dict[str, str], opened: bool, said: str) -> None:
    test = shown("capacity", "demo-run")
    test.query_params.update(link)
    test.run()
    part = next(e for e in test.expander if e.label == "Change the assumptions")
    assert part.proto.expanded == opened and plain(f"Assumptions: {said}.") in [c.value for c in test.caption]
    assert any("which is not here" in e.value for e in part.error) == (link.get("policy") == "luck")
    assert all(test.query_params[k] in (v, [v]) for k, v in link.items() if v != "luck")


@pytest.mark.parametrize(("lost", "whole", "part"), [("gate", "gate_mass", "gate_mass_lost"), ("first", "tokens", "top1_dropped")])
def test_who_pays_can_be_told_in_gate_weight_and_first_choices(runs: Path, lost: str, whole: str, part: str) -> None:
    from analysis.capacity import apply_capacity

    test = shown("capacity", "demo-run")
    test.query_params.update({"who": "token", "lost": lost, "at": "layer 2", "mix": "recorded"})
    test.run()
    rows = (
        apply_capacity(open_run(ROOT / "data" / "demo-run"), 1.25, "probability", "documents", size=16, layers=[2]).by_token().to_pylist()
    )
    told, best = test.dataframe[0].value, max(rows, key=lambda r: r[part])
    assert told["lost"][0] == pytest.approx(best[part]) and told["share lost"][0] == pytest.approx(best[part] / best[whole])
    assert told["lost"].is_monotonic_decreasing and not test.exception


def test_a_run_smaller_than_a_batch_says_what_is_routed_together(runs: Path) -> None:
    store(runs / "small", PLAIN, [40, 5, 30, 20])
    test = shown("capacity", "small")
    test.query_params["compare"] = "open"
    test.run()
    told = "".join(m.value for m in [*test.caption, *test.markdown]).replace("\\", "")
    helps = "".join(c.help or "" for c in test.caption).replace("\\", "")
    assert "in 1 batch, all 4 documents." in helps and "only 1 batch," in told and "1 batches" not in told + helps and "over 20" not in told
    assert re.search(r"with [0-9,]+ slots per expert and batch", told)
    policies = test.dataframe[0].value
    assert "reroute" not in policies["served first"].tolist() and not policies.isna().any().any() and "Reroute needs" in told


def test_parts_of_the_capacity_page_stand_open_in_the_link_and_close_on_the_way_back(runs: Path) -> None:
    test = shown("capacity", "demo-run")
    test.query_params.update({"lesson": "open", "compare": "open"})
    test.run()
    assert any("Six tokens, three experts" in m.value for m in test.markdown) and "policies" in test.selectbox(key="table").options
    assert test.query_params["lesson"] in ("open", ["open"]) and "cost" not in test.query_params
    test.select_slider(key="cf").set_value("2").run()
    assert "policies" in test.selectbox(key="table").options and test.query_params["compare"] in ("open", ["open"])
    test.query_params.pop("lesson")
    test.query_params.pop("compare")
    test.run()
    assert not any("Six tokens" in m.value for m in test.markdown) and "policies" not in test.selectbox(key="table").options


def test_what_if_answers_from_the_example_and_starts_again_with_another(runs: Path) -> None:
    test = shown("model", "demo-run")
    assert [m.value for m in test.metric][-3:] == ["1.76 T", "440.0 B", "25.0%"]
    test.selectbox(key="experts").set_value("16").run()
    assert test.metric[-1].value == "12.5%" and any("no longer those of the example" in c.value for c in test.caption)
    test.selectbox(key="example").set_value("64x16b").run()
    assert [m.value for m in test.metric][-3:] == ["1.02 T", "128.0 B", "12.5%"]


def test_glossary_explains_every_metric_and_every_term(runs: Path) -> None:
    test = shown("glossary", "demo-run")
    told = [m.value for m in [*test.markdown, *test.caption]]
    assert [m.name for m in METRICS.values() if not any(plain(m.definition[1:]) in t for t in told)] == []
    for entry in (*METRICS.values(), *TERMS):
        facts = (entry.name, entry.source, entry.chance, entry.range) if entry.range else (entry.source,)
        assert f"## {plain(entry.title)}" in told and any(all(plain(f) in t for f in facts) for t in told), entry.name


def test_glossary_search_stands_in_the_link(runs: Path) -> None:
    test = shown("glossary", "demo-run")
    test.query_params["term"] = "maxvio"
    test.run()
    headings = [m.value for m in test.markdown if m.value.startswith("## ")]
    assert headings == ["## MaxVio", "## MaxVio per document"] and test.text_input(key="term").value == "maxvio"
    nasty = "<img src=x> ![b](http://x)"
    test.text_input(key="term").set_value(nasty).run()
    assert test.query_params["term"] in (nasty, [nasty]) and not any(m.value.startswith("## ") for m in test.markdown)
    assert any(f"Nothing here speaks of {plain(nasty)}" in m.value for m in test.markdown)


def test_load_names_layers_that_hide_behind_the_sum(runs: Path) -> None:
    layers = tuple(site(i, 8, 1) for i in range(8))
    part = make_part(layers, [410])
    loads = np.full((8, 8), 10) + 330 * np.eye(8, dtype=int)
    chosen = [np.repeat(np.arange(8), row)[:, None].astype(np.int16) for row in loads]
    routing = tuple(SiteRouting(e, r.weights, e) for e, r in zip(chosen, part.routing, strict=True))
    for name, mine in (("hidden", routing), ("even", part.routing)):
        with RunWriter.open(runs / name, card(layers), {}) as writer:
            writer.write(replace(part, routing=mine))
            writer.commit()
    said = {name: [m.value for m in shown("load", name).markdown] for name in ("hidden", "even")}
    assert any("collapsed within them" in m and "6\\.63 times" in m for m in said["hidden"])
    assert not any("collapsed within" in m for m in said["even"]) and any("would miss no collapsed layer here" in m for m in said["even"])


@pytest.mark.parametrize("pieces", ["label", "position"])
@pytest.mark.parametrize("batch", ["1", "4096"])
@pytest.mark.parametrize("filled", ["mixed", "recorded"])
def test_load_reads_batch_and_pieces_from_the_link(runs: Path, batch: str, pieces: str, filled: str) -> None:
    from analysis.stability import maxvio_table

    test = shown("load", "demo-run")
    test.query_params.update({"batch": batch, "pieces": pieces, "filled": filled})
    test.run()
    rows = maxvio_table(open_run(ROOT / "data" / "demo-run"), int(batch), 0 if filled == "mixed" else None).to_pylist()
    first, worst, loose = rows[0], max(rows, key=lambda r: r["batch"]), max(rows, key=lambda r: r["spread"])
    assert any(plain(f"most uneven in a batch: MaxVio {worst['batch']:.2f} on average") in m.value for m in test.markdown)
    said = (
        f"Layer {loose['site']} varies most: the standard deviation of its MaxVio over {loose['batches']} batches is {loose['spread']:.2f};"
    )
    assert any(plain(said) in m.value for m in test.markdown)
    assert any(plain(f"n = {first['batches']:,} batches of {first['batch_n']:,.0f} tokens") in c.value for c in test.caption)
    assert any(plain(f"in {9 if pieces == 'label' else 11} pieces") in c.value for c in test.caption) and not test.exception


@pytest.mark.parametrize("asked", [None, "2", "16"])
def test_load_tells_the_longest_queue_of_the_devices_of_the_link(runs: Path, asked: str | None) -> None:
    from analysis.devices import queue_table

    test = shown("load", "demo-run")
    if asked is not None:
        test.query_params["devices"] = asked
        test.run()
    rows = queue_table(open_run(ROOT / "data" / "demo-run"), int(asked or 8), 1_024, 0).to_pylist()
    worst = max(rows, key=lambda r: r["median"])
    said = (
        f"With {asked or 8} devices, the longest queue of layer {worst['site']} is {worst['least']:.2f} to {worst['most']:.2f} times the mean"
        f" (median {worst['median']:.2f} over {worst['batches']} batches); uniform routing: at most about {worst['chance']:.2f}."
    )
    assert any(m.value == plain(said) for m in test.markdown) and test.selectbox(key="devices").options == ["2", "4", "8", "16"]
    [told] = [d.value for d in test.dataframe if "balancedness" in d.value]
    assert told["median"].tolist() == [r["median"] for r in rows] and not test.exception


def test_layers_that_the_devices_do_not_divide_are_left_out_and_counted(runs: Path) -> None:
    store(runs / "shapes", (site(0, 6, 2), site(1, 8, 2), site(2, 16, 2)), [300] * 8)
    test = shown("load", "shapes")
    assert test.selectbox(key="devices").options == ["2", "3", "4", "6", "8", "16"] and test.selectbox(key="devices").value == "8"
    assert any(plain("1 layer whose experts 8 does not divide left out.") in c.value for c in test.caption) and not test.exception


def test_headings_of_runs_keep_their_place_when_something_is_refused(runs: Path) -> None:
    """What moves is drawn twice or not at all until the script has ended."""
    test = shown("runs", "demo-run")
    before = {i: e.value for i, e in test.main.children.items() if e.type == "heading" or e.type == "markdown"}
    test.button(key="record").click().run()
    assert before == {i: e.value for i, e in test.main.children.items() if e.type == "heading" or e.type == "markdown"}
    assert "Nothing was recorded" in test.error[0].value and any(plain("Take the numbers of demo-run") in v for v in before.values())


def test_tokens_that_pay_are_named_by_their_own_text(runs: Path) -> None:

    test = shown("capacity", "demo-run")
    test.query_params["who"] = "token"
    test.run()
    told = test.dataframe[0].value
    tokens = open_run(ROOT / "data" / "demo-run").tokens
    text_of = dict(zip(tokens["token_id"].to_pylist(), tokens["token"].to_pylist(), strict=True))
    assert [visible_token(text_of[i]) for i in told["token id"]] == told["token"].tolist() and told["lost"].is_monotonic_decreasing


def test_an_expert_without_tokens_says_so(runs: Path) -> None:
    store(runs / "short", PLAIN, [1])
    test = shown("expert", "short")
    used = open_run(runs / "short").stats.load([x.title for x in PLAIN].index(test.selectbox(key="layer").value))
    test.selectbox(key="expert").set_value(str(int(used.argmin()))).run()
    assert "No token of this run uses this expert" in test.info[0].value and not test.exception
    assert all("nan" not in m.value for m in test.metric)


@pytest.mark.parametrize("page", ["tokens", "load", "specialization", "expert"])
def test_the_layer_chosen_first_is_that_of_the_headline(runs: Path, page: str) -> None:
    part = make_part(PLAIN, [300] * 4)
    busy = part.routing[0].experts.copy()
    busy[::3] = [5, 6]
    with RunWriter.open(runs / "busy", card(PLAIN), {}) as writer:
        writer.write(replace(part, routing=(SiteRouting(busy, part.routing[0].weights, busy), part.routing[1])))
        writer.commit()
    assert shown(page, "busy").selectbox(key="layer").value == "layer 0"


def test_load_of_one_batch_tells_no_stability(runs: Path) -> None:
    store(runs / "short", PLAIN, [9, 9])
    test = shown("load", "short")
    said = [m.value for m in test.markdown]
    assert any(m.startswith(plain("One batch only: stability cannot be told.")) for m in said) and not any("varies" in m for m in said)
    test.query_params["batch"] = "1"
    test.run()
    assert any("No layer varies more than chance" in m.value for m in test.markdown) and not test.exception


def test_load_of_counts_without_documents_says_so(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analysis import stability

    store(runs / "counts-alone", PLAIN, [9, 9])
    table = stability.maxvio_table
    monkeypatch.setattr(
        stability, "maxvio_table", lambda trace, n, mixed: table(replace(trace, documents=trace.documents.slice(0, 0)), n, mixed)
    )
    test = shown("load", "counts-alone")
    assert not test.exception and any("cannot be cut into batches" in c.value for c in test.caption)


def test_a_model_without_capacity_says_none_in_words(runs: Path) -> None:
    assert shown("model", "demo-run").dataframe[0].value["native capacity"].tolist() == ["none"]


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


def test_one_layers_work_is_told_stopped_and_kept() -> None:
    def script() -> None:
        import pyarrow as pa
        import streamlit as st

        from app.layers import one_layer

        def make(tell: object) -> pa.Table:
            for done in (1, 2, 3):
                tell(done, 3)
                st.session_state["told"] = [*st.session_state.get("told", []), done]
                if len(st.session_state["told"]) == 1:
                    st.stop()  # as a person who leaves
            return pa.table({"site": [0]})

        known = st.session_state.setdefault("known", {})
        st.write(f"{one_layer(0, known, make).num_rows} row")

    test = AppTest.from_function(script).run()
    assert test.session_state["told"] == [1] and test.session_state["known"] == {} and not test.markdown
    test.run()
    assert test.session_state["told"] == [1, 1, 2, 3] and test.markdown[0].value == "1 row" and not test.exception
    test.run()
    assert test.session_state["told"] == [1, 1, 2, 3] and test.markdown[0].value == "1 row"


def test_what_reads_every_decision_waits_until_its_part_is_opened(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, whole = [], vocabulary.vocabulary_table
    monkeypatch.setattr(vocabulary, "vocabulary_table", lambda trace, **options: asked.append(options["layers"]) or whole(trace, **options))
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


def numbers_of(values: object) -> list[float]:
    """An array of a figure as it is sent: a list, or base64 with its type."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist() if isinstance(values, dict) else list(values)  # type: ignore[call-overload]


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


def test_layers_done_are_kept_when_a_view_is_left() -> None:
    def script() -> None:
        import pyarrow as pa
        import streamlit as st

        from app.layers import kept, layer_by_layer
        from tests.synthetic import PLAIN, make_trace

        def make(sites: list[int]) -> object:
            st.session_state["asked"] = list(sites)
            for number in sites:
                if number and "left" not in st.session_state:
                    st.session_state["left"] = True
                    st.stop()
                yield number, pa.table({"site": [number]})

        st.session_state["told"] = layer_by_layer(make_trace(PLAIN), kept("a run", ("a test",)), make)["site"].to_pylist()

    st.cache_resource.clear()
    test = AppTest.from_function(script, default_timeout=180).run()
    assert "told" not in test.session_state and not test.exception
    test.run()
    assert test.session_state["asked"] == list(range(1, len(PLAIN))) and test.session_state["told"] == list(range(len(PLAIN)))


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
    assert len(plotted(crosses["x"])) == (int(found[2]) - int(found[1])) * (2 if by == "pairs" else 1)


def plotted(values: object) -> object:
    """Numbers of a figure, which Plotly writes as base64 where they came as an array."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]))
    return values
