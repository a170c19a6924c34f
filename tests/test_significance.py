"""Tests against their definitions by brute force, their error rates by simulation."""

from __future__ import annotations

from itertools import permutations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import significance
from analysis.significance import (
    Verdict,
    benjamini_hochberg,
    bootstrap_sums,
    count_p,
    draws_for,
    enrichment,
    family_p,
    interval,
    least_deal,
    least_flips,
    permutation_test,
    rearranged_labels,
    shares_p,
    sign_flip_test,
)


def test_q_values_of_a_textbook_case() -> None:
    q = benjamini_hochberg(np.array([[0.9, 0.005], [np.nan, 0.03]]))
    np.testing.assert_allclose(q, [[0.9, 0.015], [np.nan, 0.045]])
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.01, 0.02, 0.03, 0.04, 0.05])), 0.05)
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()
    few = np.array([0.001, 0.02])  # of 10, of which the others are 1
    np.testing.assert_allclose(benjamini_hochberg(few, 10), benjamini_hochberg(np.append(few, np.ones(8)))[:2])


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20), st.floats(0.001, 0.999))
def test_q_values_claim_what_the_step_up_rule_claims(values: list[float], alpha: float) -> None:
    p = np.array(values)
    passed = [i for i in range(1, len(p) + 1) if sorted(values)[i - 1] <= alpha * i / len(p) * (1 + 1e-12)]
    claimed = sorted(values)[: max(passed, default=0)]
    assert sorted(p[benjamini_hochberg(p) <= alpha * (1 + 1e-12)].tolist()) == claimed


def test_enrichment_vector() -> None:
    assert enrichment(np.array(7), np.array(9), np.array(2), np.array(9)) == pytest.approx(np.log2(7.5 / 2.5))
    assert enrichment(np.array(0), np.array(99), np.array(99), np.array(99)) == pytest.approx(np.log2(0.5 / 99.5))


def test_few_deals_are_enumerated_each_once() -> None:
    codes = np.array([1, 0, 2, 0, 1])
    deals, exact = rearranged_labels(codes, 30, 0)
    assert exact and len(deals) == 30 == len({tuple(d) for d in deals.tolist()})
    assert {tuple(d) for d in deals.tolist()} == set(permutations(codes.tolist()))


def test_many_deals_are_drawn_seeded_and_keep_the_group_sizes() -> None:
    codes = np.repeat([0, 1, 2], [5, 7, 9])
    deals, exact = rearranged_labels(codes, 50, 3)
    assert not exact and deals.shape == (50, 21) and len({tuple(d) for d in deals.tolist()}) > 45
    assert all(np.bincount(d).tolist() == [5, 7, 9] for d in deals)
    assert np.array_equal(deals, rearranged_labels(codes, 50, 3)[0]) and not np.array_equal(deals, rearranged_labels(codes, 50, 4)[0])


def by_hand(counts: np.ndarray, tokens: np.ndarray, member: np.ndarray) -> np.ndarray:
    """The statistic as its docstring says, one group at a time."""
    shares, errors = [], []
    for mine in (member, ~member):
        used, size = counts[mine], tokens[mine][:, None]
        share = used.sum(0) / size.sum()
        n = mine.sum()
        between = ((used - share * size) ** 2).sum(0) * n / max(n - 1, 1) / size.sum() ** 2
        smooth = (used.sum(0) + 0.5) / (size.sum() + 1)
        shares.append(share)
        errors.append(np.maximum(between, smooth * (1 - smooth) / size.sum()))
    return np.asarray(np.abs(shares[0] - shares[1]) / np.sqrt(errors[0] + errors[1]))


