"""Neighbouring tokens alike: against the statistics, published figures, and routing whose order is known to matter or not."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis.repetition import MIXTRAL, repetition, repetition_test
from analysis.shuffling import neighbours_alike
from analysis.trace import SiteRouting, Trace, TraceError
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_trace, site, weighted_trace


def test_repetition_and_its_chance() -> None:
    found = repetition(weighted_trace(2), 0)
    assert found.pairs == 3996 and found.chance_first == 1 / 8 and found.chance_shared == pytest.approx(0.4643, abs=5e-5)
    assert found.first == pytest.approx(found.chance_first_given_load, abs=0.03) and found.chance_first_given_load > 0.135
    for e, k, percent in ((8, 2, 46.43), (64, 8, 67.91), (64, 6, 46.01), (128, 8, 41.23)):  # reference: Mixtral Table 5's null
        layers = (site(0, e, k),)
        chance = repetition(make_trace(layers, [make_part(layers, [3])]), 0).chance_shared
        assert 100 * chance == pytest.approx(percent, abs=0.005) and chance == 1 - comb(e - k, k) / comb(e, k)
    assert np.isnan(repetition(make_trace(PLAIN, [make_part(PLAIN, [1])]), 0).first)


def test_repetition_of_deepseek_v2_lite(real: Path) -> None:
    golden = json.loads((real / "golden.json").read_text())["deepseek-v2-lite"]["law"]
    table = pq.read_table(real / "deepseek-v2-lite" / "routing.parquet").to_pandas()
    layers = (site(0, 64, 6),)
    for number in ("1", "13", "26"):
        mine = table[(table["task"] == "law") & (table["layer"] == int(number))].sort_values(["seq", "pos", "slot"])
        experts = mine["expert"].to_numpy().reshape(-1, 6).astype(np.int16)
        weights = mine["weight"].to_numpy().reshape(-1, 6).astype(np.float32)
        part = make_part(layers, mine.iloc[::6].groupby("seq", sort=False).size().tolist())
        found = repetition(make_trace(layers, [replace(part, routing=(SiteRouting(experts, weights, experts),))]), 0)
        figures = golden["layers"][number]
        assert found.first == pytest.approx(figures["repeat_first"], rel=5e-8)
        assert found.shared == pytest.approx(figures["repeat_any"], rel=5e-8)


def test_mixtrals_table_is_above_chance_for_two_choices() -> None:
    assert len(MIXTRAL) == 6 and all(len(rows) == 3 for rows in MIXTRAL.values())
    deep = [rows[1] for rows in MIXTRAL.values()]
    assert all(first > 12.5 and either > 46.43 for first, either in deep)


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS, (site(0, 8, 1),)], ids=["plain", "many", "streams", "top1"])
def test_the_test_counts_what_the_statistics_count(layers: tuple) -> None:
    trace = make_trace(layers)
    for layer in trace.layers:
        [row] = repetition_test(trace, layer.index).to_pylist()
        pairs, first, shared = trace.stats.repetition(layer.index)
        assert (row["pairs"], row["first"], row["shared"]) == (pairs, first / pairs, shared / pairs)
        assert row["first_low"] <= row["first"] <= row["first_high"] and row["shared_low"] <= row["shared"] <= row["shared_high"]


def one_expert_at_a_time(experts: list[list[int]]) -> Trace:
    """A top-1 layer of 8 experts whose documents use these experts in this order."""
    layers = (site(0, 8, 1),)
    part = make_part(layers, [len(x) for x in experts])
    ids = np.concatenate(experts)[:, None].astype(np.int16)
    return make_trace(layers, [replace(part, routing=(SiteRouting(ids, np.ones(ids.shape, np.float32), ids),))])


def test_a_documents_subject_is_no_order_and_order_is_no_subject() -> None:
    rng = np.random.default_rng(0)
    subjects = [rng.choice([d % 8, (d + 1) % 8], 200).tolist() for d in range(40)]  # each document draws from two experts of its own
    [row] = repetition_test(one_expert_at_a_time(subjects), 0).to_pylist()
    assert row["first"] > 3.5 * row["chance_first_given_load"]  # which loads over the whole run do not explain
    assert row["first"] == pytest.approx(row["first_shuffled"], abs=0.02) and row["first_p"] > 0.05
    runs = [np.repeat(rng.permutation(8), 25).tolist() for _ in range(40)]  # each document uses all alike, one after the other
    [row] = repetition_test(one_expert_at_a_time(runs), 0).to_pylist()
    assert row["first"] == 24 * 8 / 199 and row["first_low"] == row["first_high"] == row["first"]
    assert row["first_shuffled"] == pytest.approx(24 / 199, abs=0.005) and row["first_p"] == 1 / (row["draws"] + 1)  # (n_e - 1) / (n - 1)


def test_random_order_is_rarely_taken_for_a_finding() -> None:
    p = [
        repetition_test(one_expert_at_a_time(np.random.default_rng(i).integers(0, 8, (6, 60)).tolist()), 0)["first_p"][0].as_py()
        for i in range(60)
    ]
    assert np.mean(np.array(p) <= 0.1) < 0.25 and min(p) < 0.2 < 0.8 < max(p)  # 6 of 60 expected, 15 with p < 0.001


def test_orders_are_dealt_within_documents() -> None:
    ends, order = np.array([1, 5, 5, 12]), np.arange(12)
    words, first, alike = np.ones((12, 1), np.uint64), np.full(12, -1), np.zeros((4, 2), np.int64)
    for seed in range(50):
        neighbours_alike(words, first, ends, order, np.random.default_rng(seed).random(12), alike)
        assert [sorted(x.tolist()) for x in np.split(order, ends[:-1])] == [[0], [1, 2, 3, 4], [], [5, 6, 7, 8, 9, 10, 11]]
    assert order.tolist() != list(range(12)) and alike.tolist() == [[0, 0], [0, 150], [0, 0], [0, 300]]  # -1 is no choice in common


def test_what_cannot_be_told_is_said() -> None:
    [row] = repetition_test(make_trace(PLAIN, [make_part(PLAIN, [1])]), 0).to_pylist()
    assert all(np.isnan(row[c]) for c in ("first", "first_low", "first_shuffled", "first_p")) and row["pairs"] == 0
    with pytest.raises(TraceError, match="statistics only"):
        repetition_test(replace(make_trace(PLAIN), source=None), 0)
