"""Adds up long tables of counts, part after part, in memory that grows with the sum and not with the number of parts; ``keysums`` in files.

A table's columns are the keys of a *block*, then a and b, then its values. What is added is kept as sorted pieces, block by block; when
the pieces of a table outgrow its sum, each block is added up in dense windows over (a, b). A cell is summed from left to right in the
order of the tables, wherever that happens, so the result is the same to the last bit as that of adding them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .corecounts import CoreCounts, CoreSum
from .counting import compiled
from .keycounts import PartCounts
from .keysums import KeySum
from .longtables import LongTable, whole, write_long

PENDING_ROWS = 2**19  # kept before they are added up: 12 MB
WINDOW_CELLS = 2**18  # what the processor's cache holds
LARGEST_SPAN = 2**24  # of token ids; wider ones are no vocabulary, and are sorted
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of one block sorted by a, then b: int32 a and b (-1 for null), int64 counts, float64 sums (empty where there are none)."""

    a: np.ndarray
    b: np.ndarray
    count: np.ndarray
    total: np.ndarray
    lowest_b: int
    highest_b: int


class RunningSum:
    """The sum of the tables added so far. ``block`` is how many columns of the schema, from the left, make a block."""

    def __init__(self, schema: pa.Schema, block: int) -> None:
        self._schema, self._block = schema, block
        self._nullable = False  # as soon as a null comes in, -1 stands for it
        self._pieces: dict[Key, list[Piece]] = {}
        self._untidy: set[Key] = set()
        self._pending = self._summed = 0

    def add(self, table: pa.Table) -> None:
        """Add a table of the schema; its rows may come in any order."""
        for batch in table.select(self._schema.names).cast(self._schema).to_batches():
            if not batch.num_rows:  # the chunk of a site that executed nothing in this part
                continue
            for key, piece, tidy in _split(batch, self._block):
                mine = self._pieces.setdefault(key, [])
                mine.append(piece)
                if not tidy or len(mine) > 1:
                    self._untidy.add(key)
            self._nullable |= any(x.null_count > 0 for x in batch.columns[self._block : self._block + 2])
            self._pending += batch.num_rows
        if self._pending > max(PENDING_ROWS, self._summed):
            self._add_up()

    @property
    def rows(self) -> int:
        """How many rows are held, of the sum and of what is not yet added up."""
        return self._summed + self._pending

    def table(self) -> pa.Table:
        """The sum, sorted by its keys, null last; afterwards nothing is held any more."""
        tables = list(self.blocks())
        return pa.concat_tables(tables) if tables else self._schema.empty_table()

    def blocks(self) -> Iterator[pa.Table]:
        """The rows of the sum block by block, in their order; each is let go of, so that nothing is left at the end."""
        for key in sorted(self._pieces, key=lambda key: [(x is None, x) for x in key]):
            pieces = self._pieces.pop(key)
            yield _table_of(self._schema, key, _sum_of(pieces) if key in self._untidy else pieces[0], self._nullable)

    def _add_up(self) -> None:
        for key in self._untidy:
            self._pieces[key] = [_sum_of(self._pieces[key])]
        self._untidy.clear()
        self._pending, self._summed = 0, sum(len(x[0].a) for x in self._pieces.values())


