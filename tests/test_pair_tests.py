"""Tests of pairs of experts against loops and sets written out, against noise, and against planted pairs."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from analysis import bittables, pair_tests
from analysis.chance_pairs import add_fixed_odds
from analysis.pair_tests import (
    LAST_SITE,
    NO_DECISIONS,
    NO_PAIRS,
    ONE_DOCUMENT,
    TOO_MANY,
    PairTest,
    coactivation_test,
    count_units,
    flow_test,
)
from analysis.significance import ALPHA, benjamini_hochberg, count_p
from analysis.trace import SiteRouting, Trace
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_trace, site

TESTS = {"pairs": coactivation_test, "flow": flow_test}


def routed(experts: list[np.ndarray], lengths: list[int], classes: int) -> Trace:
    """A trace with these experts [tokens, k] at its sites."""
    layers = tuple(site(i, classes, x.shape[1]) for i, x in enumerate(experts))
    part = make_part(layers, lengths)
    routing = tuple(SiteRouting(x.astype(np.int16), old.weights, x.astype(np.int16)) for x, old in zip(experts, part.routing, strict=True))
    return make_trace(layers, [replace(part, routing=routing)])


class _Given:
    """A source of these decisions, whatever an invariant would say of them."""

    def __init__(self, routing: tuple[SiteRouting, ...]) -> None:
        self.routing = routing

    def experts(self, site: int, start: int, stop: int) -> np.ndarray:
        return self.routing[site].experts[start:stop]


def drawn(seed: int, lengths: list[int], classes: int = 6, k: int = 2, spread: float = 1.0) -> list[np.ndarray]:
    """Two sites; each document has loads of its own, and within it experts are drawn at fixed odds without regard to each other."""
    rng, sites = np.random.default_rng(seed), []
    every = np.array(list(combinations(range(classes), k)))
    for _ in range(2):
        odds = spread * rng.normal(size=(len(lengths), classes))
        weight = np.exp(odds[:, every].sum(2))
        sites.append(np.concatenate([every[rng.choice(len(every), n, p=w / w.sum())] for n, w in zip(lengths, weight, strict=True)]))
    return sites


def fixed_odds(load: list[int] | np.ndarray, sizes: list[int]) -> np.ndarray:
    """float64 [E, E]: expected pairs of experts with these loads, where so many tokens have 0..k of them; diagonal 0."""
    out, spread = np.zeros((len(load), len(load))), np.zeros((len(load), len(load)))
    add_fixed_odds(np.array(load), np.array(sizes), out, spread)
    rest = 1 - np.array(load) / max(sum(sizes), 1)
    np.testing.assert_allclose(spread, out * rest[:, None] * rest, atol=1e-9)
    return out + out.T


def planted(seed: int = 0, documents: int = 40) -> Trace:
    """Experts 1 and 2 together, and expert 3 followed by 5, in a quarter of the tokens of ``documents``."""
    lengths = [60] * documents
    experts = drawn(seed, lengths)
    rng = np.random.default_rng(seed)
    some = rng.random(len(experts[0])) < 0.25
    experts[0][some] = [1, 2]
    after = (experts[0] == 3).any(1) & (rng.random(len(some)) < 0.9)
    experts[1][after] = [5, 0]
    return routed(experts, lengths, 6)


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_pairs_of_units_are_those_of_the_decisions(layers: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace(layers)
    monkeypatch.setattr(pair_tests, "ROWS", 7)  # blocks cut documents
    for layer in layers:
        after = trace.stats.following[layer.index]
        for other in {layer.index} | ({after} - {None}):
            rows = [r for r in trace.documents.to_pylist() if r["stack"] == layer.stream and r["n_tokens"]]
            found = count_units(trace, [(layer.index, other)], np.array([r["n_tokens"] for r in rows]))[0]
            assert len(found.tables) == len(rows)
            expected = np.zeros(found.expected.shape)
            for unit, row in enumerate(rows):
                at = slice(row["first_row"], row["first_row"] + row["n_tokens"])
                want = np.zeros(found.expected.shape, int)
                here, there = trace.experts(layer.index)[at], trace.experts(other)[at]
                for a, b in zip(here, there, strict=True):
                    for e, f in product(a[a >= 0], b[b >= 0]):
                        want[e, f] += 1
                assert np.array_equal(found.tables[unit], want)
                if other == layer.index:
                    mine = np.triu(fixed_odds(want.diagonal(), np.bincount((here >= 0).sum(1), minlength=layer.top_k + 1).tolist()))
                    want = np.triu(want, 1)
                else:
                    mine = np.outer(want.sum(1), want.sum(0)) / max(want.sum(), 1)
                np.testing.assert_allclose(np.where(mine, found.excess[unit], 0), np.where(mine, want - mine, 0), atol=1e-5)
                expected += mine
            np.testing.assert_allclose(found.expected, expected, atol=1e-9)


@pytest.mark.parametrize("fault", ["none", "missing", "twice"])
@pytest.mark.parametrize("shape", [((6, 2), (6, 2)), ((64, 8), (40, 5)), ((3, 1), (6, 2))], ids=["small", "wide", "one"])
def test_pairs_by_bits_are_those_row_by_row(shape: tuple, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks and units that documents cross; a row with no expert, or one twice, is looked at on its own, with its block."""
    (e, k), (f, j) = shape
    rng, lengths = np.random.default_rng(0), [700, 3, 1, 1_300, 64, 640, 9]
    n, sites = sum(lengths), []
    for classes, each in shape:
        sites.append(rng.random((n, classes)).argpartition(each - 1)[:, :each])
    if fault == "missing":
        sites[0][1_500, 0] = -1
    elif fault == "twice" and k > 1:
        sites[0][1_500, 0] = sites[0][1_500, 1]
    layers = site(0, e, k), site(1, f, j)
    part = make_part(layers, lengths)
    routing = tuple(SiteRouting(x.astype(np.int16), old.weights, x.astype(np.int16)) for x, old in zip(sites, part.routing, strict=True))
    trace, asked = make_trace(layers, [part]), [(0, 0), (0, 1)]
    trace = replace(trace, source=_Given(routing))
    monkeypatch.setattr(pair_tests, "ROWS", 600)
    monkeypatch.setattr(pair_tests, "MOST_UNITS", 3)
    by_words, rows = [], pair_tests._rows
    monkeypatch.setattr(pair_tests, "_rows", lambda *a: by_words.append(rows(*a)) or by_words[-1])
    found = count_units(trace, asked, np.array(lengths))
    used = [all(len(x.words) for x in some.values()) for some in by_words]
    assert len(used) == -(-n // 600) and sum(used) == len(used) - (fault != "none" and (k > 1 or fault == "missing"))
    monkeypatch.setattr(bittables, "worth_bits", lambda *_: False)
    for mine, other in zip(found, count_units(trace, asked, np.array(lengths)), strict=True):
        for name in ("tables", "excess", "expected", "spread"):
            assert np.array_equal(getattr(mine, name), getattr(other, name)), name
    assert not any(len(x.words) for some in by_words[len(used) :] for x in some.values())


def test_pairs_of_several_sites_are_tested_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As each alone, to the bit; one after the other where their tables would not fit together. Progress goes on over all passes."""
    trace, told, read, count = planted(), list[tuple[int, int]](), list[list[tuple[int, int]]](), pair_tests.count_units
    asked = [("flow", 0), ("pairs", 1), ("pairs", 0), ("flow", 1)]
    alone = [TESTS[kind](trace, at) for kind, at in asked]
    monkeypatch.setattr(pair_tests, "count_units", lambda t, pairs, *x: read.append(list(pairs)) or count(t, pairs, *x))
    for room, passes in ((pair_tests.TABLE_BYTES, [[(0, 1), (1, 1), (0, 0)]]), (4 * 36 * 400, [[(0, 1)], [(1, 1)], [(0, 0)]])):
        monkeypatch.setattr(pair_tests, "TABLE_BYTES", room)
        read.clear(), told.clear()
        found = pair_tests.pair_tests(trace, asked, lambda done, total: told.append((done, total)))
        assert read == passes and told == [(2_400 * (i + 1), 2_400 * len(passes)) for i in range(len(passes))]
        for one, other in zip(found, alone, strict=True):
            for name in ("low", "high", "p", "q", "significant"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert (one.method, one.missing, one.units, one.documents) == (other.method, other.missing, other.units, other.documents)


def test_many_documents_are_joined_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, lengths = planted(), np.full(40, 60)
    whole = count_units(trace, [(0, 1)], lengths)[0]
    monkeypatch.setattr(pair_tests, "TABLE_BYTES", 4 * 6 * 6 * 8)
    joined = count_units(trace, [(0, 1)], lengths)[0]
    assert len(joined.tables) == 8 and np.array_equal(joined.tables, whole.tables.reshape(8, 5, 6, 6).sum(1))
    np.testing.assert_allclose(joined.excess, whole.excess.reshape(8, 5, 6, 6).sum(1), atol=1e-4)  # of single documents' loads
    np.testing.assert_allclose([joined.expected, joined.spread], [whole.expected, whole.spread])
    assert "8 groups of whole documents (40 in all)" in flow_test(trace, 0).method


@pytest.mark.parametrize("sizes", [[0, 0, 50], [0, 0, 0, 40], [3, 5, 20, 30, 10]])
def test_expected_pairs_against_every_set_written_out(sizes: list[int]) -> None:
    """Given odds give loads and pairs by summing over all sets; from the loads alone the pairs come back."""
    odds, load, pairs = np.array([0.2, 0.5, 1, 1, 4, 30.0]), np.zeros(7), np.zeros((7, 7))  # and one never used
    for m, tokens in enumerate(sizes):
        sets = list(combinations(range(6), m))
        weight = np.array([odds[list(s)].prod() for s in sets])
        for s, w in zip(sets, weight / weight.sum(), strict=True):
            load[list(s)] += tokens * w
            for e, f in product(s, s):
                pairs[e, f] += tokens * w * (e != f)
    found = fixed_odds(np.rint(1e6 * load).astype(np.int64), [10**6 * m for m in sizes]) / 1e6
    np.testing.assert_allclose(found, pairs, atol=2e-5)
    if len(sizes) > 3:
        assert np.abs(found - np.outer(load, load) / sum(sizes) * (1 - np.eye(7))).max() > 0.1  # else the product would do


def test_an_expert_of_every_token_leaves_no_lean() -> None:
    found = fixed_odds([10, 7, 3, 0], [0, 0, 10])
    np.testing.assert_allclose(found[0], [0, 7, 3, 0], atol=1e-6)
    np.testing.assert_allclose(found[1:, 1:], 0, atol=1e-6)


@pytest.mark.parametrize("kind", TESTS)
def test_against_slow_loops(kind: str) -> None:
    """7 documents: every sign pattern, cell by cell; intervals from the same draws of documents, one at a time."""
    lengths = [30, 20, 40, 25, 35, 30, 20]
    trace = routed(drawn(3, lengths), lengths, 6)
    found = TESTS[kind](trace, 0)
    tables = count_units(trace, [(0, 0 if kind == "pairs" else 1)], np.array(lengths))[0].tables
    weights = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), 1000)
    for e, f in combinations(range(6), 2):
        observed, expected, spread = tables[:, e, f], [], 0.0
        for t, n in zip(tables, lengths, strict=True):
            one, two = (t[e, e], t[f, f]) if kind == "pairs" else (t[e].sum() / 2, t[:, f].sum() / 2)  # tokens that use the experts
            expected.append(fixed_odds(np.diag(t), [0, 0, n])[e, f] if kind == "pairs" else one * two / n)
            spread += expected[-1] * (1 - one / n) * (1 - two / n)
        lean, mean = observed - np.array(expected), np.array([sum(expected)])
        p = np.mean([abs(np.dot(signs, lean)) >= abs(lean.sum()) - 1e-6 for signs in product((1, -1), repeat=7)])
        assert found.p[e, f] == pytest.approx(max(p, count_p(observed.sum()[None], mean, np.array([spread]))[0]), rel=1e-4)
        if kind == "flow":
            some = [np.tensordot(w, tables, 1) for w in weights]
            lift = [t[e, f] * t.sum() / (t[e].sum() * t[:, f].sum()) for t in some]
            np.testing.assert_allclose([found.low[e, f], found.high[e, f]], np.percentile(lift, [2.5, 97.5]))
    cells = found.p[np.triu_indices(6, 1)] if kind == "pairs" else found.p.ravel()
    q = found.q[np.triu_indices(6, 1)] if kind == "pairs" else found.q.ravel()
    np.testing.assert_allclose(q, benjamini_hochberg(cells))
    assert found.tested == len(cells) and (found.units, found.documents) == (7, 7)


@pytest.mark.parametrize(("kind", "k"), [("pairs", 2), ("pairs", 3), ("flow", 2)])
def test_random_routing_shows_nothing(kind: str, k: int) -> None:
    """200 runs whose documents differ in their loads: all claims are false, and at most 5% of the runs make any (binomial bound)."""
    claimed, small = 0, []
    for seed in range(200):
        lengths = [25] * 20
        found = TESTS[kind](routed(drawn(seed, lengths, k=k), lengths, 6), 0)
        claimed += found.claimed > 0
        small.append(np.nanmean(found.p <= ALPHA))
    assert claimed <= 18  # P(more of 200 at 5%) < 1%
    assert 0.002 < np.mean(small) < 0.06  # neither blind nor wild


@pytest.mark.parametrize("kind", TESTS)
def test_planted_pairs_are_found(kind: str) -> None:
    found = TESTS[kind](planted(), 0)
    cell = (1, 2) if kind == "pairs" else (3, 5)
    assert found.significant[cell] and found.q[cell] < 0.001
    assert 1 < found.low[cell] < found.counts.lift[cell] < found.high[cell]
    assert found.claimed == found.significant.sum() / (2 if kind == "pairs" else 1) and not found.missing


def test_documents_that_differ_are_no_partners() -> None:
    """Half of the documents use experts 0 to 2, half 3 to 5: lift is far from 1, but within each document all meet by chance."""
    lengths = [60] * 40
    experts = drawn(0, lengths, 3, spread=0.2)
    shift = 3 * (np.repeat(np.arange(40), 60) % 2)[:, None]
    trace = routed([x + shift for x in experts], lengths, 6)
    for kind, test in TESTS.items():
        found = test(trace, 0)
        assert np.nanmax(found.counts.lift) > 1.8 and not found.claimed, kind


def test_a_partnership_is_found_where_documents_of_two_topics_are_joined() -> None:
    """Half of 900 documents use experts 0 to 4, half 5 to 9; in a fifth of the tokens of the first, 1 goes with 2, and 3 follows 0."""
    lengths = [12] * 900
    first, second = drawn(0, lengths, 5, spread=0.2)
    one, some = np.repeat(np.arange(900) % 2 == 0, 12), np.random.default_rng(0).random(12 * 900) < 0.2
    first[some & one] = [1, 2]
    second[(first == 0).any(1) & one & (np.random.default_rng(1).random(len(one)) < 0.5)] = [3, 4]
    together, onward = (test(routed([x + 5 * ~one[:, None] for x in (first, second)], lengths, 10), 0) for test in TESTS.values())
    assert "400 groups of whole documents (900 in all)" in together.method
    assert together.significant[1, 2] and onward.significant[0, 3]
    for found in (together, onward):
        assert not found.significant[:5, 5:].any() and not found.significant[5:, :5].any()  # they never meet
        assert np.nanmin(found.counts.lift[5:, 5:]) > 1.5 and found.significant[5:, 5:].sum() <= 2  # of 25, beside true claims


def test_intervals_hold_the_lift_of_other_documents() -> None:
    held, truth = [], TESTS["flow"](planted(99, 2000), 0).counts.lift
    for seed in range(20):
        found = flow_test(planted(seed), 0)
        held.append((found.low <= truth) & (truth <= found.high))
    assert 0.8 < np.mean(held) <= 1


@pytest.mark.parametrize("kind", TESTS)
def test_other_numbers_of_experts_give_the_same_in_other_places(kind: str) -> None:
    trace, order = planted(), np.array([3, 0, 5, 1, 4, 2])
    found = TESTS[kind](trace, 0)
    other = TESTS[kind](routed([order[trace.experts(i)] for i in range(2)], [60] * 40, 6), 0)
    for name in ("p", "q", "low", "high", "significant"):
        np.testing.assert_allclose(getattr(other, name)[np.ix_(order, order)], getattr(found, name), rtol=1e-4, atol=1e-7)


def test_a_rare_pair_that_was_never_seen_is_no_finding() -> None:
    """Expected 0.02 times in each of 100 documents: all lean one way, and nothing follows from it."""
    excess, mean = np.full((100, 1), -0.02, np.float32), np.array([2.0])
    p = pair_tests._p_values(excess, mean, mean, 0)[0]
    assert 0.05 < p[0] < 0.3
    assert pair_tests._p_values(excess * 1000, mean * 1000, mean * 1000, 0)[0][0] < 1e-20


def test_what_cannot_be_tested_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coactivation_test(make_trace(PLAIN, [make_part(PLAIN, [50])]), 0).missing == ONE_DOCUMENT
    two = make_trace(PLAIN, [make_part(PLAIN, [50, 50])])
    assert "Too few documents" in flow_test(two, 0).missing and flow_test(two, 1).missing == LAST_SITE
    monkeypatch.setattr(pair_tests, "TABLE_BYTES", 4 * 36 * 5)
    assert flow_test(planted(), 0).missing == TOO_MANY
    single = (site(0, 8, 1), site(1, 8, 1))
    assert coactivation_test(make_trace(single), 0).missing == NO_PAIRS
    for test in TESTS.values():
        found = test(replace(two, source=None), 0)
        assert found.missing == NO_DECISIONS and np.isnan(found.p).all() and found.counts.n > 0


def test_dead_experts_and_the_diagonal_are_unknown() -> None:
    lengths = [40] * 12
    trace = routed(drawn(0, lengths, 5), lengths, 6)  # expert 5 is never used
    for kind, test in TESTS.items():
        found = test(trace, 0)
        gone = np.zeros((6, 6), bool)
        gone[5], gone[:, 5] = True, True
        if kind == "pairs":
            gone |= np.eye(6, dtype=bool)
        assert np.array_equal(np.isnan(found.p), gone) and np.array_equal(np.isnan(found.q), gone) and not found.significant[gone].any()


def test_the_table_has_one_row_per_cell_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    found: PairTest = flow_test(planted(), 0, lambda done, total: told.append((done, total)))
    table = found.table()
    assert table.num_rows == 36 and told == [(2400, 2400)]
    row = table.to_pylist()[3 * 6 + 5]
    assert (row["expert"], row["other"], row["units"], row["significant"]) == (3, 5, 40, True)
    assert row["log2_lift"] == pytest.approx(np.log2(row["lift"])) and row["lift"] == row["observed"] / row["expected"]
