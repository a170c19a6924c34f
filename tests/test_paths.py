"""Pairs of experts against loops and against what loads alone give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.paths import coactivation, flow, quasi_independent, saturation
from analysis.trace import SiteRouting, TraceError
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_parts, make_trace, weighted_trace


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_coactivation_counts(layers: tuple) -> None:
    trace = make_trace(layers)
    for layer in layers:
        found, experts = coactivation(trace, layer.index), trace.experts(layer.index)
        uses = np.array([(experts == e).any(1) for e in range(layer.n_classes)]).astype(int)
        both = uses @ uses.T
        np.fill_diagonal(both, 0)
        assert np.array_equal(found.observed, both) and found.n == both.sum() // 2
        e = int(uses.sum(1).argmax())
        np.testing.assert_allclose(np.delete(found.share[e], e), np.delete(both[e] / uses[e].sum(), e))
        assert np.isnan(found.lift.diagonal()).all() and np.isnan(found.share.diagonal()).all()
        assert found.chance_share == (layer.top_k - 1) / (layer.n_classes - 1)


def test_uneven_loads_alone_make_no_partners() -> None:
    """Where experts are drawn without regard to each other lift is 1; n_i n_j / n would call every pair rare."""
    trace = weighted_trace(2)
    found = coactivation(trace, 0)
    off = ~np.eye(8, dtype=bool)
    assert np.abs(found.residual[off]).max() < 3.5 and np.average(found.lift[off], weights=found.expected[off]) == pytest.approx(1)
    np.testing.assert_allclose(found.expected.sum(0), found.observed.sum(0), rtol=1e-6)
    load = trace.stats.load(0)
    naive = found.observed[off] / (np.outer(load, load)[off] / 4000)
    assert np.median(naive) < 0.8
    three = coactivation(weighted_trace(3), 0)
    assert np.nanmax(np.abs(three.lift[three.expected > 100] - 1)) < 0.25


def test_planted_partners_stand_out() -> None:
    trace = weighted_trace(2)
    experts = trace.experts(0).copy()
    experts[::10] = [0, 1]
    part = make_part(trace.layers, [1000] * 4)
    planted = make_trace(trace.layers, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])
    found = coactivation(planted, 0)
    assert np.nanargmax(found.lift) == 1 and found.lift[0, 1] == found.lift[1, 0] > 3


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=12))
def test_quasi_independence_reaches_its_margins(odds: list[float]) -> None:
    a = np.array(odds)
    table = np.outer(a, a)
    np.fill_diagonal(table, 0)
    if (a * 2 < a.sum()).all():  # else one expert is in nearly every pair, and fitting takes long
        np.testing.assert_allclose(quasi_independent(table.sum(0)), table, rtol=1e-4)


def test_quasi_independence_of_nothing_and_of_even_loads() -> None:
    assert not quasi_independent(np.zeros(4, int)).any()
    even = quasi_independent(np.full(4, 30))
    np.testing.assert_allclose(even[~np.eye(4, dtype=bool)], 10)
    one_dead = quasi_independent(np.array([40, 0, 40, 40]))
    assert not one_dead[1].any() and one_dead[0, 2] == pytest.approx(20)


@pytest.mark.parametrize("length", [6, 90])
def test_flow_counts_and_its_null(length: int) -> None:
    trace = make_trace(PLAIN, [make_part(PLAIN, [length])])
    found, a, b = flow(trace, 0), trace.experts(0), trace.experts(1)
    counted = np.zeros((8, 8), int)
    for mine, other in zip(a, b, strict=True):
        for i in mine:
            counted[i, other] += 1
    assert np.array_equal(found.observed, counted) and found.n == 4 * len(a) and found.chance_share == 1 / 8
    np.testing.assert_allclose(found.expected, np.outer(counted.sum(1), counted.sum(0)) / counted.sum())
    np.testing.assert_allclose(found.share[counted.sum(1) > 0].sum(1), 1)
    some = found.expected > 0
    assert (found.expected[some] < 1).any() == (length == 6)
    np.testing.assert_allclose(found.lift[some], counted[some] / found.expected[some])
    np.testing.assert_allclose(found.residual[some], (counted - found.expected)[some] / np.sqrt(found.expected[some]))
    assert flow(trace, 1).lift.shape == (8, 0)
    assert flow(trace, 0, first=True).n == len(a)


def test_flow_of_independent_and_of_chained_layers() -> None:
    trace = weighted_trace(1)
    assert np.abs(flow(trace, 0).residual).max() < 4
    part = make_part(trace.layers, [1000] * 4)
    here = trace.experts(0)
    chained = ((here + 3) % 8).astype(here.dtype)
    both = (SiteRouting(here, part.routing[0].weights, here), SiteRouting(chained, part.routing[1].weights, chained))
    told = flow(make_trace(trace.layers, [replace(part, routing=both)]), 0)
    assert (told.observed > 0).sum() == 8 and told.lift[0, 3] == pytest.approx(4000 / (here == 0).sum())


def test_saturation_at_its_ends_and_in_between() -> None:
    a = make_trace(PLAIN, [make_part(PLAIN, [300] * 6, 1)])
    same = saturation(a, a).to_pylist()
    assert [(r["site"], r["n"], r["saturation"], r["low"], r["high"]) for r in same] == [(s, 1800, 1, 1, 1) for s in (0, 1)]
    part = make_part(PLAIN, [300] * 6, 1)
    other = make_part(PLAIN, [300] * 6, 2)
    b = make_trace(PLAIN, [replace(part, routing=(other.routing[0], part.routing[1]))], name="later")
    random, equal = saturation(a, b).to_pylist()
    assert equal["saturation"] == 1 and random["chance"] == 0.25
    assert random["saturation"] == pytest.approx(0.25, abs=0.02) and random["chance_given_loads"] == pytest.approx(0.25, abs=0.005)
    assert random["low"] < random["saturation"] < random["high"]
    by_hand = [len(set(x) & set(y)) / 2 for x, y in zip(a.experts(0).tolist(), b.experts(0).tolist(), strict=True)]
    assert random["saturation"] == pytest.approx(np.mean(by_hand))


def test_agreement_beyond_what_documents_share() -> None:
    """Both runs send each document to experts of its own, but at random within it: far above k / E, no more than turning gives."""
    part = make_part(PLAIN, [200] * 8, 1)
    document = np.arange(1600) // 200

    def near(seed: int) -> np.ndarray:
        pairs = np.random.default_rng(seed).integers(0, 6, 1600)
        sets = np.array([(i, j) for i in range(4) for j in range(i)])[pairs]  # 2 of 4 experts
        return ((sets + document[:, None]) % 8).astype(np.int16)

    weights = part.routing[0].weights
    runs = [make_trace(PLAIN, [replace(part, routing=tuple(SiteRouting(e, weights, e) for e in (near(s), near(9))))]) for s in (0, 1)]
    apart, equal = saturation(*runs).to_pylist()
    assert apart["saturation"] == pytest.approx(0.5, abs=0.03) and apart["chance_given_loads"] < 0.3
    loads = [[np.bincount(t.experts(0)[document == d].ravel(), minlength=8) for d in range(8)] for t in runs]
    exact = sum((x * y).sum() / 200 for x, y in zip(*loads, strict=True)) / 3200  # the mean over all turns
    assert apart["shuffled"] == pytest.approx(exact, abs=0.005) and apart["p"] > 0.01 and apart["draws"] == 199
    assert equal["saturation"] == 1 and equal["p"] == 1 / 200 and equal["shuffled"] == pytest.approx(0.5, abs=0.03)


def test_saturation_compares_only_what_is_comparable() -> None:
    a = make_trace()
    with pytest.raises(TraceError, match="same token ids"):
        saturation(a, make_trace(parts=make_parts(PLAIN, seed=9)))
    with pytest.raises(TraceError, match="other sites"):
        saturation(a, make_trace(MANY, make_parts(MANY)))
    assert len(saturation(make_trace(TWO_STREAMS), make_trace(TWO_STREAMS))) == 3


def test_no_expert_agrees_with_no_expert() -> None:
    dropping = make_trace(TWO_STREAMS)
    for row in saturation(dropping, dropping).to_pylist():
        assert row["saturation"] == pytest.approx((dropping.experts(row["site"]) >= 0).mean())