class ShortSum:
    """The sum of counts that do not grow with the text: as they were counted, or of tables as soon as there is one."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema, self._counts = schema, CoreSum(schema)
        self._tables: RunningSum | None = None

    def add(self, rows: pa.Table | LongTable | CoreCounts) -> None:
        """Add counts, or a table in any order."""
        if isinstance(rows, CoreCounts) and self._tables is None:
            self._counts.add(rows)
            return
        if self._tables is None:
            self._tables = RunningSum(self._schema, 3)
            self._tables.add(self._counts.total().table())
        self._tables.add(whole(rows))

    def total(self) -> pa.Table | CoreCounts:
        """The sum."""
        return self._counts.total() if self._tables is None else self._tables.table()


class LongSum:
    """The sum of counts by (site, key, expert): in memory, or, with a folder, of parts' counts in files, which memory does not grow with."""

    def __init__(self, schema: pa.Schema, folder: Path | None) -> None:
        (key,) = {*schema.names} - {"site", "expert", "count"}
        self._schema, self._key, self._folder = schema, key, folder
        self._memory = RunningSum(pa.schema([schema.field(n) for n in ("site", key, "expert", "count")]), 1)
        self._files = None if folder is None else KeySum(schema, folder)

    def add(self, rows: pa.Table | LongTable | PartCounts) -> None:
        """Add a part's counts, or, where there is no folder, a table in any order."""
        if self._files is None:
            self._memory.add(whole(rows))
        elif isinstance(rows, PartCounts):
            self._files.add(rows)
        else:
            raise TypeError(f"counts by {self._key} are added up in files as parts count them, not as a table")

    def total(self) -> pa.Table | LongTable:
        """The sum, sorted by site, key and expert: a table, or a file in the folder."""
        if self._files is None or self._folder is None:
            return self._memory.table().select(self._schema.names)
        path = self._folder / f"{self._key}.parquet"
        write_long(self._files.tables(), self._schema, path)
        return LongTable(path, self._schema)


def _table_of(schema: pa.Schema, key: Key, piece: Piece, nullable: bool) -> pa.Table:
    """The rows of one block; -1 stands for null where ``nullable``."""
    n, types, block = len(piece.a), schema.types, len(key)
    columns = [pa.repeat(pa.scalar(x, t), n) for x, t in zip(key, types[:block], strict=True)]
    for values, type_ in zip((piece.a, piece.b), types[block:], strict=False):
        columns.append(pa.array(values, type_, mask=values < 0 if nullable else None))
    columns.append(pa.array(piece.count, pa.int64()))
    if len(columns) < len(types):
        columns.append(pa.array(piece.total, pa.float64()))
    return pa.table(columns, schema=schema)


def _split(batch: pa.RecordBatch, block: int) -> Iterator[tuple[Key, Piece, bool]]:
    """The blocks of a batch as pieces, and whether each was in strict order already."""
    columns = batch.columns
    a, b = ((pc.fill_null(x, -1) if x.null_count else x).to_numpy() for x in columns[block : block + 2])
    count = columns[block + 2].to_numpy()
    total = columns[block + 3].to_numpy() if len(columns) > block + 3 else np.zeros(0)
    starts = np.flatnonzero(np.any([_changes(x) for x in columns[:block]], axis=0))
    ends = np.append(starts[1:], batch.num_rows)
    keys = zip(*(x.take(pa.array(starts)).to_pylist() for x in columns[:block]), strict=True)
    tidy, lowest, highest = np.empty(len(ends), np.bool_), np.empty(len(ends), np.int32), np.empty(len(ends), np.int32)
    _extents(a, b, starts, ends, tidy, lowest, highest)
    for i, (key, start, end) in enumerate(zip(keys, starts.tolist(), ends.tolist(), strict=True)):
        mine = slice(start, end)
        piece = Piece(a[mine], b[mine], count[mine], total[mine], int(lowest[i]), int(highest[i]))
        yield key, piece if tidy[i] else _ordered(piece), bool(tidy[i])


def _changes(column: pa.Array) -> np.ndarray:
    """bool [n]: where a value differs from the one before; the first one does."""
    values = column.to_numpy() if pa.types.is_integer(column.type) else column.dictionary_encode().indices.fill_null(-1).to_numpy()
    return np.append(True, values[1:] != values[:-1]) if len(values) else np.zeros(0, bool)


def _ordered(piece: Piece) -> Piece:
    order = np.lexsort((piece.b, piece.a))
    total = piece.total[order] if len(piece.total) else piece.total
    return Piece(piece.a[order], piece.b[order], piece.count[order], total, piece.lowest_b, piece.highest_b)


