"""Information against hand-made tables, formulas and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis.information import (
    Information,
    ceiling,
    entropy,
    plug_in,
    shuffled_tables,
    sparse_information,
    table_information,
)

TABLES = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 50)).filter(lambda x: x.sum() > 0)


def test_vectors() -> None:
    assert entropy(np.array([1, 1, 2])) == 1.5 and not np.signbit(entropy(np.array([7])))
    bits, corrected, hx, hy = table_information(np.diag([4, 4, 4, 4]))
    assert (bits, hx, hy) == (2, 2, 2)
    assert corrected == pytest.approx(2 + 3 / (32 * np.log(2)))  # 4 cells, 4 rows, 4 columns: 4 - 4 - 4 + 1 = -3
    assert table_information(np.outer([1, 2, 3], [4, 4, 2]))[0] == pytest.approx(0, abs=1e-12)
    assert np.isnan(table_information(np.zeros((2, 3), int))).all() and np.isnan(entropy(np.zeros(3)))


def test_the_entropy_of_many_counts_is_that_of_each() -> None:
    counts = np.random.default_rng(0).zipf(1.5, 20_000).clip(0, 19_000)
    share = counts / counts.sum()
    assert len(np.unique(counts)) < 2_000 and entropy(counts) == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-12)
    assert entropy(counts) == pytest.approx(entropy(counts.astype(float)), rel=1e-12)  # which goes one by one


def test_correction_by_hand() -> None:
    table = np.array([[3, 1, 0], [1, 3, 2]])
    n = table.sum()
    p = table / n
    expected = sum(p[i, j] * np.log2(p[i, j] / p[i].sum() / p[:, j].sum()) for i in range(2) for j in range(3) if p[i, j])
    bits, corrected, *_ = table_information(table)
    assert bits == pytest.approx(expected)
    assert corrected == pytest.approx(expected - (5 - 2 - 3 + 1) / (2 * n * np.log(2)))


def test_a_cell_that_did_not_occur_is_no_cell() -> None:
    x, y = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert sparse_information(x, y, np.array([5, 0, 2, 4])) == sparse_information(x[[0, 2, 3]], y[[0, 2, 3]], np.array([5, 2, 4]))


@given(TABLES)
def test_bounds_and_symmetry(table: np.ndarray) -> None:
    bits, corrected, hx, hy = table_information(table)
    assert 0 <= bits <= min(hx, hy) + 1e-9
    assert abs(corrected - bits) <= 1 / (2 * np.log(2)) + 1e-9
    assert table_information(table.T)[:2] == pytest.approx((bits, corrected))
    np.testing.assert_allclose(plug_in(table[None].astype(float)), [bits], atol=1e-9)


def test_correction_takes_the_bias_of_independent_draws_away() -> None:
    plug, corrected = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        table = np.zeros((4, 8), int)
        np.add.at(table, (rng.integers(0, 4, 400), rng.integers(0, 8, 400)), 1)
        bits, less, *_ = table_information(table)
        plug.append(bits)
        corrected.append(less)
    assert np.mean(plug) > 0.03  # (4 - 1)(8 - 1) / (2 x 400 ln 2) = 0.038
    assert abs(np.mean(corrected)) < 0.003


def test_shuffles_keep_both_margins() -> None:
    x, y, count = np.array([0, 0, 2, 5]), np.array([1, 3, 1, 0]), np.array([30, 5, 40, 25])
    a, b, n = next(shuffled_tables(x, y, count, 4, [1]))
    assert np.bincount(a, n).tolist() == np.bincount(x, count).tolist() and np.bincount(b, n).tolist() == np.bincount(y, count).tolist()
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(a) > 4
    assert sparse_information(a, b, n)[0] < sparse_information(x, y, count)[0] / 3


def test_the_share_is_of_what_is_possible_beyond_the_floor_where_there_is_one() -> None:
    assert Information(1.0, 0.9, 0.4, 0.1, 3, 2.5, 1.9, 10, "").share == pytest.approx(0.6 / 1.5)
    assert Information(1.0, 0.9, float("nan"), float("nan"), 3, 2, 2, 10, "").share == pytest.approx(0.45)
    assert np.isnan(Information(0, 0, 0, 1, 0, 0, 0, 0, "").share)


def test_the_ceiling_of_tokens_with_several_experts() -> None:
    assert (ceiling(3, 4), ceiling(5, 4), ceiling(5, 4, 2), ceiling(2.5, 4, 2), ceiling(2, 0.5, 2)) == (3, 4, 3, 2.5, 0)
    assert np.isnan(ceiling(float("nan"), 4)) and np.isnan(ceiling(4, float("nan"), 2))