def test_exact_p_values_by_brute_force() -> None:
    rng = np.random.default_rng(5)
    tokens = np.array([20, 35, 11, 60, 18, 25, 40])
    counts = rng.binomial(tokens[:, None], [[0.2, 0.5, 0.05]] * 7)
    codes = np.array([0, 1, 2, 0, 1, 1, 2])
    test = permutation_test(counts, tokens, codes, draws=1000)
    ways = sorted(set(permutations(codes.tolist())))
    assert test.exact and test.draws == len(ways) == 210
    null = np.array([[by_hand(counts, tokens, np.array(way) == g) for g in range(3)] for way in ways])
    real = np.array([by_hand(counts, tokens, codes == g) for g in range(3)])
    np.testing.assert_allclose(test.statistic, real, rtol=1e-9)
    np.testing.assert_allclose(test.p, (null >= real * (1 - 1e-9)).mean(0))
    largest = null.max((1, 2))
    np.testing.assert_allclose(test.family, [[(largest >= x * (1 - 1e-9)).mean() for x in row] for row in real])
    assert test.method == "all 210 rearrangements"


def test_random_draws_count_the_observed_deal_among_them() -> None:
    counts = np.repeat([[90, 5], [10, 50]], 12, axis=0)
    test = permutation_test(counts, np.full(24, 100), np.repeat([0, 1], 12), draws=199, seed=1)
    assert not test.exact and test.draws == 199
    np.testing.assert_allclose(test.p, 1 / 200)
    np.testing.assert_allclose(test.family, 1 / 200)
    again = permutation_test(counts, np.full(24, 100), np.repeat([0, 1], 12), draws=199, seed=1)
    assert np.array_equal(again.maximum, test.maximum)


def test_empty_documents_and_one_label_test_nothing() -> None:
    counts, codes = np.array([[3, 1], [2, 2], [0, 0], [4, 0]]), np.array([0, 1, 1, 0])
    full = permutation_test(counts, np.array([4, 4, 0, 4]), codes)
    without = permutation_test(counts[[0, 1, 3]], np.array([4, 4, 4]), codes[[0, 1, 3]])
    np.testing.assert_allclose(full.p, without.p)
    for lonely in (np.zeros(4, int), np.zeros(0, int)):
        test = permutation_test(counts[: len(lonely)], np.full(len(lonely), 4), lonely)
        assert np.isnan(test.p).all() and test.draws == 0


LENGTHS = {
    "alike": np.full(32, 300),
    "one label of short documents": np.r_[np.full(6, 30), np.full(26, 600)],
    "one label of long documents": np.r_[np.full(6, 2000), np.full(26, 100)],
}


def routed(rng: np.random.Generator, lengths: np.ndarray, spread: float | None) -> np.ndarray:
    """Counts of documents that differ from each other (Dirichlet) but know nothing of labels; top-2 of 8."""
    base = rng.dirichlet(np.full(8, 5.0))
    rates = base[None].repeat(len(lengths), 0) if spread is None else rng.dirichlet(base * spread, len(lengths))
    return np.asarray(rng.binomial(lengths[:, None], np.minimum(2 * rates, 0.95)))