def _sum_of(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one block added up, window by window over the values of a that occur."""
    lowest, highest = min(p.lowest_b for p in pieces), max(p.highest_b for p in pieces)
    ids = _values_of_a(pieces)
    width, has_total = highest - lowest + 1, len(pieces[0].total) > 0
    lines = min(max(1, WINDOW_CELLS // width), len(ids))
    counts, seen = np.zeros((lines, width), np.int64), np.zeros((lines, width), np.bool_)
    totals = np.zeros((lines, width) if has_total else (0, width))
    found = []
    for first in range(0, len(ids), lines):
        mine = ids[first : first + lines]
        cells = 0
        for p in pieces:
            i, j = np.searchsorted(p.a, mine[0]), np.searchsorted(p.a, mine[-1], side="right")
            cells += _add_rows(p.a[i:j], p.b[i:j], p.count[i:j], p.total[i:j], mine, lowest, counts, totals, seen)
        room = cells + 1
        out = (np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int64), np.empty(room if has_total else 0))
        _take_cells(mine, lowest, (counts, totals), seen, out)
        found.append(tuple(x[:cells] for x in out))
        for table in (counts, totals, seen):
            table.fill(0)
    a, b, count, total = found[0] if len(found) == 1 else (np.concatenate(x) for x in zip(*found, strict=True))
    return Piece(a, b, count, total, lowest, highest)


def _values_of_a(pieces: Sequence[Piece]) -> np.ndarray:
    """int32, ascending: the values of a in any of the pieces."""
    lowest, highest = min(int(p.a[0]) for p in pieces), max(int(p.a[-1]) for p in pieces)
    if highest - lowest > LARGEST_SPAN:
        return np.unique(np.concatenate([p.a for p in pieces]))
    there = np.zeros(highest - lowest + 1, np.bool_)
    for p in pieces:
        _mark(p.a, lowest, there)
    return (np.flatnonzero(there) + lowest).astype(np.int32)


@compiled
def _mark(a: np.ndarray, lowest: int, there: np.ndarray) -> None:
    for r in range(a.shape[0]):
        there[a[r] - lowest] = True


@compiled
def _extents(a: np.ndarray, b: np.ndarray, starts: np.ndarray, ends: np.ndarray, tidy: np.ndarray, lowest: np.ndarray,
             highest: np.ndarray) -> None:  # fmt: skip
    """For each block: whether its rows ascend strictly by a, then b; the least and the greatest b."""
    for i in range(starts.shape[0]):
        least = greatest = b[starts[i]]
        ascending = True
        for r in range(starts[i] + 1, ends[i]):
            ascending &= (a[r] > a[r - 1]) | ((a[r] == a[r - 1]) & (b[r] > b[r - 1]))
            least, greatest = min(least, b[r]), max(greatest, b[r])
        tidy[i], lowest[i], highest[i] = ascending, least, greatest


@compiled
def _add_rows(a: np.ndarray, b: np.ndarray, count: np.ndarray, total: np.ndarray, ids: np.ndarray, lowest: int, counts: np.ndarray,
              totals: np.ndarray, seen: np.ndarray) -> int:  # fmt: skip
    """Add rows to the cells [place of a in ids, b - lowest]; a and ids ascend, and ids has every a. Returns how many cells were new."""
    line, has_total, new = 0, total.shape[0] > 0, 0
    for r in range(a.shape[0]):
        while ids[line] != a[r]:
            line += 1
        at = b[r] - lowest
        counts[line, at] += count[r]
        new += not seen[line, at]
        seen[line, at] = True
        if has_total:
            totals[line, at] += total[r]
    return new


@compiled
def _take_cells(ids: np.ndarray, lowest: int, cells: tuple[np.ndarray, ...], seen: np.ndarray, out: tuple[np.ndarray, ...]) -> None:
    """Copy the cells that were seen, in order, as (a, b, value of each table of cells); ``out`` has room for one more.

    Each cell is written, and kept where it was seen: a branch would be guessed wrong half the time.
    """
    m, (counts, totals), (out_a, out_b, out_count, out_total) = 0, cells, out
    for line in range(ids.shape[0]):
        for at in range(seen.shape[1]):
            out_a[m], out_b[m], out_count[m] = ids[line], at + lowest, counts[line, at]
            m += seen[line, at]
    if totals.shape[0] > 0:
        m = 0
        for line in range(ids.shape[0]):
            for at in range(seen.shape[1]):
                out_total[m] = totals[line, at]
                m += seen[line, at]
