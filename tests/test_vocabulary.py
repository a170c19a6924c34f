"""Counts by id against loops; what token ids explain, in noise and where they explain all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analysis import reading, vocabulary
from analysis.information import sparse_information
from analysis.reading import blocks
from analysis.specialization import label_information
from analysis.token_use import document_use
from analysis.trace import SiteRouting, Trace, TraceError
from analysis.vocabulary import (
    VARIANTS,
    TokenCounts,
    context_independence,
    input_tokens,
    predicted_tokens,
    predicts,
    token_texts,
    vocabulary_specialization,
    vocabulary_table,
)
from tests.counters import read_counters
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_trace
from tests.test_token_classes import of_text


def test_texts_of_ids() -> None:
    trace = of_text()
    recorded = dict(zip(trace.tokens["token_id"].to_pylist(), trace.tokens["token"].to_pylist(), strict=True))
    ids = np.array([49, 0, 7, 1_000_000])
    assert token_texts(trace, ids) == tuple(recorded.get(i) for i in ids.tolist())
    assert token_texts(trace, np.array([], int)) == () and token_texts(replace(trace, load_tokens=None), ids) == (None,) * 4


def test_texts_are_read_no_further_than_the_last_id_that_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ids 0 to 4, one a row: 3 is met in the second block of two rows, 4 not before the third, an unknown one never."""
    monkeypatch.setattr(vocabulary, "ROWS", 2)
    part = make_part(PLAIN, [5], token_ids=np.arange(5, dtype=np.int32))
    trace, read = make_trace(PLAIN, [part]), []
    whole = trace.stream_tokens("decoder")
    told = replace(
        trace, load_rows=lambda stream, start, stop, columns: read.append(start) or whole.slice(start, stop - start).select(columns)
    )
    for ids, texts, starts in (([3, 0], ("t3", "t0"), [0, 2]), ([1], ("t1",), [0]), ([9, 4], (None, "t4"), [0, 2, 4]), ([], (), [])):
        assert token_texts(told, np.array(ids, np.int64)) == texts and read == starts
        read.clear()


