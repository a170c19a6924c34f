"""Balance in pieces against loads counted from decisions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import balance, stability
from analysis.metrics import METRICS
from analysis.stability import (
    _described,
    batch_loads,
    batch_maxvio,
    dead_experts,
    document_balance,
    label_balance,
    late_positions,
    least_stable,
    maxvio_batches,
    maxvio_table,
    position_balance,
    read_ahead,
)
from analysis.stats import Statistics
from analysis.store import open_run
from analysis.trace import SiteRouting, Trace
from analysis.writing import RunWriter
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, card, make_part, make_parts, make_trace, site
from tests.test_pooled import layered


def loads_of(trace: Trace, number: int, documents: list[list[int]]) -> list[np.ndarray]:
    owner = trace.stream_tokens(trace.layers[number].stream)["document"].to_numpy()
    experts, width = trace.experts(number), trace.layers[number].n_classes
    return [np.bincount(experts[np.isin(owner, mine)].ravel() + 1, minlength=width + 1)[1:] for mine in documents]


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_batches_of_whole_documents(layers: tuple) -> None:
    """Lengths are 5 3 9 6 3 9 7 3 9: batches of 12 tokens and more are 17, 18, 19."""
    trace = make_trace(layers)
    for layer in layers:
        n, loads = batch_loads(trace, layer.index, 12)
        expected = loads_of(trace, layer.index, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
        assert n.tolist() == [17, 18, 19] and np.array_equal(loads, np.array(expected)[:, : layer.n_experts])
        maxvio = [balance.maxvio(x) for x in expected]
        rows = maxvio_batches(trace, layer.index, 12).to_pylist()
        assert [(r["batch"], r["n"]) for r in rows] == [(1, 17), (2, 18), (3, 19)] and [r["maxvio"] for r in rows] == pytest.approx(maxvio)
        chance = [balance.chance_max_over_mean(x, layer.n_classes, layer.top_k) - 1 for x in n]
        assert [r["chance"] for r in rows] == pytest.approx(chance)
        assert batch_maxvio(trace, layer.index, 12) == pytest.approx(np.mean(maxvio))
        each = np.mean([balance.maxvio(x) for x in loads_of(trace, layer.index, [[d] for d in range(9)])])
        assert batch_maxvio(trace, layer.index) == pytest.approx(each) == METRICS["document_maxvio"](trace)["value"][layer.index].as_py()


def test_figures_of_many_batches_are_those_of_each_to_the_bit() -> None:
    """Also of batches with idle experts, whose entropy has fewer terms, and of none; of experts beside classes without weights."""
    rng = np.random.default_rng(0)
    for experts, classes in ((1, 1), (3, 3), (9, 12), (64, 64), (129, 131)):
        loads = rng.poisson(3, (40, classes))
        loads[:2] = [[0], [7]]
        layer = site(0, experts, 1, special=classes - experts)
        found = _described(layer, np.arange(1, 41), loads)
        for name in ("max_over_mean", "cv", "normalised_entropy", "dead"):
            np.testing.assert_array_equal(found[name].to_numpy(), [getattr(balance, name)(x[:experts]) for x in loads])


def test_loads_of_a_stored_run_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page Load asks for every layer's documents four times; a run of more, or of other documents, is read again."""
    read, load = [], Statistics.document_load
    monkeypatch.setattr(Statistics, "document_load", lambda self, number, documents: read.append(number) or load(self, number, documents))
    with RunWriter.open(tmp_path / "run", card(PLAIN), {}) as writer:
        for part in make_parts(PLAIN):
            writer.write(part)
        writer.commit()
    trace, again = open_run(tmp_path / "run"), open_run(tmp_path / "run")
    read_ahead(trace)
    assert read == [0, 1]
    tables = [(maxvio_table(x, 12, 0), document_balance(x, 1)) for x in (trace, make_trace(), trace, again)]
    assert all(x == tables[0] for x in tables) and read == [0, 1, 0, 1, 1, 0, 1]
    fewer = replace(trace, documents=trace.documents.slice(3))
    assert maxvio_batches(fewer, 0)["n"].to_pylist() == [6, 3, 9, 7, 3, 9] and read[7:] == [0]
    monkeypatch.setattr(stability, "KEPT_BYTES", 9 * 8 * 2 - 1)
    read_ahead(trace)
    assert maxvio_table(trace, 12, 0) == tables[0][0] and read[8:] == [0, 1]


