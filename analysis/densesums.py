"""Counts by (site, key, expert) in an array of a fixed size, while the keys lie close together: token ids of a vocabulary, documents.

Adding a row to its cell costs a fraction of sorting it into a sum. Cells are 8 bits wide, as most pairs of a token id and an expert are
rare; what finds no place (another key, a sum above 255) is handed back, to be added up elsewhere, so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .counting import compiled
from .keycounts import KeyCounts

CELLS = 2**27  # 134 MB at most: 131,072 token ids at 16 sites of 64 experts
_LANE = 8  # experts and sites are rounded up, so that one that was not used so far finds its place


class DenseSum:
    """The sum of the rows that fit: ``keys`` keys from ``first`` on. ``schema`` is that of the tables given and taken: site, key, expert, count."""

    def __init__(self, schema: pa.Schema, first: int, keys: int, sites: int, experts: int) -> None:
        self._schema, self._first = schema, first
        self._cells = np.zeros((sites, keys, experts), np.uint8)

    @classmethod
    def around(cls, rows: pa.Table | KeyCounts) -> DenseSum | None:
        """An empty sum with room for rows, of which there are some, and more; None where their keys lie too far apart."""
        site, key, expert = rows.extents if isinstance(rows, KeyCounts) else _extents(rows, rows.schema.names[:3])
        sites, experts = (-(-(x[1] + 1) // _LANE) * _LANE for x in (site, expert))
        room = CELLS // (sites * experts) if min(site[0], expert[0]) >= 0 else 0
        first = -1 if key[0] >= -1 and key[1] < room - 1 else key[0]  # a lower id may come; -1 is a token without one
        span = key[1] - first + 1
        return cls(rows.schema, first, min(room, span + span // 8 + 1), sites, experts) if span <= room else None

    def add(self, rows: pa.Table | KeyCounts) -> pa.Table:
        """Add rows; returns those that found no place."""
        return self._add_counts(rows) if isinstance(rows, KeyCounts) else self._add_table(rows)

    def _add_counts(self, rows: KeyCounts) -> pa.Table:
        left = []
        for i, x in enumerate(rows.sites):
            homeless = np.zeros(len(x.counts), np.bool_)
            cells = self._cells[i] if i < len(self._cells) else self._cells[0, :0]
            if _add_entries(x.keys, x.ends, x.experts, x.counts, self._first, cells, homeless):
                at = np.flatnonzero(homeless)
                left.append(rows.rows(i, x.keys_of(at), x.experts[at], x.counts[at]))
        return pa.concat_tables([self._schema.empty_table(), *left])

    def _add_table(self, table: pa.Table) -> pa.Table:
        left = []
        for batch in table.select(self._schema.names).cast(self._schema).to_batches():
            homeless = np.zeros(batch.num_rows, np.bool_)
            site, key, expert, count = (x.to_numpy() for x in batch.columns)
            if _add_cells(site, key, expert, count, self._first, self._cells, homeless):
                left.append(batch.filter(pa.array(homeless)))
        return pa.Table.from_batches(left, self._schema)

    @property
    def sites(self) -> int:
        """How many sites have cells."""
        return len(self._cells)

    def has_place_for(self, site: int, rows: pa.Table) -> bool:
        """Whether every row of a table of one site belongs to a cell, whatever its count."""
        if not len(rows):
            return True
        key, expert = _extents(rows, self._schema.names[1:3])
        sites, keys, experts = self._cells.shape
        inside = key[0] >= self._first and key[1] < self._first + keys and expert[0] >= 0 and expert[1] < experts
        return site < sites and inside

    def site(self, site: int, more: pa.Table | None = None) -> pa.Table:
        """The counts of one site that are not 0, sorted by key and expert, with those of ``more`` added, which is sorted, too, and has place."""
        cells = self._cells[site] if site < len(self._cells) else self._cells[0, :0]
        added = tuple(x.to_numpy() for x in (self._schema.empty_table() if more is None else more).columns[1:])
        n = int(np.count_nonzero(cells)) + len(added[0])
        key, expert, count = np.empty(n + 1, np.int32), np.empty(n + 1, np.int32), np.empty(n + 1, np.int64)
        n = _take_cells(cells, self._first, added, key, expert, count)
        types = self._schema.types
        columns = [
            pa.repeat(pa.scalar(site, types[0]), n),
            pa.array(key[:n], types[1]),
            pa.array(expert[:n], types[2]),
            pa.array(count[:n]),
        ]
        return pa.table(columns, schema=self._schema)

    def blocks(self) -> Iterator[pa.Table]:
        """The counts that are not 0, site by site."""
        return (x for x in map(self.site, range(len(self._cells))) if len(x))


def _extents(rows: pa.Table, names: Sequence[str]) -> list[tuple[int, int]]:
    return [tuple(pc.min_max(rows[n]).as_py().values()) for n in names]


@compiled
def _add_entries(keys: np.ndarray, ends: np.ndarray, experts: np.ndarray, counts: np.ndarray, first: int, cells: np.ndarray,
                 homeless: np.ndarray) -> int:  # fmt: skip
    """Add the entries of a site (``SiteCounts``) to its cells uint8 [keys, experts]; returns how many found no place, which are marked."""
    begin, left = 0, 0
    for g in range(keys.shape[0]):
        k = np.int64(keys[g]) - first
        inside = (k >= 0) & (k < cells.shape[0])
        for m in range(begin, ends[g]):
            e = experts[m]
            if inside and e < cells.shape[1]:
                total = np.int64(cells[k, e]) + counts[m]
                if total < 256:
                    cells[k, e] = total
                    continue
            homeless[m] = True
            left += 1
        begin = ends[g]
    return left


@compiled
def _add_cells(site: np.ndarray, key: np.ndarray, expert: np.ndarray, count: np.ndarray, first: int, cells: np.ndarray,
               homeless: np.ndarray) -> int:  # fmt: skip
    """Add rows to cells uint8 [sites, keys, experts]; returns how many found no place, which are marked. A count of 0 would be lost."""
    sites, keys, experts = cells.shape
    left = 0
    for r in range(site.shape[0]):
        s, k, e, n = np.int64(site[r]), np.int64(key[r]) - first, np.int64(expert[r]), count[r]
        if (s >= 0) & (s < sites) & (k >= 0) & (k < keys) & (e >= 0) & (e < experts) & (n > 0) & (n < 256):
            total = np.int64(cells[s, k, e]) + n
            if total < 256:
                cells[s, k, e] = total
                continue
        homeless[r] = True
        left += 1
    return left


@compiled
def _take_cells(cells: np.ndarray, first: int, more: tuple[np.ndarray, ...], key: np.ndarray, expert: np.ndarray,
                count: np.ndarray) -> int:  # fmt: skip
    """Copy the cells of a site that are not 0, in order, with the rows of ``more`` (key, expert, count) added; returns how many, there is room for one more.

    Each cell is written, and kept where it was counted. The few keys of which there is more are written once again.
    """
    m = p = 0
    more_key, more_expert, more_count = more
    for k in range(cells.shape[0]):
        begin = m
        for e in range(cells.shape[1]):
            key[m], expert[m], count[m] = k + first, e, cells[k, e]
            m += cells[k, e] != 0
        if p < more_key.shape[0] and more_key[p] == k + first:
            m = begin
            for e in range(cells.shape[1]):
                total = np.int64(cells[k, e])
                if p < more_key.shape[0] and more_key[p] == k + first and more_expert[p] == e:
                    total += more_count[p]
                    p += 1
                key[m], expert[m], count[m] = k + first, e, total
                m += total != 0
    return m
