"""Information that two things carry about each other, from a table of their joint counts. In bits.

Plug-in mutual information is never below zero and grows with the number of cells over the number of draws, so a
random router shows some. Two corrections: Miller and Madow's (a formula, good for full tables) and the floor that
shuffled tables with the same margins reach (good for sparse ones).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

MANY = 4_096  # counts, from which on equal ones are taken together
DENSE = 1 << 25  # cells of a table that is counted whole: 256 MiB


@dataclass(frozen=True)
class Information:
    """I(x; y) in bits and what to hold it against.

    plug_in     from the counts as they are; 0 to min(H(x), H(y)).
    corrected   plug-in less Miller and Madow's bias; about 0 for independence, may fall below.
    floor       mean plug-in under the null named where it is made; NaN where none was drawn.
    above_floor plug_in - floor.
    p           P(plug-in under the null >= plug-in); NaN without null.
    ceiling     what plug_in can be at most, see ``ceiling``.
    low, high   95 % range of plug-in under the null; NaN where too few were drawn to tell.
    n           draws counted (assignments or first choices).
    """

    plug_in: float
    corrected: float
    floor: float
    p: float
    entropy_x: float
    entropy_y: float
    ceiling: float
    n: int
    null: str
    low: float = float("nan")
    high: float = float("nan")

    @property
    def above_floor(self) -> float:
        """plug_in - floor, bits."""
        return self.plug_in - self.floor

    @property
    def share(self) -> float:
        """(plug_in - floor) / (ceiling - floor): about 0 by chance, 1 for all that is possible; corrected / ceiling without a floor.

        NaN where chance alone reaches the ceiling.
        """
        value, possible = (self.corrected, self.ceiling) if np.isnan(self.floor) else (self.above_floor, self.ceiling - self.floor)
        return value / possible if possible > 0 else float("nan")


def ceiling(entropy_x: float, entropy_y: float, each: int = 1) -> float:
    """Bits that I(x; y) over assignments can be at most, where x is a property of the token and y one of its experts.

    min(H(x), H(y) - log2 ``each``) for tokens that all have ``each`` different experts, since who knows everything of a token
    still does not know which of these an assignment is; ``each`` 1 (min(H(x), H(y))) where tokens differ in their number.
    """
    return float(np.minimum(entropy_x, max(entropy_y - np.log2(each), 0.0)))


def entropy(counts: np.ndarray) -> float:
    """Plug-in entropy in bits; NaN for no counts."""
    total = counts.sum()
    if not total:
        return float("nan")
    kept: np.ndarray = counts[counts > 0]
    often = np.ones(1, np.int64)
    if kept.size > MANY and kept.dtype.kind in "iu" and kept.max() < kept.size:  # most are small and alike: one logarithm for each value
        times = np.bincount(kept)
        kept = np.flatnonzero(times)
        often = times[kept]
    share = kept / total
    return float(-(often * share * np.log2(share)).sum()) + 0.0


def sparse_information(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> tuple[float, float, float, float]:
    """(plug-in I, Miller-Madow corrected I, H(x), H(y)) of cells (x, y) given once each; x, y int >= 0. Bits.

    Corrected = plug-in - (cells - rows - columns + 1) / (2 n ln 2), of rows, columns and cells that occur. Miller 1955.
    """
    return information_given(np.bincount(x, counts), np.bincount(y, counts), counts)


def information_given(rows: np.ndarray, columns: np.ndarray, counts: np.ndarray) -> tuple[float, float, float, float]:
    """``sparse_information`` of cells with these sums over y and over x, float64, which may hold zeros."""
    n = counts.sum()
    if not n:
        return (float("nan"),) * 4
    hx, hy, joint = entropy(rows), entropy(columns), entropy(counts)
    plug_in = max(hx + hy - joint, 0.0)
    cells = int((counts > 0).sum()) - int((rows > 0).sum()) - int((columns > 0).sum()) + 1
    return plug_in, float(plug_in - cells / (2 * float(n) * np.log(2))), hx, hy


def table_information(table: np.ndarray) -> tuple[float, float, float, float]:
    """``sparse_information`` of a full table [x, y] of counts."""
    x, y = np.nonzero(table)
    return sparse_information(x, y, table[x, y])


def plug_in(tables: np.ndarray) -> np.ndarray:
    """float64 [draws]: plug-in I in bits of each table of [draws, x, y]."""

    def total(counts: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(counts > 0, counts * np.log2(counts), 0)
        return np.asarray(terms.reshape(len(counts), -1).sum(1))

    n = tables.sum((1, 2))
    bits = (total(tables) - total(tables.sum(2)) - total(tables.sum(1))) / n + np.log2(n)
    return np.asarray(np.maximum(bits, 0))


def plug_in_without(table: np.ndarray, counts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """float64 [units]: plug-in I in bits of ``table`` [x, y] without each unit, whose ``counts`` [units, y] stand in row ``codes`` [units]."""

    def total(x: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(x > 0, x * np.log2(x), 0)

    row, rows, n = table[codes], table.sum(1), table.sum() - counts.sum(1)
    cells = total(table).sum() + (total(row - counts) - total(row)).sum(1)
    marginal = total(rows).sum() + total(rows[codes] - counts.sum(1)) - total(rows[codes]) + total(table.sum(0) - counts).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.maximum((cells - marginal) / n + np.log2(n), 0))


def shuffled_tables(
    x: np.ndarray, y: np.ndarray, counts: np.ndarray, width: int, seeds: Iterable[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(x, y, counts) of a random table with the same margins for each of ``seeds``: every draw keeps its x and is dealt another's y.

    ``width`` is one more than the largest y. O(n) in the number of draws.
    """
    from .shuffling import dealt_table  # pays for numba

    return (dealt_table(x, y, counts, width, seed) for seed in seeds)
