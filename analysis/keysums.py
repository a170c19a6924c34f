"""Adds up counts of parts by (site, key, expert) that lie in files: one site after the other, so that memory holds one site of FAN_IN parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .counting import compiled, lowest_bit
from .keycounts import KeyCounts, SiteCounts, StoredCounts, rows_of, write_sites

FAN_IN = 32  # files added up at once
WINDOW_KEYS = 2**17  # of all of them, whose entries are looked at together: some 30 MB
_U = np.uintp


class KeySum:
    """The sum of the counts added so far, of at most FAN_IN files: then they are added up into one. Those it writes itself are in ``folder``."""

    def __init__(self, schema: pa.Schema, folder: Path) -> None:
        self._schema, self._folder = schema, folder
        self._files: list[StoredCounts] = []
        self._written = 0

    def add(self, counts: KeyCounts | StoredCounts) -> None:
        """Add counts."""
        self._files.append(counts if isinstance(counts, StoredCounts) else self._stored(counts.sites))
        if len(self._files) == FAN_IN:
            together = self._stored(_sites(self._files))
            for x in self._files:
                if x.path.parent == self._folder:
                    x.path.unlink()
            self._files = [together]

    def tables(self) -> Iterator[pa.Table]:
        """The sum as a long table, site by site, sorted by key and expert."""
        return (rows_of(self._schema, i, x) for i, x in enumerate(_sites(self._files)) if len(x.counts))

    def _stored(self, sites: Iterable[SiteCounts]) -> StoredCounts:
        path = self._folder / f"{self._schema.names[0]}-{self._written}.npz"  # the two sums of a run begin with another column
        self._written += 1
        write_sites(path, sites)
        return StoredCounts(path, self._schema)


@dataclass(frozen=True)
class Window:
    """A stretch of keys: of each file the first and last of its keys that lie there; of these, laid one after the other, ``order`` int64 is their
    places by ascending key, and the distinct key g is that of order[starts[g]:starts[g + 1]]."""

    stretches: tuple[tuple[int, int], ...]
    order: np.ndarray
    starts: np.ndarray


def _sites(files: Sequence[StoredCounts]) -> Iterator[SiteCounts]:
    """The sum site by site. Sites most often share their keys, which are put in order once then."""
    with ExitStack() as stack:
        opened = [stack.enter_context(f.opened()) for f in files]
        before: tuple[list[int], np.ndarray, list[Window]] | None = None
        for i in range(max((len(f.sizes) for f in opened), default=0)):
            parts = [f.site(i) for f in opened if i < len(f.sizes)]
            same = [id(x.keys) for x in parts]
            if before is None or before[0] != same:
                before = same, *_in_order([x.keys for x in parts])
            yield _sum_of(parts, *before[1:])


def _in_order(keys: Sequence[np.ndarray]) -> tuple[np.ndarray, list[Window]]:
    """(int32, the distinct keys, ascending; windows of about WINDOW_KEYS keys)"""
    distinct = np.unique(np.concatenate(keys))
    n = max(sum(map(len, keys)) // WINDOW_KEYS, 1)
    lowest = [distinct[len(distinct) * i // n] for i in range(1, n)] if len(distinct) else []
    bounds = [[0, *np.searchsorted(k, np.array(lowest, k.dtype)).tolist(), len(k)] for k in keys]
    windows = []
    for w in range(len(lowest) + 1):
        stretches = tuple((b[w], b[w + 1]) for b in bounds)
        together = np.concatenate([k[a:b] for k, (a, b) in zip(keys, stretches, strict=True)])
        order = np.argsort(together, kind="stable")
        first = np.flatnonzero(np.diff(together[order], prepend=together[order[:1]] - 1)) if len(order) else np.zeros(0, np.int64)
        windows.append(Window(stretches, order, np.append(first, len(order))))
    return distinct, windows


def _sum_of(parts: Sequence[SiteCounts], keys: np.ndarray, windows: Sequence[Window]) -> SiteCounts:
    """The sum of one site's counts, window by window."""
    most = max((int(x.counts.max(initial=0)) for x in parts), default=0) * len(parts)
    wide = np.dtype(np.uint32 if most < 2**32 else np.uint64)  # with experts always the same types, the kernel is compiled once, most often
    found = [_sum_within([_within(x, *s) for x, s in zip(parts, w.stretches, strict=True)], w, wide) for w in windows]
    entries = np.cumsum([0, *(len(x[1]) for x in found)]).tolist()
    ends = np.concatenate([x[0] + n for x, n in zip(found, entries, strict=False)])
    return SiteCounts(keys, ends, np.concatenate([x[1] for x in found]), np.concatenate([x[2] for x in found]))


def _within(counts: SiteCounts, start: int, stop: int) -> SiteCounts:
    """The keys start to stop and their entries."""
    first, last = (int(counts.ends[i - 1]) if i else 0 for i in (start, stop))
    return SiteCounts(counts.keys[start:stop], counts.ends[start:stop] - first, counts.experts[first:last], counts.counts[first:last])


def _sum_within(parts: Sequence[SiteCounts], window: Window, wide: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ends, experts, counts) of the distinct keys of a window, the counts in the narrowest type."""
    sizes = np.concatenate([x.lengths for x in parts])
    ends = np.cumsum(sizes)
    experts = np.concatenate([x.experts for x in parts], dtype=np.uint16)
    counts = np.concatenate([x.counts for x in parts], dtype=wide, casting="unsafe")
    slots = int(experts.max(initial=0)) + 1
    row, seen = np.zeros(slots, wide), np.zeros(slots // 64 + 1, np.uint64)
    out = np.empty(len(window.starts) - 1, np.int64), np.empty_like(experts), np.empty_like(counts)
    m = _add_up(window.order, window.starts, ends - sizes, ends, experts, counts, row, seen, *out)
    return out[0], out[1][:m].copy(), out[2][:m].astype(np.min_scalar_type(int(out[2][:m].max(initial=0))))


@compiled
def _add_up(order: np.ndarray, starts: np.ndarray, begins: np.ndarray, ends: np.ndarray, experts: np.ndarray, counts: np.ndarray,
            row: np.ndarray, seen: np.ndarray, out_ends: np.ndarray, out_experts: np.ndarray, out_counts: np.ndarray) -> int:  # fmt: skip
    """For each distinct key g the entries of order[starts[g]:starts[g + 1]], added up by expert; returns how many entries that makes.

    ``row`` and ``seen`` uint64, of a cell and a bit for each expert, are 0 and left so.
    """
    m = 0
    for g in range(out_ends.shape[0]):
        first, last = starts[g], starts[g + 1]
        if last - first == 1:  # of one part alone: as they are
            for r in range(begins[order[first]], ends[order[first]]):
                out_experts[m], out_counts[m] = experts[r], counts[r]
                m += 1
        else:
            for i in range(first, last):
                for r in range(begins[order[i]], ends[order[i]]):
                    e = _U(experts[r])
                    row[e] += counts[r]
                    seen[e >> _U(6)] |= _U(1) << (e & _U(63))
            for q in range(seen.shape[0]):
                word = seen[q]
                seen[q] = 0
                while word:
                    e = lowest_bit(word) + _U(64 * q)
                    out_experts[m], out_counts[m] = e, row[e]
                    row[e] = 0
                    word &= word - _U(1)
                    m += 1
        out_ends[g] = m
    return m
