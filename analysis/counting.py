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
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
_U = np.uintp


def compiled(function: _Kernel, **options: Any) -> _Kernel:
    """``function`` compiled on its first call, and kept on disk where there is a folder to keep it in; ``options`` are numba's."""
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # neither the sources nor the home can be written: each process compiles for itself
        return numba.njit(nogil=True, **options)(function)


@intrinsic
def lowest_bit(context: Any, word: Any) -> Any:
    """The place of the lowest bit set in a uint64 that is not 0, one instruction."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.cttz(args[0], cgutils.true_bit)


def check_ids(experts: np.ndarray, n_classes: int) -> None:
    """Raise ValueError for an id outside -1..n_classes-1, which a kernel would count out of bounds, and for a part too large to count."""
    if n_classes > MAX_CLASSES or experts.size * max(experts.shape[1], 1) >= 2**31:  # the kernels count in int32
        raise ValueError(f"{experts.size} decisions over {n_classes} experts are too many for one part: use smaller parts")
    if experts.size and (experts.min() < -1 or experts.max() >= n_classes):
        raise ValueError(f"expert ids {experts.min()} to {experts.max()} at a site of {n_classes} experts")


@compiled
def slots_of(experts: np.ndarray) -> np.ndarray:
    """uint16 [n, k]: ids plus one, of ids that were checked."""
    slots = np.empty(experts.shape, np.uint16)
    for t in range(experts.shape[0]):
        for i in range(experts.shape[1]):
            slots[t, i] = experts[t, i] + 1
    return slots


def take_rows(experts: np.ndarray, weights: np.ndarray, n_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one look at every row of ids [n, k] that were checked, and gate weights float32 [n, k], tells.

    (uint16 [n], the slot of the largest weight, the earliest of equals, 0 where a row has no expert; uint64 [n], the experts of each row
    as bits, where there are at most 64 of them, else empty; float64 [n_slots], the sum of the gate weights).
    """
    n = len(experts)
    first, words, mass = np.empty(n, np.uint16), np.empty(n if n_slots <= 65 else 0, np.uint64), np.zeros(n_slots)
    _take_rows(experts, weights, first, words, mass)
    return first, words, mass


@compiled
def _take_rows(experts: np.ndarray, weights: np.ndarray, first: np.ndarray, words: np.ndarray, mass: np.ndarray) -> None:
    if experts.shape[1] == 8:  # the usual k as a constant: the loops over it are unrolled
        _take_each(experts, weights, first, words, mass, 8)
    elif experts.shape[1] == 2:
        _take_each(experts, weights, first, words, mass, 2)
    else:
        _take_each(experts, weights, first, words, mass, experts.shape[1])


@numba.njit(inline="always")
def _take_each(experts: np.ndarray, weights: np.ndarray, first: np.ndarray, words: np.ndarray, mass: np.ndarray, k: int) -> None:
    for t in range(experts.shape[0]):
        best, at, larger, word = weights[t, 0], 0, 0, _U(0)
        for i in range(k):
            s = _U(experts[t, i] + 1)
            word |= _U(s != _U(0)) << ((s - _U(1)) & _U(63))
            mass[s] += weights[t, i]
            larger |= weights[t, i] > best
        if words.shape[0] > 0:
            words[t] = word
        if larger or experts[t, 0] < 0 or not best > -np.inf:  # else the first is the largest, as a router that sorts has it
            best = np.float32(-np.inf)
            for i in range(k):
                if weights[t, i] > best and experts[t, i] >= 0:
                    best, at = weights[t, i], i
        first[t] = experts[t, at] + 1


@compiled
def weight_on(experts: np.ndarray, weights: np.ndarray, expert: int) -> np.ndarray:
    """float64 [n]: the gate weight of one expert in each row of ids [n, k], 0 where a row has it not."""
    out = np.zeros(experts.shape[0])
    for t in range(experts.shape[0]):
        for i in range(experts.shape[1]):
            out[t] += weights[t, i] if experts[t, i] == expert else 0
    return out