def test_columns() -> None:
    figures = [
        "n",
        "max_over_mean",
        "cv",
        "normalised_entropy",
        "gini",
        "effective_experts",
        "cold",
        "dead",
        "chance_max_over_mean",
        "chance_cv",
    ]
    trace = make_trace()
    assert position_balance(trace, 0).column_names == ["first", "last", "documents", *figures]
    assert label_balance(trace, 0).column_names == ["label", "documents", *figures]


@pytest.mark.parametrize("layers", [PLAIN, TWO_STREAMS], ids=["plain", "streams"])
def test_every_document_by_itself(layers: tuple) -> None:
    trace = make_trace(layers)
    for layer in layers:
        found = document_balance(trace, layer.index).to_pylist()
        assert sorted(r["document"] for r in found) == list(range(9))
        assert [r["excess"] for r in found] == sorted((r["excess"] for r in found), reverse=True)
        for row in found:
            load = loads_of(trace, layer.index, [[row["document"]]])[0]
            assert row["max_over_mean"] == pytest.approx(balance.max_over_mean(load)) and row["name"] == f"doc {row['document']}"
            assert (row["label"], row["n"]) == ("ab"[row["document"] % 2], [5, 3, 9, 6, 3, 9, 7, 3, 9][row["document"]])
            for name in ("cv", "normalised_entropy", "gini", "effective_experts", "cold", "dead"):
                assert row[name] == pytest.approx(getattr(balance, name)(load)), name
            chance = balance.chance_max_over_mean(row["n"], layer.n_classes, layer.top_k)
            assert row["chance_cv"] == balance.chance_cv(row["n"], layer.n_classes, layer.top_k)
            assert row["chance_max_over_mean"] == chance and row["excess"] == pytest.approx(row["max_over_mean"] / chance)


def test_documents_of_uniform_routing_lie_at_chance() -> None:
    found = document_balance(make_trace(PLAIN, [make_part(PLAIN, [200] * 200)]), 0)
    assert 0.8 < np.mean(found["excess"].to_numpy()) < 1 and (found["excess"].to_numpy() > 1).mean() < 0.35


def test_shuffled_batches_of_sorted_texts_are_nearer_to_the_run() -> None:
    """Documents 0 to 9 use experts 0 to 3, the others 4 to 7: in order every batch is of one kind."""
    part = make_part(PLAIN, [20] * 20)
    first, step = part.routing[0].experts.T % np.array([[4], [3]])  # two different experts of four
    experts = (np.stack([first, (first + 1 + step) % 4], 1) + 4 * (np.arange(400) >= 200)[:, None]).astype(np.int16)
    trace = make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])
    ordered, mixed = (maxvio_table(trace, 100, m).to_pylist()[0] for m in (None, 0))
    assert ordered["least"] >= 1 and mixed["batch"] < 0.8 * ordered["batch"] and mixed["run"] == ordered["run"]
    assert (mixed["batches"], mixed["batch_n"]) == (ordered["batches"], ordered["batch_n"]) and mixed == maxvio_table(
        trace, 100, 0
    ).to_pylist()[0]
    order = np.random.default_rng(0).permutation(20).reshape(4, 5)
    assert mixed["batch"] == pytest.approx(np.mean([balance.maxvio(x) for x in loads_of(trace, 0, order.tolist())]))


def test_a_short_last_batch_joins_the_one_before() -> None:
    trace = make_trace(PLAIN, [make_part(PLAIN, [10, 10, 10, 3])])
    assert [batch_loads(trace, 0, n)[0].tolist() for n in (10, 1_000, 20)] == [[10, 10, 13], [33], [33]]
    single = make_trace(PLAIN, [make_part(PLAIN, [1, 1, 5])])
    assert batch_loads(single, 0)[0].tolist() == [1, 1, 5] and batch_maxvio(single, 0) == batch_maxvio(single, 0, 1) > 3 * 2 / 3
    with pytest.raises(ValueError, match="at least 1"):
        batch_loads(trace, 0, 0)


