"""The Capacity page."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import streamlit as st

from analysis.store import open_run
from app.text import plain, visible_token
from tests.synthetic import PLAIN

from .pages import ROOT, shown, store


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


def test_tokens_that_pay_are_named_by_their_own_text(runs: Path) -> None:

    test = shown("capacity", "demo-run")
    test.query_params["who"] = "token"
    test.run()
    told = test.dataframe[0].value
    tokens = open_run(ROOT / "data" / "demo-run").tokens
    text_of = dict(zip(tokens["token_id"].to_pylist(), tokens["token"].to_pylist(), strict=True))
    assert [visible_token(text_of[i]) for i in told["token id"]] == told["token"].tolist() and told["lost"].is_monotonic_decreasing


@pytest.fixture
def long_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every run counts as long; nothing is known of it from before, nor kept."""
    monkeypatch.setattr("analysis.capacity_answer.CHEAP", 1)
    st.cache_resource.clear()
    st.cache_data.clear()
    yield
    st.cache_resource.clear()
    st.cache_data.clear()


def test_of_a_long_run_what_loads_tell_is_of_all_layers_and_the_rest_of_one(
    runs: Path, long_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analysis.capacity import apply_capacity

    monkeypatch.setattr("app.rankings.shuffled_curves", None)  # no layer but the one shown is ranked
    test, run = shown("capacity", "demo-run"), open_run(ROOT / "data" / "demo-run")
    test.query_params.update({"documents": "2", "mix": "recorded", "cf": "1"})
    test.run()
    assert not test.exception
    layers = apply_capacity(run, 1.0, "probability", "documents", size=2)
    assert any(
        plain(f"CF 1 drops {layers.summary()['dropped_share']:.1%} of assignments over all layers") in m.value for m in test.markdown
    )
    told = [c.value for c in test.caption]
    worst = max(layers.by_layer().to_pylist(), key=lambda r: r["dropped_share"])
    at = f"layer {worst['layer']}"
    assert any(plain(f"Lost gate weight, first choices and tokens are told of {at} alone, below.") in c for c in told)
    said = f"Lost with them: {worst['gate_mass_lost_share']:.1%} of the gate weight and {worst['top1_dropped_share']:.1%} of first choices."
    assert any(plain(said) in c for c in told)
    assert "layer shown" in test.selectbox(key="table").options
    for policy in ("reroute", "dropless", "choice"):
        test.query_params["policy"] = policy
        test.run()
        assert not test.exception
    test.query_params.update({"policy": "probability", "scope": "tokens"})
    test.run()
    assert test.exception  # batches of tokens need every decision of every layer