@compiled
def count_runs(slots: np.ndarray, starts: np.ndarray, by_run: np.ndarray) -> None:
    """Add the rows starts[r] to starts[r + 1] to by_run[r], int32 [runs, slots]."""
    for r in range(by_run.shape[0]):
        row = by_run[r]
        for t in range(starts[r], starts[r + 1]):
            for i in range(slots.shape[1]):
                row[_U(slots[t, i])] += 1


@compiled
def count_repeats(slots: np.ndarray, words: np.ndarray, first: np.ndarray, same_document: np.ndarray, n_slots: int) -> tuple[int, int, int]:
    """(neighbours in a document, those with the same first choice, those with any expert in common), from slots only where there are no words."""
    last = np.zeros(n_slots, np.int64)  # the last row with the expert, plus one
    pairs, equal, shared = 0, 0, 0
    for t in range(first.shape[0]):
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
def nonzero(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int32 [rows], where each row ends in what follows; columns uint16; their counts) of the cells of counts [rows, columns] that are not 0."""
    room = counts.size + 1  # each cell is written, and kept where it was counted: a branch would be guessed wrong half the time
    ends, columns, found, m = np.empty(counts.shape[0], np.int32), np.empty(room, np.uint16), np.empty(room, counts.dtype), 0
    for a in range(counts.shape[0]):
        for b in range(counts.shape[1]):
            columns[m], found[m] = b, counts[a, b]
            m += counts[a, b] != 0
        ends[a] = m
    return ends, columns[:m].copy(), found[:m].copy()


@compiled
def count_scores(entropy: np.ndarray, highest: float, margin: np.ndarray, logsumexp: np.ndarray, counts: np.ndarray,
                 sums: np.ndarray) -> tuple[int, float]:  # fmt: skip
    """Add finite values to equal bins over [0, highest] and [0, 1], those outside to the outermost: counts int64, sums float64 [2, bins].

    Returns (how many squares of logsumexp are finite, the sum of those that are numbers), in float64.
    """
    count, total = 0, 0.0
    entropies, margins, entropy_sums, margin_sums = counts[0], counts[1], sums[0], sums[1]
    for t in range(entropy.shape[0]):  # three chains of additions, each of which waits for its last: side by side they wait once
        _add_to_bin(np.float64(entropy[t]), highest, entropies, entropy_sums)
        _add_to_bin(np.float64(margin[t]), 1.0, margins, margin_sums)
        square = np.float64(logsumexp[t]) ** 2
        count += np.isfinite(square)
        if not np.isnan(square):
            total += square
    return count, total


@numba.njit
def _add_to_bin(value: float, high: float, counts: np.ndarray, sums: np.ndarray) -> None:
    if np.isfinite(value):
        at = _U(min(max(value / high * counts.shape[0], 0.0), counts.shape[0] - 1.0))
        counts[at] += 1
        sums[at] += value


@compiled
def count_keys(order: np.ndarray, starts: np.ndarray, slots: np.ndarray, words: np.ndarray, n_slots: int, experts: np.ndarray,
               counts_of: np.ndarray, ends: np.ndarray) -> int:  # fmt: skip
    """Sparse counts per (key, expert), in that order; returns how many entries were written.

    The rows of key g are order[starts[g]:starts[g + 1]], its entries end at ends[g] of ``experts`` uint8 or uint16 and ``counts_of`` int32, which
    have room for rows x k + slots entries. ``words`` is what ``take_rows`` says; slots are read only where there are none.
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
                    s = lowest_bit(word) + _U(64 * q)
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
            experts[m], counts_of[m] = lowest_bit(word), 1
            word &= word - _U(1)
            m += 1
    while word:
        e = lowest_bit(word)
        experts[m], counts_of[m] = e, (ones >> e & _U(1)) + _U(2) * (twos >> e & _U(1)) + _U(4) * (fours >> e & _U(1))
        word &= word - _U(1)
        m += 1
    return m