def test_one_deal_serves_both_figures_and_margins_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor is the mean plug-in of whole tables dealt again; the first of them is dealt once for context independence and eq. 8."""
    seeds, deal = [], vocabulary.shuffled_tables
    monkeypatch.setattr(vocabulary, "shuffled_tables", lambda *x: seeds.extend(x[-1]) or deal(*x))
    counts = input_tokens(by_id(), 0)
    alone = context_independence(counts)
    vocabulary_specialization(counts)
    assert sorted(seeds) == [0, 1, 2, 3, 4]
    tables = deal(counts.row, counts.expert, counts.count, counts.classes, range(5))
    assert alone.floor == np.mean([sparse_information(*t)[0] for t in tables])
    vocabulary_specialization(replace(counts, count=counts.count * 2))
    assert sorted(seeds) == [0, 0, 1, 2, 3, 4]
    monkeypatch.setattr(vocabulary, "ALIKE", 4_000)
    fewer = context_independence(counts)
    tables = deal(counts.row, counts.expert, counts.count, counts.classes, range(2))
    assert fewer.floor == np.mean([sparse_information(*t)[0] for t in tables])
    assert fewer.null == "assignments dealt again, 2 times" != alone.null


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_counts_by_input_next_and_predicted_token_are_those_of_the_decisions(layers: tuple) -> None:
    trace = make_trace(layers)
    for layer in layers:
        table = trace.stream_tokens(layer.stream).to_pandas()
        experts = trace.experts(layer.index)
        following = table.token_id.shift(-1).where(table.document.eq(table.document.shift(-1)))
        assert list(VARIANTS) == ["input", "next", "predicted"]
        for counts, ids in zip(
            (f(trace, layer.index) for f in VARIANTS.values()), (table.token_id, following, table.predicted), strict=True
        ):
            cells: dict[tuple[int, int], int] = {}
            for token, row in zip(ids, experts, strict=True):
                for e in row[row >= 0] if token == token else ():
                    cells[int(token), int(e)] = cells.get((int(token), int(e)), 0) + 1
            mine = {(int(counts.ids[r]), int(e)): int(n) for r, e, n in zip(counts.row, counts.expert, counts.count, strict=True)}
            assert mine == cells
            seen = {int(t): int(n) for t, n in zip(counts.ids, counts.tokens, strict=True) if n}
            assert seen == {int(t): int(n) for t, n in ids.dropna().value_counts().items()}


def test_a_run_without_predictions_says_so() -> None:
    part = make_part(PLAIN, [9])
    column = part.tokens.schema.get_field_index("predicted")
    trace = make_trace(PLAIN, [replace(part, tokens=part.tokens.set_column(column, "predicted", pa.nulls(9, pa.int32())))])
    assert predicts(make_trace()) and not predicts(trace) and not predicts(replace(trace, load_tokens=None))
    with pytest.raises(TraceError, match="predicted next token is not known"):
        predicted_tokens(trace, 0)


def test_dropped_assignments_without_tokens_leave_occurrences_unknown() -> None:
    trace = make_trace(TWO_STREAMS)
    with pytest.raises(TraceError, match="statistics only"):
        input_tokens(replace(trace, load_tokens=None, source=None), 0)
    plain = make_trace()
    mine, other = input_tokens(replace(plain, load_tokens=None, source=None), 0), input_tokens(plain, 0)
    assert mine.tokens.tolist() == other.tokens.tolist()


def by_id(part_seed: int = 0) -> Trace:
    """Site 0 routes by token id alone, site 1 at random."""
    part = make_part(PLAIN, [200] * 10, part_seed)
    ids = part.tokens["token_id"].to_numpy()
    experts = np.stack([ids % 8, (ids + 1 + ids // 8 % 3) % 8], 1).astype(np.int16)
    return make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])


def test_context_independence_at_its_two_ends() -> None:
    trace = by_id()
    alone, random = (context_independence(input_tokens(trace, s)) for s in (0, 1))
    assert alone.plug_in == pytest.approx(alone.entropy_y - 1, abs=1e-9)  # two experts for each id, equally often: 1 bit is left
    assert alone.n == random.n == 4000 and alone.p == pytest.approx(1 / 6)
    assert random.plug_in > 0.03 and abs(random.corrected) < 0.02 and abs(random.above_floor) < 0.02
    assert alone.ceiling == pytest.approx(alone.plug_in) and alone.share == pytest.approx(
        1
    )  # a token's other expert is left open by no router
    assert random.ceiling == pytest.approx(random.entropy_y - 1) and abs(random.share) < 0.01


def test_tokens_that_differ_in_their_number_of_experts_have_no_bits_left_open_for_sure() -> None:
    part = make_part(PLAIN, [200] * 10)
    experts = part.routing[0].experts.copy()
    experts[part.tokens["token_id"].to_numpy() % 3 == 0, 1] = -1
    trace = make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])
    for site_, each in ((0, 1), (1, 2)):
        for count in VARIANTS.values():
            counts = count(trace, site_)
            alone = context_independence(counts)
            assert counts.each == each and alone.ceiling == min(alone.entropy_x, alone.entropy_y - np.log2(each))
        found = label_information(trace, site_)
        assert found.ceiling == min(found.entropy_x, found.entropy_y - np.log2(each)) < found.entropy_y


def test_vocabulary_specialization_by_hand() -> None:
    #   id 0: 12 tokens, 9 to expert 1; id 1: 1 token; id 2: 20 tokens, 20 to expert 0. k = 1
    counts = TokenCounts(0, "input token", 3, np.arange(3), np.array([12, 1, 20]), np.array([0, 0, 1, 2]), np.array([1, 2, 2, 0]),
                         np.array([9, 3, 1, 20]))  # fmt: skip
    found = vocabulary_specialization(counts, least=10)
    assert found.every == pytest.approx((0.75 + 1 + 1) / 3) and found.frequent == pytest.approx((0.75 + 1) / 2)
    assert found.weighted == pytest.approx((9 + 1 + 20) / 33)
    assert (found.n_ids, found.n_frequent, found.n_tokens, found.least) == (3, 2, 33, 10)
    assert vocabulary_specialization(counts, least=12).n_frequent == 2 and vocabulary_specialization(counts, least=13).n_frequent == 1
    assert found.chance_weighted < found.weighted and vocabulary_specialization(counts, least=21).n_frequent == 0
    assert np.isnan(vocabulary_specialization(counts, least=21).frequent)


@pytest.mark.parametrize("kind", ["next", "predicted"])
def test_tables_too_large_to_count_whole_are_sorted_to_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace(TWO_STREAMS)
    whole = VARIANTS[kind](trace, 1)
    monkeypatch.setattr(vocabulary, "ROWS", 0)  # no table is small enough
    monkeypatch.setattr(vocabulary, "blocks", partial(blocks, rows=7))  # pieces that cut documents
    pieces = VARIANTS[kind](trace, 1)
    assert [x.tolist() for x in (pieces.row, pieces.expert, pieces.count)] == [x.tolist() for x in (whole.row, whole.expert, whole.count)]
    monkeypatch.undo()
    use = document_use(trace, whole)
    monkeypatch.setattr(reading, "blocks", partial(blocks, rows=7))
    cut = document_use(trace, whole)
    assert use is not None and cut is not None and use.leaning.sum() > 0 and (cut.leaning == use.leaning).all()


def test_the_table_of_some_layers_is_its_part_of_the_whole() -> None:
    trace = make_trace(TWO_STREAMS)
    assert repr(vocabulary_table(trace, layers=[1]).to_pylist()) == repr([r for r in vocabulary_table(trace).to_pylist() if r["site"] == 1])


def test_vocabulary_specialization_beside_chance() -> None:
    trace = by_id()
    alone, random = (vocabulary_specialization(input_tokens(trace, s)) for s in (0, 1))
    assert alone.every == alone.weighted == 1 and alone.chance_weighted < 0.5
    assert abs(random.weighted - random.chance_weighted) < 0.02 and random.weighted > 0.25  # uniform k / E, and the largest of 8


def test_vocabulary_specialization_of_olmoe_on_github(real: Path) -> None:
    """Layer 0 of the released counts: 98.4 % over all ids, 95.1 % from 10 occurrences, 90.8 % by token; much of it is chance."""
    released = read_counters(real / "olmoe" / "olmoe" / "eid2token_github.pkl")[0]
    cells = np.array([(token, expert, n) for expert, counts in released.items() for token, n in counts.items()])
    ids, row = np.unique(cells[:, 0], return_inverse=True)
    total = np.bincount(row, cells[:, 2]).astype(int)
    assert not (total % 8).any()
    found = vocabulary_specialization(TokenCounts(0, "input token", 64, ids, total // 8, row, cells[:, 1], cells[:, 2]))
    assert [round(100 * x, 1) for x in (found.every, found.frequent, found.weighted)] == [98.4, 95.1, 90.8]
    assert found.n_tokens == 208896 and found.chance_every > 0.8