@pytest.mark.parametrize("spread", [None, 20.0], ids=["equal documents", "documents that differ"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_false_claims_are_as_rare_as_set(lengths: np.ndarray, spread: float | None) -> None:
    """100 runs in which labels mean nothing: a false claim in 5 of them is expected, 13 or more has odds of 1 : 700."""
    codes = np.r_[np.zeros(6, int), np.arange(26) % 4 + 1]
    claims, families, small = 0, 0, 0.0
    for seed in range(100):
        test = permutation_test(routed(np.random.default_rng(seed), lengths, spread), lengths, codes, draws=999, seed=seed)
        claims += bool((benjamini_hochberg(test.p) <= 0.05).any())
        families += bool((test.family <= 0.05).any())
        small += float((test.p <= 0.05).mean()) / 100
    assert claims < 13 and families < 13
    assert small < 0.07


def test_tokens_taken_as_independent_would_find_specialists_in_noise() -> None:
    """Why the unit is the document: on the same counts a two-sample test over tokens claims something in nearly every run."""
    lengths, codes = LENGTHS["alike"], np.r_[np.zeros(6, int), np.ones(26, int)]
    naive = 0
    for seed in range(20):
        counts = routed(np.random.default_rng(seed), lengths, 20.0)
        share = [counts[codes == g].sum(0) / lengths[codes == g].sum() for g in (0, 1)]
        error = np.sqrt(sum(s * (1 - s) / lengths[codes == g].sum() for g, s in enumerate(share)))
        naive += bool((np.abs(share[0] - share[1]) / error > 3.5).any())  # two-sided p < 0.0005 for each of 8 experts
    assert naive >= 15


def test_a_planted_preference_is_found_and_only_there() -> None:
    lengths, codes = LENGTHS["alike"], np.arange(32) % 4
    for seed in range(10):
        rng = np.random.default_rng(seed)
        counts = routed(rng, lengths, 50.0)
        counts[codes == 2, 5] = rng.binomial(lengths[codes == 2], 0.8)
        test = permutation_test(counts, lengths, codes, seed=seed)
        q = benjamini_hochberg(test.p)
        assert q[2, 5] < 0.05 and test.family[2, 5] < 0.05 and test.statistic.argmax() == 2 * 8 + 5


def test_the_number_of_draws_lets_one_true_cell_through_and_stays_affordable() -> None:
    assert draws_for(75, 9, 16) == 9 * 16 / 0.05
    assert draws_for(2, 2, 2) == significance.LEAST
    assert draws_for(400, 9, 4096) == significance.LEAST
    assert significance.LEAST < draws_for(400, 9, 256) < 9 * 256 / 0.05


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, codes = LENGTHS["alike"], np.arange(32) % 3
    counts = routed(np.random.default_rng(0), lengths, None)
    whole = permutation_test(counts, lengths, codes, draws=200)
    monkeypatch.setattr(significance, "CHUNK_BYTES", 1)
    pieces = permutation_test(counts, lengths, codes, draws=200)
    assert np.array_equal(whole.p, pieces.p) and np.array_equal(whole.maximum, pieces.maximum)


@pytest.mark.parametrize("codes", [np.arange(32) % 3, np.where(np.arange(32) % 3, 2, 0)], ids=["three groups", "one without units"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_many_deals_are_compared_as_few_are_bit_for_bit(codes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = routed(np.random.default_rng(0), LENGTHS["alike"], None)
    few = permutation_test(counts, LENGTHS["alike"], codes, draws=999)
    monkeypatch.setattr(significance, "COMPILED", 0)
    many = permutation_test(counts, LENGTHS["alike"], codes, draws=999)
    assert len(np.unique(few.p)) > 6
    for name in ("p", "family", "statistic", "maximum"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name))


def test_sign_flips_by_brute_force() -> None:
    excess = np.random.default_rng(2).normal(size=(6, 2, 3)) + 0.5
    test = sign_flip_test(excess)
    assert test.exact and test.draws == 64
    null = np.array([np.abs((np.array(s)[:, None, None] * excess).sum(0)) for s in product((1, -1), repeat=6)])
    np.testing.assert_allclose(test.p, (null >= np.abs(excess.sum(0)) * (1 - 1e-9)).mean(0))
    scaled = null / np.sqrt((excess**2).sum(0))
    np.testing.assert_allclose(test.family, [[(scaled.max((1, 2)) >= x * (1 - 1e-9)).mean() for x in row] for row in test.statistic])


@pytest.mark.parametrize("ties", [False, True])
def test_sign_flips_in_single_precision_count_the_same(ties: bool) -> None:
    """Also where many patterns tie with what was seen: few units that lean, all by the same."""
    rng = np.random.default_rng(0)
    excess = np.sign(rng.normal(size=(60, 80))) * (rng.random((60, 80)) < 0.1) if ties else rng.normal(size=(400, 200))
    whole, coarse = sign_flip_test(excess, 2_000), sign_flip_test(excess, 2_000, family=False)
    for name in ("p", "statistic", "least"):
        assert np.array_equal(getattr(whole, name), getattr(coarse, name), equal_nan=True)
    assert np.isnan(coarse.family).all() and coarse.draws == 2_000 and not len(coarse.maximum)


def test_signs_that_none_can_reach_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that lean further and further: p as if all were drawn, and few are."""
    excess = np.random.default_rng(0).normal(size=(200, 60)) + np.linspace(0, 2, 60)
    looked, reached = [], significance._reached
    monkeypatch.setattr(significance, "_reached", lambda s, x, bar: looked.append(len(bar)) or reached(s, x, bar))
    found = sign_flip_test(excess, 999, family=False)
    monkeypatch.setattr(significance, "CERTAIN", 0.0)
    assert np.array_equal(found.p, sign_flip_test(excess, 999, family=False).p) and np.array_equal(found.p, sign_flip_test(excess, 999).p)
    assert looked[1] == 60 > looked[0] + 20 and looked[0] >= 10


@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_intervals_are_percentiles_to_the_bit(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(n, 4, 3))
    values[0, 1, 1] = np.nan
    for coverage in (0.95, 0.5):
        tail = 50 * (1 - coverage)
        want = np.percentile(values, [tail, 100 - tail], axis=0)
        assert np.array_equal(interval(values, coverage), want, equal_nan=True)


def test_sign_flips_are_right_as_often_as_set_and_find_what_is_there() -> None:
    claims = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        excess = rng.normal(size=(30, 4, 8)) * rng.gamma(1, 1, (30, 1, 1))
        claims += bool((benjamini_hochberg(sign_flip_test(excess, draws=999, seed=seed).p) <= 0.05).any())
        excess[:, 1, 3] += 2
        assert sign_flip_test(excess, draws=999, seed=seed).statistic.argmax() == 11
    assert claims < 13


def test_a_count_too_small_to_lean_is_no_finding() -> None:
    """Expected 0.02 times in each of 100 units and never seen, all signs agree, and nothing follows from it."""
    mean = np.array([[2.0, 200.0, 200.0, 5.0]])
    assert sign_flip_test(np.full((100, 1), -0.02)).p[0] == 0.001
    p = count_p(np.array([[0.0, 0.0, 200.4, 5.0]]), mean, mean * [1, 1, 1, 0])
    assert p.shape == (1, 4) and 0.05 < p[0, 0] < 0.3 and p[0, 1] < 1e-20 and p[0, 2:].tolist() == [1, 1]


@pytest.mark.parametrize(("mean", "size"), [(0.5, 2000), (3, 2000), (20, 2000), (6, 12)])
def test_a_counts_p_is_that_of_draws(mean: float, size: int) -> None:
    """Against binomial counts themselves: never surer than it says but for a quarter, and not blind but for counts of one or two."""
    counts = np.random.default_rng(0).binomial(size, mean / size, 20_000)
    p = count_p(counts, np.full(len(counts), mean), np.full(len(counts), mean * (1 - mean / size)))
    for level in (0.2, 0.05, 0.01):
        assert (level / 4 if mean > 2 else 0) <= (p <= level).mean() <= 1.25 * level, level


def test_the_bound_of_shares_holds_and_is_near() -> None:
    """Against the exact tail of one use or none per document, and for shares in between; nothing above 1, no claim from what was expected."""
    rng = np.random.default_rng(0)
    for n, rate in ((4, 0.1), (12, 0.05), (30, 0.3), (30, 0.9)):
        for k in range(n + 1):
            exact = sum(comb(n, x) * rate**x * (1 - rate) ** (n - x) for x in range(k, n + 1))
            bound = shares_p(np.array(float(k)), np.array(rate * n), np.array(n))
            assert exact <= bound * (1 + 1e-9) <= 1 + 1e-9 and (k <= rate * n or bound < 12 * exact)
    rates = rng.uniform(0.02, 0.4, (1, 20))
    sums = rng.beta(rates / 2, (1 - rates) / 2, (20_000, 20)).sum(1)
    p = shares_p(sums, np.full(20_000, rates.sum()), np.array(20))
    assert all((p <= level).mean() <= level for level in (0.2, 0.05, 0.01)) and (p <= 0.2).any()
    np.testing.assert_array_equal(shares_p(np.array([0.0, 2.0, 3.0]), np.array([0.0, 2.0, 0.0]), np.array([0, 5, 3])), [1, 1, 0])


def test_one_telling_document_is_no_sign() -> None:
    excess = np.zeros((5, 2))
    excess[0] = 3.0
    excess[1, 1] = 2.0
    test = sign_flip_test(excess)
    assert np.isnan(test.p[0]) and test.p[1] == 0.5
    assert np.isnan(sign_flip_test(np.zeros((0, 2))).p).all()
    assert np.isnan(sign_flip_test(np.full((9, 2), 1e-16)).p).all()  # rounding, not an excess


def test_family_p_of_numbers() -> None:
    maximum = np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(family_p(np.array([0.5, 3.0, 9.0]), maximum, True), [1, 0.5, 0])
    np.testing.assert_allclose(family_p(np.array([0.5, 3.0, 9.0]), maximum, False), [1, 0.6, 0.2])


def test_bootstrap_draws_within_groups() -> None:
    counts, codes = np.array([[1, 10], [3, 30], [100, 0]]), np.array([0, 0, 1])
    drawn = bootstrap_sums(counts, codes, 500, seed=1)
    assert drawn.shape == (500, 2, 2)
    assert set(map(tuple, drawn[:, 0].tolist())) == {(2, 20), (4, 40), (6, 60)}
    assert (drawn[:, 1] == [100, 0]).all()
    assert np.array_equal(drawn, bootstrap_sums(counts, codes, 500, seed=1))


def test_bootstrap_interval_covers_the_truth() -> None:
    """Share 0.3 over 40 documents that differ: 95 % intervals should hold it in about 93 of 100 runs."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        size = rng.integers(50, 500, 40)
        used = rng.binomial(size, rng.beta(3, 7, 40))
        drawn = bootstrap_sums(np.column_stack([used, size]), np.zeros(40, int), 400, seed)[:, 0]
        low, high = interval(drawn[:, 0] / drawn[:, 1])
        held += bool(low <= 0.3 <= high)
    assert 86 <= held <= 99


def test_a_verdict_says_how_it_was_reached() -> None:
    nothing = np.zeros(1)
    assert Verdict(nothing, nothing, nothing, 2880, False, nothing, nothing).method == "2,880 random rearrangements"


@pytest.mark.parametrize("sizes", [(3, 3), (3, 4), (2, 2, 2), (1, 1, 4), (1, 2)])
def test_the_least_p_of_labels_is_reached_and_never_undercut(sizes: tuple[int, ...]) -> None:
    codes = np.repeat(np.arange(len(sizes)), sizes)
    tokens = np.full(len(codes), 100)
    best = np.ones(len(sizes))
    rng = np.random.default_rng(0)
    for group in range(len(sizes)):  # one expert for each group alone, then noise
        for trial in range(20):
            used = np.where(codes == group, 90, 5) + rng.integers(0, 3 if trial else 1, len(codes))
            test = permutation_test(np.stack([used, 100 - used], 1), tokens, codes, draws=10**4)
            assert test.exact and (test.p >= test.least - 1e-12).all()
            best[group] = min(best[group], test.p[group].min())
    np.testing.assert_allclose(best, least_deal(np.array(sizes)))
    assert test.decisive == (benjamini_hochberg(np.repeat(best, 2)).min() <= 0.05)


def test_three_and_three_documents_can_never_tell_four_and_four_can() -> None:
    assert least_deal(np.array([3, 3])).tolist() == [0.1, 0.1] and least_deal(np.array([4, 4])).tolist() == [2 / 70] * 2
    tokens, codes = np.full(8, 100), np.arange(8) % 2
    used = np.where(codes == 0, 90, 10)
    found = [permutation_test(np.stack([used[:n], 100 - used[:n]], 1), tokens[:n], codes[:n]).decisive for n in (2, 6, 8)]
    assert found == [False, False, True]


def test_the_least_p_of_flips_is_reached_from_the_fewest_units_on() -> None:
    assert least_flips() == 6 and least_flips(0.01) == 8
    for n in (1, 2, 5, 6, 9):
        test = sign_flip_test(np.ones((n, 2)))
        assert test.least.tolist() == [2.0 ** (1 - n)] * 2 and test.decisive == (n >= 6)
        assert np.isnan(test.p).all() if n < 2 else test.p.tolist() == test.least.tolist()
    half = np.concatenate([np.ones((3, 1)), np.zeros((5, 1))])
    assert sign_flip_test(half).least[0] == sign_flip_test(half).p[0] == 0.25  # units without any excess say nothing
