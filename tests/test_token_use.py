"""The tokens of an expert: planted ones are found, noise is none, documents that lean against loops, and the bound against exact tails."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import comb

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from analysis import reading, token_use
from analysis.reading import blocks
from analysis.significance import benjamini_hochberg, shares_p
from analysis.token_use import document_use, leading_ids, top_tokens, top_tokens_of
from analysis.trace import SiteRouting, Trace
from analysis.vocabulary import VARIANTS, input_tokens
from tests.synthetic import PLAIN, SPECIAL, TWO_STREAMS, make_part, make_trace, site, zipf_parts
from tests.test_vocabulary import by_id


def test_top_tokens_of_an_expert_that_serves_two_ids() -> None:
    part = make_part(PLAIN, [200] * 10)
    ids = part.tokens["token_id"].to_numpy()
    experts = part.routing[0].experts.copy()
    experts[experts == 5] = -1
    served = np.isin(ids, [3, 17])
    experts[served] = [5, 1]
    experts[:40:4] = np.where(served[:40:4, None], experts[:40:4], [5, 2])  # and a few others
    trace = make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])
    counts = input_tokens(trace, 0)
    found = top_tokens(trace, counts, 5, use=document_use(trace, counts))
    assert all((u.documents, u.leaning) == (10, 10) for u in found[:2]) and top_tokens(trace, counts, 5)[0].leaning is None
    assert {found[0].token_id, found[1].token_id} == {3, 17}
    for use in found[:2]:
        n = int((ids == use.token_id).sum())
        assert (use.count, use.tokens, use.share, use.text) == (n, n, 1, f"t{use.token_id}")
        assert use.lift == pytest.approx(2000 / (experts == 5).sum()) and use.p == 0.005
    assert all(use.lift > 1 and use.tokens >= 10 for use in found) and [u.lift for u in found] == sorted(
        (u.lift for u in found), reverse=True
    )
    assert len(top_tokens(trace, input_tokens(trace, 0), 5, most=1)) == 1


def test_top_tokens_of_random_routing_are_no_more_than_chance() -> None:
    """40 experts of random runs: p corrected for all ids is below 0.05 in 2 of them by chance; 8 or more has odds of 1 : 1,000."""
    claims = 0
    for seed in range(5):
        counts = input_tokens(make_trace(PLAIN, [make_part(PLAIN, [200] * 10, seed)]), 0)
        claims += sum(any(use.p <= 0.05 for use in top_tokens(make_trace(), counts, e)) for e in range(8))
    assert claims < 8


@pytest.mark.parametrize("layers", [PLAIN, TWO_STREAMS], ids=["plain", "streams"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [65_536, 7], ids=["whole", "cut"])
def test_documents_that_lean_by_hand(layers: tuple, variant: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "blocks", partial(blocks, rows=rows))
    trace = make_trace(layers, [make_part(layers, [60, 30, 40], seed=3, n_ids=6)])
    counts = VARIANTS[variant](trace, 0)
    found = document_use(trace, counts)
    table, experts = trace.stream_tokens(layers[0].stream).to_pandas(), trace.experts(0)
    key = {"input": table.token_id, "next": table.token_id.shift(-1).where(table.document.eq(table.document.shift(-1))),
           "predicted": table.predicted}[variant]  # fmt: skip
    for row, token in enumerate(counts.ids):
        holding = [d for d in range(3) if ((key == token) & (table.document == d)).any()]
        assert found.documents[row] == len(holding)
        for expert in range(layers[0].n_classes):
            uses = pd.Series((experts == expert).any(1))
            rate = [
                (uses[(key == token) & (table.document == d)].mean(), uses[key.notna() & (table.document == d)].mean()) for d in holding
            ]
            assert found.leaning[row, expert] == sum(here > there + 1e-12 for here, there in rate)
    assert document_use(replace(trace, load_tokens=None, source=None), counts) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_of_the_leading_ids_alone_are_those_of_all(variant: str) -> None:
    trace = make_trace(PLAIN, [make_part(PLAIN, [200] * 10)])
    counts = VARIANTS[variant](trace, 0)
    led = leading_ids(counts, range(counts.classes), most=2)
    whole, part = document_use(trace, counts), document_use(trace, counts, led)
    at = np.searchsorted(counts.ids, led)
    assert 0 < len(led) < len(counts.ids) and part.ids.tolist() == led.tolist()
    assert part.leaning.sum() > 0 and (part.leaning == whole.leaning[at]).all() and (part.documents == whole.documents[at]).all()
    named = [top_tokens_of(trace, counts, range(counts.classes), most=2, use=use) for use in (whole, part)]
    assert named[0] == named[1] and {t.token_id for uses in named[0] for t in uses} <= set(led.tolist())


def test_ties_go_to_what_most_documents_hold_whatever_is_counted_most() -> None:
    """Ids 0 to 3 go to expert 0 alone, so all lifts tie; id 0 is the most frequent, in one document, id 3 the rarest, in most."""
    token = np.repeat([[0] * 60 + [1] * 20 + [9] * 20, [9] * 45 + [1] * 20 + [2] * 15 + [3] * 5 + [9] * 15, [3] * 5 + [2] * 15 + [9] * 80, [3] * 5 + [9] * 95],
                      1, 0).ravel()  # fmt: skip
    part = make_part(PLAIN, [100] * 4)
    column = part.tokens.schema.get_field_index("token_id")
    tokens = part.tokens.set_column(column, part.tokens.schema.field(column), pa.array(token.astype(np.int32)))
    experts = np.where(token[:, None] < 9, [0, 1], [2, 1]).astype(np.int16)
    routing = SiteRouting(experts, part.routing[0].weights, experts)
    trace = make_trace(PLAIN, [replace(part, tokens=tokens, routing=(routing, routing))])
    counts = input_tokens(trace, 0)
    use = document_use(trace, counts, leading_ids(counts, [0], most=2))
    found = top_tokens(trace, counts, 0, most=2, use=use)
    assert [(t.token_id, t.documents, t.tokens) for t in found] == [(3, 3, 15), (1, 2, 40)] and found[0].lift == found[1].lift
    assert [t.token_id for t in top_tokens(trace, counts, 0, most=4)] == [0, 1, 2, 3]  # without documents by count


def test_top_tokens_of_an_unused_expert() -> None:
    trace = by_id()
    assert top_tokens(trace, input_tokens(trace, 0), 5, least=10**6) == ()
    counts = input_tokens(trace, 0)
    assert top_tokens(trace, replace(counts, classes=9), 8) == ()


def test_what_is_certain_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens stand far above chance, p is the same drawn or not; random routing is always drawn."""
    layers, reached = (site(0, 64, 1),), []
    trace = make_trace(layers, list(zipf_parts(layers, 20_000)))
    counts, bound = input_tokens(trace, 0), token_use._reached
    monkeypatch.setattr(token_use, "_reached", lambda *x: reached.append(bound(*x)) or reached[-1])
    found = top_tokens_of(trace, counts, range(64), most=1)
    certain = sum(token_use.DRAWS * x < token_use.CERTAIN for x in reached)
    assert all(found) and 5 < certain < 64
    monkeypatch.setattr(token_use, "_reached", lambda *x: 1.0)
    assert top_tokens_of(trace, counts, range(64), most=1) == found
    random = make_trace(PLAIN, [make_part(PLAIN, [200] * 10)])
    reached.clear()
    monkeypatch.setattr(token_use, "_reached", lambda *x: reached.append(bound(*x)) or reached[-1])
    top_tokens_of(random, input_tokens(random, 0), range(8))
    assert reached and min(reached) > 0.01