def test_batches_are_less_even_than_the_run() -> None:
    """Each document uses two experts of its own: even over the run, as uneven as can be in every batch."""
    part = make_part(PLAIN, [40] * 4)
    experts = np.repeat(np.arange(8).reshape(4, 2), 40, axis=0).astype(np.int16)
    trace = make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])
    assert METRICS["maxvio"](trace)["value"][0].as_py() == 0 and batch_maxvio(trace, 0) == 3


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
@pytest.mark.parametrize("batch_tokens", [1, 12, 1_000])
def test_maxvio_of_run_and_batches(layers: tuple, batch_tokens: int) -> None:
    trace = make_trace(layers)
    rows = maxvio_table(trace, batch_tokens).to_pylist()
    assert [r["site"] for r in rows] == [x.index for x in layers]
    documents = {1: [[d] for d in range(9)], 12: [[0, 1, 2], [3, 4, 5], [6, 7, 8]], 1_000: [list(range(9))]}[batch_tokens]
    for row, layer in zip(rows, layers, strict=True):
        each = [balance.maxvio(x) for x in loads_of(trace, layer.index, documents)]
        assert row["batches"] == len(documents) and row["n"] == 54 and row["batch_n"] == pytest.approx(54 / len(documents))
        assert row["batch"] == pytest.approx(np.mean(each)) == pytest.approx(batch_maxvio(trace, layer.index, batch_tokens))
        assert (row["least"], row["most"]) == (pytest.approx(min(each)), pytest.approx(max(each)))
        assert row["run"] == METRICS["maxvio"](trace)["value"][layer.index].as_py()
        assert row["chance_run"] + 1 == METRICS["chance_max_over_mean"](trace)["value"][layer.index].as_py()
        sizes = batch_loads(trace, layer.index, batch_tokens)[0]
        chance = [balance.chance_max_over_mean(n, layer.n_classes, layer.top_k) - 1 for n in sizes]
        assert row["chance_batch"] == pytest.approx(np.mean(chance))
    if batch_tokens == 1_000:  # one batch is the run
        assert [r["batch"] for r in rows] == pytest.approx([r["run"] for r in rows])


def test_uniform_batches_stay_below_their_chance_and_little_below() -> None:
    layers = (site(0, 16, 2),)
    row = maxvio_table(make_trace(layers, [make_part(layers, [500] * 40)]), 500).to_pylist()[0]
    assert 0.85 * row["chance_batch"] < row["batch"] < row["chance_batch"] and row["run"] < row["least"]


def uneven(tokens: int, documents: int, seed: int = 0) -> Trace:
    """One top-1 site of eight experts: half of all tokens go to expert 3, whatever their document."""
    layers = (site(0, 8, 1),)
    part = make_part(layers, [tokens] * documents)
    draw = np.random.default_rng(seed).choice(8, (tokens * documents, 1), p=[1 / 14] * 3 + [0.5] + [1 / 14] * 4).astype(np.int16)
    return make_trace(layers, [replace(part, routing=(SiteRouting(draw, part.routing[0].weights, draw),))])


def test_an_uneven_layer_is_not_an_unstable_one() -> None:
    """Tokens drawn alike in every document spread over batches as chance says, however uneven the layer; even tokens spread less."""
    skewed, even = uneven(200, 400), make_trace((site(0, 8, 1),), [make_part((site(0, 8, 1),), [200] * 400)])
    for trace, low in ((skewed, 0.9), (even, 0.4)):
        row = maxvio_table(trace, 200).to_pylist()[0]
        assert low < row["spread"] / row["chance_spread"] < 1.1 and least_stable(maxvio_table(trace, 200)) == (0, False)
    assert maxvio_table(skewed, 200)["batch"][0].as_py() > 2.5 > maxvio_table(even, 200)["batch"][0].as_py()


