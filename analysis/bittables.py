"""Pairs and runs of rows counted 64 rows at a time: a table of bits per site, for which experts a row has.

A table is uint64 [words of 64 rows, _LANES + experts], both padded: bit t % 64 of [t // 64, _LANES + e] is set where row t has expert e.
Where a table would be slower than looking at every row (many experts of which few are chosen), there is none, and slots are scattered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .counting import compiled

_ROWS = 2**16 - 1  # that can be counted in 16 bits
_LANES, _WORDS = 8, 8  # tables are padded to whole vectors of experts, and to blocks of words of 64 rows
_U = np.uintp


@intrinsic
def _set_bits(context: Any, word: Any) -> Any:
    """The number of bits set in a uint64, one instruction."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


def worth_bits(n_slots: int, k: int) -> bool:
    """Whether pairs are counted faster by bit tables, which cost slots^2 / 64 per row, scattering k^2; and fit in words."""
    return n_slots**2 <= 128 * k**2 and n_slots <= 65


def words_of(experts: np.ndarray) -> np.ndarray:
    """uint64 [n]: the experts of each row as bits, of ids [n, k] that were checked, below 64; none where a row has not k different experts."""
    words = np.empty(len(experts), np.uint64)
    return words if _take_words(experts, words) == experts.size else words[:0]


@compiled
def _take_words(experts: np.ndarray, words: np.ndarray) -> int:
    """The bits set in all words."""
    found = 0
    for t in range(experts.shape[0]):
        word = _U(0)
        for i in range(experts.shape[1]):
            s = _U(experts[t, i] + 1)
            word |= _U(s != _U(0)) << ((s - _U(1)) & _U(63))
        words[t] = word
        found += _set_bits(word)
    return found