@pytest.mark.parametrize(("dealt", "rate"), [([8], 0.1), ([8, 8, 30], 0.1), ([40, 5], 0.6), ([3], 0.9)])
def test_the_bound_is_one(dealt: list[int], rate: float) -> None:
    """Against the binomial's exact tails, which those without return lie below."""
    for standing in (0.0, 0.2, 0.5, 1.0, 1.5, 2.5):
        exact = 0.0
        for n in dealt:
            least = int(np.ceil(rate * n + standing * (1 - 1e-6) * np.sqrt(n)))
            exact += sum(comb(n, x) * rate**x * (1 - rate) ** (n - x) for x in range(least, n + 1))
        bound = token_use._reached(*np.unique(dealt, return_counts=True), rate, standing)
        assert exact <= bound * (1 + 1e-9) and bound <= len(dealt)
        assert bound > 0 or exact == 0


@pytest.mark.parametrize("layers", [PLAIN, SPECIAL, TWO_STREAMS], ids=["plain", "special", "streams"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1 << 16, 7], ids=["whole", "cut"])
def test_shares_of_documents_by_loops(layers: tuple, variant: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "blocks", partial(blocks, rows=rows))
    trace = make_trace(layers, [make_part(layers, [60, 1, 30, 40], seed=3, n_ids=6)])
    counts = VARIANTS[variant](trace, 0)
    ids = counts.ids[::2]
    use = document_use(trace, counts, ids, least=5)
    assert use is not None
    found = use.tests
    table, experts = trace.stream_tokens(layers[0].stream).to_pandas(), trace.experts(0)
    key = {"input": table.token_id, "next": table.token_id.shift(-1).where(table.document.eq(table.document.shift(-1))),
           "predicted": table.predicted}[variant]  # fmt: skip
    for row, token in enumerate(ids):
        holding = [d for d in range(4) if ((key == token) & (table.document == d)).any()]
        for expert in range(layers[0].n_classes):
            uses = pd.Series((experts == expert).any(1))
            share = sum(uses[(key == token) & (table.document == d)].mean() for d in holding)
            rate = sum(uses[key.notna() & (table.document == d)].mean() for d in holding)
            assert found.p[row, expert] == pytest.approx(float(shares_p(np.array(share), np.array(rate), np.array(len(holding)))))
    family = int((counts.tokens >= 5).sum()) * layers[0].n_classes
    assert found.family == family > found.p.size and np.array_equal(found.q, benjamini_hochberg(found.p, family))