def test_the_layer_that_changes_with_its_batch_is_the_least_stable() -> None:
    """Site 0 sends every token to expert 0, always; site 1 sends odd documents there and spreads the even ones."""
    layers = (site(0, 8, 1), site(1, 8, 1))
    part = make_part(layers, [40] * 20)
    always = np.zeros((800, 1), np.int16)
    odd = (np.arange(800) // 40 % 2 == 1)[:, None]
    now = np.where(odd, 0, np.arange(800)[:, None] % 8).astype(np.int16)
    trace = make_trace(
        layers, [replace(part, routing=tuple(SiteRouting(e, r.weights, e) for e, r in zip((always, now), part.routing, strict=True)))]
    )
    table = maxvio_table(trace)
    assert table["batch"].to_pylist() == [7, 3.5] and table["spread"].to_pylist() == [0, pytest.approx(np.std([0, 7] * 10, ddof=1))]
    assert table["p95"].to_pylist() == [7, 7] and least_stable(table) == (1, True)
    assert least_stable(maxvio_table(trace, 10_000)) is None and math.isnan(maxvio_table(trace, 10_000)["spread"][0].as_py())


def test_sites_that_executed_nothing_have_no_batches() -> None:
    part = make_part(PLAIN, [9, 9])
    none = SiteRouting(np.full_like(part.routing[0].experts, -1), part.routing[0].weights, part.routing[0].chosen)
    trace = make_trace(PLAIN, [replace(part, routing=(none, part.routing[1]))])
    empty, ran = maxvio_table(trace).to_pylist()
    assert empty["batches"] == 0 and math.isnan(empty["batch"]) and math.isnan(empty["chance_batch"]) and ran["batches"] == 2
    assert dead_experts(trace).experts == 8
    counts_alone = maxvio_table(replace(trace, documents=trace.documents.slice(0, 0))).to_pylist()
    assert [r["batches"] for r in counts_alone] == [0, 0] and counts_alone[1]["run"] == ran["run"] and math.isnan(counts_alone[1]["batch"])


def test_dead_experts_are_counted_within_layers() -> None:
    found = dead_experts(layered(np.array([[3, 0, 5, 0], [2, 2, 2, 2], [0, 0, 0, 8]])))
    assert (found.dead, found.experts, found.at) == (5, 12, ((0, (1, 3)), (2, (0, 1, 2)))) and (found.documents, found.tokens) == (1, 8)
    assert found.chance == pytest.approx(3 * 4 * 0.75**8)


def test_along_the_text_and_by_label() -> None:
    trace = make_trace(TWO_STREAMS)
    for number in range(3):
        table = position_balance(trace, number).to_pylist()
        # lengths 5 3 9 6 3 9 7 3 9: the longest ends at position 8
        assert [(r["first"], r["last"], r["documents"]) for r in table] == [(0, 0, 9), (1, 2, 9), (3, 6, 6), (7, 8, 3)]
        rows = trace.stream_tokens(trace.layers[number].stream)
        for row in table:
            inside = (rows["position"].to_numpy() >= row["first"]) & (rows["position"].to_numpy() <= row["last"])
            experts = trace.experts(number)[inside]
            load = np.bincount(experts[experts >= 0], minlength=4)
            assert row["n"] == load.sum() and row["max_over_mean"] == pytest.approx(balance.max_over_mean(load), nan_ok=True)
        labels = label_balance(trace, number).to_pylist()
        assert [(r["label"], r["documents"]) for r in labels] == [("a", 5), ("b", 4)] and sum(r["n"] for r in labels) == len(rows)
    assert len(label_balance(make_trace(PLAIN, [make_part(PLAIN, [9], labels=(None,))]), 0)) == 0
    assert position_balance(make_trace(PLAIN, [make_part(PLAIN, [9, 20])]), 0)["n"].to_pylist() == [2, 4, 8, 10, 5]


def test_text_without_a_label_is_a_piece_of_its_own() -> None:
    trace = make_trace(PLAIN, [make_part(PLAIN, [30, 20, 10, 40], labels=("a", None, "b"))])
    rows = label_balance(trace, 1).to_pylist()
    assert [(r["label"], r["documents"], r["n"]) for r in rows] == [("a", 2, 70), ("b", 1, 10), (None, 1, 20)]
    assert rows[2]["max_over_mean"] == pytest.approx(balance.max_over_mean(loads_of(trace, 1, [[1]])[0]))


def test_late_positions_are_told_with_the_text_they_come_from() -> None:
    """Lengths 10 10 10 100 40, labels a b none a b: two of five documents reach position 15, 85 tokens of a and 25 of b."""
    trace = make_trace(PLAIN, [make_part(PLAIN, [10, 10, 10, 100, 40], labels=("a", "b", None, "a", "b"))])
    late = late_positions(trace, 0)
    assert late is not None and (late.first, late.documents, late.of, late.label) == (15, 2, 5, "a")
    assert late.share == pytest.approx(85 / 110) and late.overall == pytest.approx(110 / 170)
    unlabelled = late_positions(make_trace(PLAIN, [make_part(PLAIN, [10, 10, 10, 100, 40], labels=(None,))]), 0)
    assert unlabelled is not None and unlabelled.label is None and (unlabelled.first, unlabelled.documents) == (15, 2)
    assert late_positions(make_trace(PLAIN, [make_part(PLAIN, [20] * 4)]), 0) is None
