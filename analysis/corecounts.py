"""Counts by (statistic, site, label, a, b) as arrays of a block each, of a part or of a run: a tenth of the long table that they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from .files import write_arrays

PAIRS = ("coactivation", "first_flow", "flow")  # [experts, experts]; of co-activation, what is above the diagonal
JOINED, ALONE = 2**14, 2**16  # rows of a row group that holds several blocks, and one
_WIDTHS = (1, 2, 4, 8)  # bytes of a count


def pair_cells(statistic: str, here: int, after: int) -> int:
    """How many pairs of ``here`` and ``after`` experts one of PAIRS counts."""
    return here * (here - 1) // 2 if statistic == "coactivation" else here * after


@dataclass(frozen=True)
class Block:
    """One statistic, site and label: ``count``, not negative, over none, a, or a and b; ``total`` float64 alike. Cells of 0 are rows where ``every``."""

    statistic: str
    site: int
    count: np.ndarray
    total: np.ndarray | None = None
    label: str | None = None
    every: bool = False

    @property
    def key(self) -> tuple[str, int, bool, str]:
        """Sorts as the long table does: no label last."""
        return self.statistic, self.site, self.label is None, self.label or ""

    @property
    def num_rows(self) -> int:
        """Rows of the long table."""
        return self.count.size if self.every or not self.count.ndim else int(np.count_nonzero(self.count))

    def cells(self) -> np.ndarray:
        """int [num_rows]: where the rows lie in the flat arrays."""
        return np.arange(self.count.size) if self.every or not self.count.ndim else np.flatnonzero(self.count)

    def stored(self) -> np.ndarray:
        """``cells`` as a run keeps them. Of pairs of experts, all, those that never occur too, where they are few or a quarter of them occur:
        then a reader needs the counts alone. At least one, so that a run says which sites it has."""
        cells = self.cells()
        if self.statistic not in PAIRS:
            return cells
        upper, most = self.statistic == "coactivation", pair_cells(self.statistic, *self.count.shape)
        if not len(cells):
            return np.array([int(upper)][:most])
        if most > ALONE and 4 * len(cells) <= most:
            return cells
        return np.flatnonzero(np.triu(np.ones(self.count.shape, bool), 1)) if upper else np.arange(most)

    def narrow(self) -> Block:
        """The same in as few bytes as the counts allow."""
        return replace(self, count=_narrow(self.count))

    def plus(self, more: Block) -> Block:
        """The sum with that of other rows, of which there may be more values of a."""
        if self.count.shape != more.count.shape:
            shape = tuple(map(max, self.count.shape, more.count.shape))
            return self._within(shape).plus(more._within(shape))
        wide = np.min_scalar_type(int(self.count.max(initial=0)) + int(more.count.max(initial=0)))
        count = np.add(self.count, more.count, dtype=wide, casting="unsafe")
        total = None if self.total is None or more.total is None else self.total + more.total
        return Block(self.statistic, self.site, count, total, self.label, self.every)

    def _within(self, shape: tuple[int, ...]) -> Block:
        room = [(0, n - m) for n, m in zip(shape, self.count.shape, strict=True)]
        return replace(self, count=np.pad(self.count, room), total=None if self.total is None else np.pad(self.total, room))


@dataclass(frozen=True)
class CoreCounts:
    """Blocks, sorted by their keys. ``schema`` is that of the long table: statistic, site, label, a, b, count, sum."""

    schema: pa.Schema
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, schema: pa.Schema, blocks: Iterable[Block]) -> CoreCounts:
        """Blocks in any order."""
        return cls(schema, tuple(sorted(blocks, key=lambda x: x.key)))

    @property
    def num_rows(self) -> int:
        """Rows of the long table."""
        return sum(x.num_rows for x in self.blocks)

    def table(self) -> pa.Table:
        """The long table."""
        return self._table([(x, x.cells()) for x in self.blocks])

    def groups(self) -> Iterator[pa.Table]:
        """The rows that a run keeps, in the order of the long table, as row groups: each of one statistic, and of whole blocks where they are
        not larger than ALONE, so that a question reads what it asks for."""
        for _, blocks in groupby(self.blocks, key=lambda x: x.statistic):
            held, n = list[tuple[Block, np.ndarray]](), 0
            for block in blocks:
                cells = block.stored()
                if n and n + len(cells) > JOINED:
                    yield self._table(held)
                    held, n = [], 0
                if len(cells) > ALONE:
                    yield from (self._table([(block, cells[i : i + ALONE])]) for i in range(0, len(cells), ALONE))
                    continue
                held.append((block, cells))
                n += len(cells)
            if n:
                yield self._table(held)

    def where(self, column: str, value: str | int, total: int | None = None) -> pa.Table:
        """The rows of one statistic; ``column`` must be "statistic"."""
        assert column == "statistic"
        return self._table([(x, x.cells()) for x in self.blocks if x.statistic == value])

    def _table(self, pieces: Sequence[tuple[Block, np.ndarray]]) -> pa.Table:
        """Cells of blocks one below the other, as one piece of memory each column."""
        blocks, lengths = [x for x, _ in pieces], [len(cells) for _, cells in pieces]
        places = [np.divmod(c, x.count.shape[1]) if x.count.ndim == 2 else (c, None) for x, c in pieces]
        no_total = np.zeros(max(lengths, default=0))
        totals = [no_total[: len(c)] if x.total is None else x.total.ravel()[c] for x, c in pieces]
        columns = [
            _repeated([x.statistic for x in blocks], lengths),
            pa.array(np.repeat(np.array([x.site for x in blocks], np.int16), lengths)),
            _repeated([x.label for x in blocks], lengths),
            _keys([a if x.count.ndim else None for x, (a, _) in zip(blocks, places, strict=True)], lengths),
            _keys([b for _, b in places], lengths),
            pa.array(_joined([x.count.ravel()[c] for x, c in pieces], np.dtype(np.int64))),
            pa.array(_joined(totals, np.dtype(np.float64))),
        ]
        return pa.table(columns, schema=self.schema)

    def write(self, path: Path) -> None:
        """As an .npz file, whose checksums numpy compares."""
        narrow = [_narrow(x.count) for x in self.blocks]
        described = [(x.statistic, x.site, x.label, x.every, x.total is not None, n.itemsize, n.shape)
                     for x, n in zip(self.blocks, narrow, strict=True)]  # fmt: skip
        counts = {f"counts-{n}": _joined([x.ravel() for x in narrow if x.itemsize == n], np.dtype(f"u{n}")) for n in _WIDTHS}
        totals = _joined([x.total.ravel() for x in self.blocks if x.total is not None], np.dtype(np.float64))
        blocks = np.frombuffer(json.dumps(described).encode(), np.uint8)
        write_arrays(path, [("blocks", blocks), ("totals", totals), *counts.items()])

    @classmethod
    def read(cls, path: Path, schema: pa.Schema) -> CoreCounts:
        """What ``write`` wrote."""
        with np.load(path, allow_pickle=False) as file:
            described, totals, counts = json.loads(file["blocks"].tobytes()), file["totals"], {n: file[f"counts-{n}"] for n in _WIDTHS}
        blocks, taken = [], dict.fromkeys((0, *_WIDTHS), 0)

        def take(array: np.ndarray, which: int, shape: Sequence[int]) -> np.ndarray:
            start = taken[which]
            taken[which] += math.prod(shape)
            return array[start : taken[which]].reshape(shape)

        for statistic, site, label, every, has_total, width, shape in described:
            total = take(totals, 0, shape) if has_total else None
            blocks.append(Block(statistic, site, take(counts[width], width, shape), total, label, every))
        return cls(schema, tuple(blocks))


class CoreSum:
    """The sum of the counts added so far; cells are summed in the order of what is added."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._blocks: dict[tuple[str, int, bool, str], Block] = {}

    def add(self, counts: CoreCounts) -> None:
        """Add counts."""
        for block in counts.blocks:
            mine = self._blocks.get(block.key)
            self._blocks[block.key] = block.narrow() if mine is None else mine.plus(block)

    def total(self) -> CoreCounts:
        """The sum."""
        return CoreCounts.of(self._schema, self._blocks.values())