def served(only: list[int]) -> Trace:
    """20 documents of 100 tokens; id 3 goes to expert 5, in the documents ``only``."""
    part = make_part(PLAIN, [100] * 20)
    experts, ids = part.routing[0].experts.copy(), part.tokens["token_id"].to_numpy()
    mine = (ids == 3) & np.isin(part.tokens["document"].to_numpy(), only)
    experts[mine] = [5, 1]
    return make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])


def test_what_all_documents_do_is_found_and_the_habit_of_two_is_not() -> None:
    for only, claimed in ((list(range(20)), True), ([0, 1], False)):
        trace = served(only)
        counts = input_tokens(trace, 0)
        use = document_use(trace, counts, leading_ids(counts, range(8)))
        assert use is not None
        told = {(t.token_id, e): t for e, uses in enumerate(top_tokens_of(trace, counts, range(8), use=use)) for t in uses}
        assert (told[3, 5].q <= 0.05) == claimed and (told[3, 5].p_documents, told[3, 5].q) == (
            use.tests.p[np.searchsorted(use.ids, 3), 5], use.tests.q[np.searchsorted(use.ids, 3), 5])  # fmt: skip
        assert {k for k, t in told.items() if t.q <= 0.05} <= {(3, 5), (3, 1)}
    assert top_tokens_of(trace, counts, [5])[0][0].q is None


def test_a_word_repeated_by_one_document_counts_once() -> None:
    part = make_part(PLAIN, [100] * 20)
    ids, experts = part.tokens["token_id"].to_numpy().copy(), part.routing[0].experts.copy()
    ids[ids == 3] = 4
    ids[:60], experts[:60] = 3, [5, 1]
    column = part.tokens.schema.get_field_index("token_id")
    tokens = part.tokens.set_column(column, part.tokens.schema.field(column), [ids.astype(np.int32)])
    trace = make_trace(
        PLAIN, [replace(part, tokens=tokens, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))]
    )
    found = top_tokens_of(trace, input_tokens(trace, 0), [5], use=document_use(trace, input_tokens(trace, 0)))[0]
    habit = next(t for t in found if t.token_id == 3)
    assert habit.p == 0.005 and habit.documents == 1 and habit.p_documents > 0.3 and habit.q == 1
