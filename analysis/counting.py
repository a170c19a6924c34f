"""The counting kernels, compiled by numba: arrays in, arrays out.

Importing this module pays for numba, so ``stats`` does it only when something is to be counted. Machine code is kept in ``__pycache__``
or, where that is read-only, in numba's folder of the user: one machine compiles once.

Decisions come as *slots*: uint16 [n, k], the expert id plus one. 0 stands for no expert, so that the inner loops need no branch: what
it counts collects where nobody reads. Unsigned indices spare numba's test for negative ones. Every sum is taken in the
order of the rows, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

MAX_CLASSES = 2**16 - 2
_LANES, _WORDS = 8, 8  # bit tables are padded to whole vectors of experts, and to blocks of words of 64 rows
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
_U = np.uintp


def compiled(function: _Kernel, **options: Any) -> _Kernel:
    """``function`` compiled on its first call, and kept on disk where there is a folder to keep it in; ``options`` are numba's."""
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # neither the sources nor the home can be written: each process compiles for itself
        return numba.njit(nogil=True, **options)(function)


@intrinsic
def _set_bits(context: Any, word: Any) -> Any:
    """The number of bits set in a uint64, one instruction."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def _lowest_bit(context: Any, word: Any) -> Any:
    """The place of the lowest bit set in a uint64 that is not 0, one instruction."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.cttz(args[0], cgutils.true_bit)


def slots_of(experts: np.ndarray, n_classes: int) -> np.ndarray:
    """uint16 [n, k]: ids plus one. Raises ValueError for an id outside -1..n_classes-1, which a kernel would count out of bounds."""
    if n_classes > MAX_CLASSES or experts.size * max(experts.shape[1], 1) >= 2**31:  # the kernels count in int32
        raise ValueError(f"{experts.size} decisions over {n_classes} experts are too many for one part: use smaller parts")
    slots = np.empty(experts.shape, np.uint16)
    if not _fill_slots(np.ascontiguousarray(experts).ravel(), n_classes, slots.ravel()):
        raise ValueError(f"expert ids {experts.min()} to {experts.max()} at a site of {n_classes} experts")
    return slots


@compiled
def _fill_slots(experts: np.ndarray, n_classes: int, slots: np.ndarray) -> bool:
    """Whether every id lies in -1..n_classes-1; slots [n] are filled with the ids plus one."""
    wrong = 0
    for i in range(experts.shape[0]):
        wrong += (experts[i] < -1) | (experts[i] >= n_classes)
        slots[i] = experts[i] + 1
    return wrong == 0


@compiled
def count_runs(slots: np.ndarray, weights: np.ndarray, run: np.ndarray, by_run: np.ndarray, mass: np.ndarray) -> None:
    """Add each row t to by_run[run[t]], int32 [runs, slots], and its gate weights float32 [n, k] to mass float64 [slots]."""
    if slots.shape[1] == 8:  # the usual k as a constant: the loop over it is unrolled
        _count_runs(slots, weights, run, by_run, mass, 8)
    else:
        _count_runs(slots, weights, run, by_run, mass, slots.shape[1])


@numba.njit(inline="always")
def _count_runs(slots: np.ndarray, weights: np.ndarray, run: np.ndarray, by_run: np.ndarray, mass: np.ndarray, k: int) -> None:
    for t in range(slots.shape[0]):
        r = _U(run[t])
        for i in range(k):
            s = _U(slots[t, i])
            by_run[r, s] += 1
            mass[s] += weights[t, i]