def bits_of(words: np.ndarray, n_slots: int, k: int) -> np.ndarray | None:
    """The bit table of a site with ``words`` uint64 [n], the experts of each row as bits. None unless ``worth_bits``."""
    if not worth_bits(n_slots, k):
        return None
    blocks = -(-len(words) // (64 * _WORDS))
    padding = np.zeros(blocks * 64 * _WORDS - len(words), np.uint64)
    bits = np.empty((blocks * _WORDS, _LANES - -(n_slots - 1) // _LANES * _LANES), np.uint64)  # the first lane is never read
    _turn(np.concatenate([words, padding]) if len(padding) else words, bits)
    return bits


@compiled
def _turn(words: np.ndarray, bits: np.ndarray) -> None:
    """Transpose every 64 words, as 64 x 64 bits: squares of 32 x 32 change places, then those within them; _WORDS of them side by side.

    Squares that hold none of the lines that are asked for stay where they are.
    """
    square, lines = np.empty((64, _WORDS), np.uint64), _U(bits.shape[1] - _LANES)
    for q in range(0, bits.shape[0], _WORDS):
        for w in range(_WORDS):
            for r in range(64):
                square[r, w] = words[_U((q + w) * 64 + r)]
        half, mask = _U(32), _U(2**32 - 1)
        while half:
            for begin in range(_U(0), lines, half + half):
                for r in range(begin, begin + half):
                    for w in range(_U(_WORDS)):
                        swap = ((square[r, w] >> half) ^ square[r + half, w]) & mask
                        square[r, w] ^= swap << half
                        square[r + half, w] ^= swap
            half >>= _U(1)
            mask ^= mask << half
        for w in range(_WORDS):
            for e in range(lines):
                bits[q + w, e + _U(_LANES)] = square[e, w]


@compiled
def count_runs_by_bits(bits: np.ndarray, starts: np.ndarray, by_run: np.ndarray) -> None:
    """Add the rows starts[r] to starts[r + 1] to by_run[r], int32 [runs, slots], but for slot 0."""
    for r in range(by_run.shape[0]):
        row, begin, end = by_run[r], starts[r], starts[r + 1]
        for q in range(begin >> 6, (end + 63) >> 6):
            mask = ~_U(0)
            if q == begin >> 6:
                mask <<= _U(begin & 63)
            if q == end >> 6:
                mask &= (_U(1) << _U(end & 63)) - _U(1)
            line = bits[q]
            for s in range(_U(1), _U(row.shape[0])):
                row[s] += _set_bits(line[s + _U(_LANES - 1)] & mask)


def count_pairs(here: np.ndarray, after: np.ndarray, table: np.ndarray) -> None:
    """Add every pair of slots of each row, here [n, k] x after [n, k2], to table [slots here, slots after], but for slot 0."""
    for found in _scattered(here, after, False, table.shape):
        np.add(table[1:, 1:], found[1:, 1:], out=table[1:, 1:], casting="unsafe")


def pairs_of(here: np.ndarray, after: np.ndarray, n_slots: int, next_slots: int) -> np.ndarray:
    """The same of rows that were counted nowhere yet: unsigned [slots here - 1, slots after - 1], by expert."""
    tables = _scattered(here, after, False, (n_slots, next_slots))
    found = next(tables, np.zeros((n_slots, next_slots), np.uint16))
    return sum(tables, found.astype(np.uint32) if len(here) > _ROWS else found)[1:, 1:]


def own_pairs(slots: np.ndarray, n_slots: int) -> np.ndarray:
    """uint32 [slots - 1, slots - 1], by expert: in how many rows both were chosen, above the diagonal; in half the time."""
    pairs = np.zeros((n_slots - 1, n_slots - 1), np.uint32)
    for found in _scattered(slots, slots, True, (n_slots, n_slots)):
        _fold(found, pairs)
    return pairs


def _scattered(here: np.ndarray, after: np.ndarray, once: bool, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Tables of slots x slots, of _ROWS rows each; ``once``: each pair of slots is looked at once, and one of its cells is added to."""
    k, k2 = here.shape[1], after.shape[1]
    for start in range(0, len(here), _ROWS):
        mine, later = here[start : start + _ROWS], after[start : start + _ROWS]
        small = np.zeros(shape, np.uint16)  # four times as much of it stays in the cache
        _scatter(mine, later, once, small)
        if small.sum(dtype=np.int64) != len(mine) * (k * (k - 1) // 2 if once else k * k2):
            small = np.zeros(shape, np.uint32)  # a cell ran over: rows with an expert more than once, or many without one
            _scatter(mine, later, once, small)
        yield small


@compiled
def _fold(table: np.ndarray, pairs: np.ndarray) -> None:
    """Add both cells of each pair of slots to the one of its experts that is above the diagonal."""
    for a in range(1, table.shape[0]):
        for b in range(a + 1, table.shape[1]):
            pairs[a - 1, b - 1] += np.uint32(table[a, b]) + np.uint32(table[b, a])


@compiled
def _scatter(here: np.ndarray, after: np.ndarray, once: bool, table: np.ndarray) -> None:
    if here.shape[1] == 8 and after.shape[1] == 8:  # the usual k as a constant: the loops over it are unrolled
        _scatter_each(here, after, once, table, 8, 8)
    else:
        _scatter_each(here, after, once, table, here.shape[1], after.shape[1])


@numba.njit(inline="always")
def _scatter_each(here: np.ndarray, after: np.ndarray, once: bool, table: np.ndarray, k: int, k2: int) -> None:
    one = table.dtype.type(1)
    if once:
        for t in range(here.shape[0]):
            for i in range(k):
                s = _U(here[t, i])
                for j in range(i + 1, k):
                    table[s, _U(here[t, j])] += one
        return
    for t in range(here.shape[0]):
        for i in range(k):
            s = _U(here[t, i])
            for j in range(k2):
                table[s, _U(after[t, j])] += one


def count_pairs_by_bits(here: np.ndarray, after: np.ndarray, table: np.ndarray) -> None:
    """The same from bit tables; of a site with itself only the cells above the diagonal are meant."""
    padded = np.zeros((here.shape[1], after.shape[1]), np.int64)
    _intersect(here, after, here is after, padded)
    table[1:, 1:] += padded[_LANES:, _LANES:][: table.shape[0] - 1, : table.shape[1] - 1]


@compiled
def _intersect(x: np.ndarray, y: np.ndarray, upper: bool, table: np.ndarray) -> None:
    """Add to table int64, with the columns of x as rows and those of y as columns, in how many rows both are set.

    ``upper`` leaves out what is below the diagonal, but for its lane.
    """
    for q in range(0, x.shape[0], _WORDS):
        for b in range(_LANES, y.shape[1], _LANES):
            for a in range(_LANES, b + _LANES if upper else x.shape[1]):
                _add_common(x, _U(q * x.shape[1] + a), y, _U(q * y.shape[1] + b), table, _U(a * y.shape[1] + b))


@intrinsic
def _add_common(context: Any, x: Any, a: Any, y: Any, b: Any, table: Any, cell: Any) -> Any:
    """table[cell + i] += bits that are set in x[a] and y[b + i], for _LANES i, over _WORDS lines; places are those of the flat arrays.

    Written in vectors, as the compiler does not use the processor's widest ones of its own accord.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, number = ir.VectorType(ir.IntType(64), _LANES), ir.IntType(32)
        count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), f"llvm.ctpop.v{_LANES}i64")
        lines = [context.make_array(t)(context, builder, v) for t, v in zip(signature.args[::2], args[::2], strict=True)]
        x, y, table = lines
        at_x, at_y, cell = args[1::2]
        nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(number, _LANES), [0] * _LANES)
        total = builder.bitcast(builder.gep(table.data, [cell]), vector.as_pointer())
        found = builder.load(total, align=8)
        for _ in range(_WORDS):
            one = builder.insert_element(nothing, builder.load(builder.gep(x.data, [at_x])), ir.Constant(number, 0))
            many = builder.load(builder.bitcast(builder.gep(y.data, [at_y]), vector.as_pointer()), align=8)
            found = builder.add(found, builder.call(count, [builder.and_(builder.shuffle_vector(one, nothing, first), many)]))
            at_x, at_y = (builder.add(at, builder.extract_value(array.shape, 1)) for at, array in ((at_x, x), (at_y, y)))
        builder.store(found, total, align=8)
        return context.get_dummy_value()

    return types.void(x, types.uintp, y, types.uintp, table, types.uintp), generate