def _narrow(counts: np.ndarray) -> np.ndarray:
    """The same in the narrowest unsigned type."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))), copy=False)


def _joined(arrays: Sequence[np.ndarray], type_: np.dtype) -> np.ndarray:
    return np.concatenate(arrays, dtype=type_, casting="unsafe") if arrays else np.zeros(0, type_)


def _repeated(texts: Sequence[str | None], lengths: Sequence[int]) -> pa.Array:
    """Each text so many times."""
    pieces = [(x or "").encode() for x in texts]
    offsets = np.zeros(sum(lengths) + 1, np.int32)
    np.cumsum(np.repeat(np.array([len(x) for x in pieces], np.int32), lengths), out=offsets[1:])
    valid = np.packbits(np.repeat(np.array([x is not None for x in texts], bool), lengths), bitorder="little")
    joined = b"".join(x * n for x, n in zip(pieces, lengths, strict=True))
    return pa.StringArray.from_buffers(sum(lengths), pa.py_buffer(offsets), pa.py_buffer(joined), pa.py_buffer(valid))


def _keys(arrays: Sequence[np.ndarray | None], lengths: Sequence[int]) -> pa.Array:
    given = [np.zeros(n, np.int32) if x is None else x for x, n in zip(arrays, lengths, strict=True)]
    return pa.array(_joined(given, np.dtype(np.int32)), mask=np.repeat(np.array([x is None for x in arrays], bool), lengths))