@compiled
def first_slots(slots: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint16 [n]: the slot of the largest weight, the earliest of equals; 0 where a row has no expert."""
    first = np.empty(slots.shape[0], np.uint16)
    for t in range(slots.shape[0]):
        best, at, larger = weights[t, 0], 0, 0
        for i in range(slots.shape[1]):
            larger += weights[t, i] > best
        if larger or slots[t, 0] == 0 or not best > -np.inf:  # else the first is the largest, as a router that sorts has it
            best = np.float32(-np.inf)
            for i in range(slots.shape[1]):
                if weights[t, i] > best and slots[t, i] != 0:
                    best, at = weights[t, i], i
        first[t] = slots[t, at]
    return first


def row_words(slots: np.ndarray, n_slots: int) -> np.ndarray:
    """uint64 [n]: the experts of each row as bits, where there are at most 64 of them; else empty."""
    return _row_words(slots) if n_slots <= 65 else np.zeros(0, np.uint64)


@compiled
def _row_words(slots: np.ndarray) -> np.ndarray:
    words = np.empty(slots.shape[0], np.uint64)
    for t in range(slots.shape[0]):
        word = _U(0)
        for i in range(slots.shape[1]):
            s = _U(slots[t, i])
            word |= _U(s != _U(0)) << ((s - _U(1)) & _U(63))
        words[t] = word
    return words


@compiled
def count_repeats(slots: np.ndarray, words: np.ndarray, first: np.ndarray, same_document: np.ndarray, n_slots: int) -> tuple[int, int, int]:
    """(neighbours in a document, those with the same first choice, those with any expert in common)."""
    last = np.zeros(n_slots, np.int64)  # the last row with the expert, plus one
    pairs, equal, shared = 0, 0, 0
    for t in range(slots.shape[0]):
        together = int(same_document[t])
        pairs += together
        equal += together & int(first[t] == first[t - 1]) & int(first[t] != 0)
        if words.shape[0] > 0:
            shared += together & int((words[t] & words[t - 1]) != 0)
        else:
            any_shared = 0
            for i in range(slots.shape[1]):
                s = _U(slots[t, i])
                any_shared |= last[s] == t
                last[s] = t + 1
            last[0] = -1
            shared += together & int(any_shared)
    return pairs, equal, shared


@compiled
def add_rows(counts: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    """out[index[r]] += counts[r] for every row r with an index that is not negative."""
    for r in range(counts.shape[0]):
        if index[r] >= 0:
            row, more = out[_U(index[r])], counts[_U(r)]
            for s in range(counts.shape[1]):
                row[s] += more[s]


@compiled
def _scatter_pairs(here: np.ndarray, after: np.ndarray, table: np.ndarray) -> None:
    """Add every pair of slots of each row, here [n, k] x after [n, k2], to table int32 [slots here, slots after]."""
    for t in range(here.shape[0]):
        for i in range(here.shape[1]):
            s = _U(here[t, i])
            for j in range(after.shape[1]):
                table[s, _U(after[t, j])] += 1


@compiled
def _bits_of(slots: np.ndarray, n_slots: int) -> np.ndarray:
    """uint64 [words of 64 rows, _LANES + experts], both padded: bit t % 64 of [t // 64, _LANES - 1 + s] is set where row t has slot s.

    The experts fill whole lanes: slot 0 lies in the one before them, which is never read.
    """
    words = -(-slots.shape[0] // (64 * _WORDS)) * _WORDS
    bits = np.zeros((words, _LANES - -(n_slots - 1) // _LANES * _LANES), np.uint64)
    for t in range(slots.shape[0]):
        q, one = _U(t) >> _U(6), _U(1) << (_U(t) & _U(63))
        for i in range(slots.shape[1]):
            bits[q, _U(slots[t, i]) + _U(_LANES - 1)] |= one
    return bits


@compiled
def _intersect_pairs(x: np.ndarray, y: np.ndarray, upper: bool, table: np.ndarray) -> None:
    """Add to table int64, with the columns of x as rows and those of y as columns, in how many rows both are set, 64 rows an instruction.

    ``upper`` leaves out what is below the diagonal, but for its lane. A signed b would keep the loop from becoming vector instructions.
    """
    for q in range(0, x.shape[0], _WORDS):
        for a in range(_LANES, x.shape[1]):
            x0, x1, x2, x3 = x[q, a], x[q + 1, a], x[q + 2, a], x[q + 3, a]
            x4, x5, x6, x7 = x[q + 4, a], x[q + 5, a], x[q + 6, a], x[q + 7, a]
            start = _U(a) // _U(_LANES) * _U(_LANES) if upper else _U(_LANES)
            for b in range(start, _U(y.shape[1])):
                low = _set_bits(x0 & y[q, b]) + _set_bits(x1 & y[q + 1, b]) + _set_bits(x2 & y[q + 2, b]) + _set_bits(x3 & y[q + 3, b])
                high = _set_bits(x4 & y[q + 4, b]) + _set_bits(x5 & y[q + 5, b]) + _set_bits(x6 & y[q + 6, b]) + _set_bits(x7 & y[q + 7, b])
                table[a, b] += low + high


def count_pairs(here: np.ndarray, after: np.ndarray, bits: tuple[np.ndarray, np.ndarray] | None, table: np.ndarray) -> None:
    """Add every pair of slots of each row to table int64 [slots here, slots after], through the bit tables where there are some.

    Row and column 0 are left as they are. Of a site with itself only the cells above the diagonal are meant.
    """
    if bits is None:
        small = np.zeros(table.shape, np.int32)  # twice as much of it stays in the cache
        _scatter_pairs(here, after, small)
        table[1:, 1:] += small[1:, 1:]
    else:
        padded = np.zeros((bits[0].shape[1], bits[1].shape[1]), np.int64)
        _intersect_pairs(*bits, here is after, padded)
        table[1:, 1:] += padded[_LANES:, _LANES:][: table.shape[0] - 1, : table.shape[1] - 1]


def bits_of(slots: np.ndarray, n_slots: int) -> np.ndarray | None:
    """The bit table of a site where pairs are counted faster by it, else None: it costs slots^2 / 64 per row, scattering k^2."""
    return _bits_of(slots, n_slots) if n_slots**2 <= 128 * slots.shape[1] ** 2 else None


@compiled
def count_bins(values: np.ndarray, high: float, counts: np.ndarray, sums: np.ndarray) -> None:
    """Add finite values to equal bins over [0, high], those outside to the outermost: counts int64 [bins], sums float64 [bins]."""
    bins = counts.shape[0]
    for t in range(values.shape[0]):
        value = np.float64(values[t])
        if np.isfinite(value):
            at = _U(min(max(value / high * bins, 0.0), bins - 1.0))
            counts[at] += 1
            sums[at] += value


@compiled
def sum_of_squares(values: np.ndarray) -> tuple[int, float]:
    """(how many squares are finite, the sum of those that are numbers), in float64."""
    count, total = 0, 0.0
    for t in range(values.shape[0]):
        square = np.float64(values[t]) ** 2
        count += np.isfinite(square)
        if not np.isnan(square):
            total += square
    return count, total


@compiled
def count_keys(order: np.ndarray, starts: np.ndarray, slots: np.ndarray, words: np.ndarray, n_slots: int, experts: np.ndarray,
               counts_of: np.ndarray, ends: np.ndarray) -> int:  # fmt: skip
    """Sparse counts per (key, expert), in that order; returns how many entries were written.

    The rows of key g are order[starts[g]:starts[g + 1]], its entries end at ends[g] of ``experts`` uint16 and ``counts_of`` int32, which
    have room for rows x k + slots entries. ``words`` is what ``row_words`` says.
    """
    m, counts, seen = 0, np.zeros(n_slots, np.int32), np.zeros(n_slots // 64 + 1, np.uint64)
    for g in range(ends.shape[0]):
        start, stop = starts[g], starts[g + 1]
        if words.shape[0] > 0 and stop - start < 8:
            m = _count_few(order, start, stop, words, experts, counts_of, m)
            ends[g] = m
            continue
        few = (stop - start) * slots.shape[1] * 2 < n_slots
        if words.shape[0] > 0:
            few = False
            for at in range(start, stop, 63):
                _add_digits(order, at, min(at + 63, stop), words, counts)
        else:
            for at in range(start, stop):
                row = _U(order[at])
                for i in range(slots.shape[1]):
                    s = _U(slots[row, i])
                    counts[s] += 1
                    if few:
                        seen[s >> _U(6)] |= _U(1) << (s & _U(63))
        counts[0] = 0
        if few:  # walk the experts that are set
            seen[0] &= ~_U(1)
            for q in range(seen.shape[0]):
                word = seen[q]
                seen[q] = 0
                while word:
                    s = _lowest_bit(word) + _U(64 * q)
                    experts[m], counts_of[m] = s - _U(1), counts[s]
                    counts[s] = 0
                    word &= word - _U(1)
                    m += 1
        else:  # look at all of them; each is written, and kept where it was counted: a branch would be guessed wrong half the time
            for e in range(1, n_slots):
                experts[m], counts_of[m] = e - 1, counts[e]
                m += counts[e] != 0
                counts[e] = 0
        ends[g] = m
    return m


@compiled
def _add_digits(order: np.ndarray, start: int, stop: int, words: np.ndarray, counts: np.ndarray) -> None:
    """Add up to 63 rows to counts [slots]: the digits of all experts' counts are kept in six words, and read once."""
    d0, d1, d2, d3, d4, d5 = _U(0), _U(0), _U(0), _U(0), _U(0), _U(0)
    for at in range(start, stop):
        carry = words[_U(order[_U(at)])]
        d0, carry = d0 ^ carry, d0 & carry
        d1, carry = d1 ^ carry, d1 & carry
        d2, carry = d2 ^ carry, d2 & carry
        d3, carry = d3 ^ carry, d3 & carry
        d4, carry = d4 ^ carry, d4 & carry
        d5 ^= carry
    one = _U(1)
    for e in range(_U(counts.shape[0] - 1)):
        low = (d0 >> e & one) + ((d1 >> e & one) << one) + ((d2 >> e & one) << _U(2))
        high = (d3 >> e & one) + ((d4 >> e & one) << one) + ((d5 >> e & one) << _U(2))
        counts[e + one] += low + (high << _U(3))


@compiled
def entries(ids: np.ndarray, ends: np.ndarray, experts: np.ndarray, counts_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(keys, experts, both int32; counts int64) of the entries that ``count_keys`` wrote for the keys ``ids``."""
    n = experts.shape[0]
    keys, wide, counts = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.int64)
    begin = 0
    for g in range(ids.shape[0]):
        for m in range(begin, ends[g]):
            keys[m] = ids[g]
        begin = ends[g]
    for m in range(n):
        wide[m] = experts[m]
    for m in range(n):
        counts[m] = counts_of[m]
    return keys, wide, counts


@compiled
def _count_few(order: np.ndarray, start: int, stop: int, words: np.ndarray, experts: np.ndarray, counts_of: np.ndarray, m: int) -> int:
    """The same for up to 7 rows, whose bits are added up as binary digits, all experts at once."""
    ones, twos, fours = _U(0), _U(0), _U(0)
    for at in range(start, stop):
        word = words[_U(order[at])]
        carry = ones & word
        ones ^= word
        fours ^= twos & carry
        twos ^= carry
    word = ones | twos | fours
    if stop - start == 1:
        while word:
            experts[m], counts_of[m] = _lowest_bit(word), 1
            word &= word - _U(1)
            m += 1
    while word:
        e = _lowest_bit(word)
        experts[m], counts_of[m] = e, (ones >> e & _U(1)) + _U(2) * (twos >> e & _U(1)) + _U(4) * (fours >> e & _U(1))
        word &= word - _U(1)
        m += 1
    return m
