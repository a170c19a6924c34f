"""Tables dealt again by the compiled kernels against numpy's own shuffle."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from analysis import shuffling
from analysis.information import shuffled_tables
from analysis.shuffling import dealt_table, warm_up


def shuffled(x: np.ndarray, y: np.ndarray, counts: np.ndarray, width: int, seed: int) -> list[list[int]]:
    """x, y and counts of the cells after numpy shuffled the draws."""
    held, dealt = np.repeat(x, counts), np.repeat(y, counts)
    np.random.default_rng(seed).shuffle(dealt)
    cells, number = np.unique(held * width + dealt, return_counts=True)
    return [(cells // width).tolist(), (cells % width).tolist(), number.tolist()]


@pytest.mark.parametrize("raw", [1, 7, 1 << 15], ids=["two random numbers at a time", "fourteen", "as it is"])
def test_draws_are_dealt_as_numpy_shuffles_them(raw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffling, "RAW", raw)
    rng = np.random.default_rng(0)
    for seed in range(60):
        cells, width = int(rng.integers(0, 30)), int(rng.integers(1, 70))
        x, y, counts = np.sort(rng.integers(0, 20, cells)), rng.integers(0, width, cells), rng.integers(0, 60, cells)
        assert [a.tolist() for a in dealt_table(x, y, counts, width, seed)] == shuffled(x, y, counts, width, seed)


def test_a_million_draws_over_many_kinds() -> None:
    rng = np.random.default_rng(1)
    x, y, counts = np.sort(rng.integers(0, 10_000, 50_000)), rng.integers(0, 60_000, 50_000), rng.integers(0, 40, 50_000)
    first, second = shuffled_tables(x, y, counts, 60_000, [3, 4])
    assert [a.tolist() for a in second] == shuffled(x, y, counts, 60_000, 4)
    assert [a.tolist() for a in first] == shuffled(x, y, counts, 60_000, 3)


def test_cells_in_any_order() -> None:
    x, y, counts = np.array([4, 0, 4, 2]), np.array([1, 0, 0, 2]), np.array([5, 6, 7, 8])
    order = [1, 3, 0, 2]
    assert [a.tolist() for a in dealt_table(x, y, counts, 3, 9)] == shuffled(x[order], y[order], counts[order], 3, 9)


def test_what_cannot_be_dealt_is_refused() -> None:
    for y in (-1, 3):
        with pytest.raises(ValueError, match=f"kinds {y} to {y} in a table of 3"):
            dealt_table(np.array([0]), np.array([y]), np.array([1]), 3, 0)
    with pytest.raises(ValueError, match="70,000 kinds"):
        dealt_table(np.array([0]), np.array([0]), np.array([1]), 70_000, 0)


def test_many_draws_are_dealt_cell_by_cell_with_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of a table of given margins is hypergeometric, of frequent rows and of others; and so is what two of them hold together."""
    monkeypatch.setattr(shuffling, "DRAWN", 1)
    monkeypatch.setattr(shuffling, "FREQUENT", 4)
    x, y, counts = np.array([2, 2, 5, 7, 7, 7, 9]), np.array([0, 3, 1, 0, 1, 3, 3]), np.array([4, 3, 2, 1, 2, 3, 3])
    n, names, rows, kinds = 18, [2, 5, 7, 9], {2: 7, 5: 2, 7: 6, 9: 3}, {0: 5, 1: 4, 3: 9}
    draws, seen = 6_000, np.zeros((6_000, 4, 4), int)
    for seed in range(draws):
        row, column, number = dealt_table(x, y, counts, 4, seed)
        assert (np.diff(row * 4 + column) > 0).all() and (number > 0).all()
        seen[seed, np.searchsorted(names, row), column] = number
    assert (seen.sum(2) == [7, 2, 6, 3]).all() and (seen.sum(1) == [5, 4, 0, 9]).all()

    def check(held: np.ndarray, total: int, load: int) -> None:
        for value in range(min(total, load) + 1):
            p = comb(load, value) * comb(n - load, total - value) / comb(n, total)
            assert abs((held == value).mean() - p) <= 4.5 * (p * (1 - p) / draws) ** 0.5

    for i, name in enumerate(names):
        for kind, load in kinds.items():
            check(seen[:, i, kind], rows[name], load)
    for together in ([0, 1], [0, 2], [1, 3]):
        check(seen[:, together, 3].sum(1), sum(rows[names[i]] for i in together), kinds[3])
    assert [a.tolist() for a in dealt_table(x, y, counts, 4, 3)] == [a.tolist() for a in dealt_table(x, y, counts, 4, 3)]


def test_warm_up_runs() -> None:
    warm_up()
