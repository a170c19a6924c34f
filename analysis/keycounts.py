"""Counts by (site, key, expert) as a part's kernel writes them, a sixth of the bytes of a long table; the key is a token id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class SiteCounts:
    """One site: ``keys`` int32 [g], ascending; the entries of key i end at ``ends`` int32 [g]: ``experts``, ascending, and ``counts``, unsigned."""

    keys: np.ndarray
    ends: np.ndarray
    experts: np.ndarray
    counts: np.ndarray

    def keys_of(self, entries: np.ndarray) -> np.ndarray:
        """int32: the keys of entries, given by their numbers."""
        found: np.ndarray = self.keys[np.searchsorted(self.ends, entries, side="right")]
        return found


@dataclass(frozen=True)
class KeyCounts:
    """The sites of a part in turn. ``schema`` is that of the long table it stands for: site, key, expert, count, sorted by the first three."""

    schema: pa.Schema
    sites: tuple[SiteCounts, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the long table."""
        return sum(len(x.counts) for x in self.sites)

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """Least and greatest site, key and expert; of a part that counted something."""
        some = [x for x in self.sites if len(x.counts)]
        keys = min(int(x.keys[0]) for x in some), max(int(x.keys[-1]) for x in some)
        return (0, len(self.sites) - 1), keys, (0, max(int(x.experts.max()) for x in some))

    def table(self) -> pa.Table:
        """The long table."""
        return pa.concat_tables(self.tables())

    def tables(self) -> Iterator[pa.Table]:
        """The long table site by site."""
        for i, x in enumerate(self.sites):
            keys = np.repeat(x.keys, np.diff(x.ends, prepend=0))
            yield self.rows(i, keys, x.experts, x.counts)

    def rows(self, site: int, *columns: np.ndarray) -> pa.Table:
        """Keys, experts and counts of one site as rows of the long table."""
        values = (np.full(len(columns[0]), site, np.int16), *columns)
        return pa.table([pa.array(v.astype(t.to_pandas_dtype(), copy=False), t) for v, t in zip(values, self.schema.types, strict=True)],
                        schema=self.schema)  # fmt: skip

    def where(self, column: str, value: str | int, total: int | None = None) -> pa.Table:
        """The rows of one site; ``column`` must be "site"."""
        assert column == "site" and isinstance(value, int)
        at = range(value, min(value + 1, len(self.sites)))
        return pa.concat_tables(KeyCounts(self.schema, tuple(self.sites[i] for i in at)).tables()) if at else self.schema.empty_table()

    def write(self, path: Path) -> None:
        """As an .npz file, whose checksums numpy compares: the sites one after the other, the keys that they share once."""
        shared = {id(x.keys): x.keys for x in self.sites}
        which = [list(shared).index(id(x.keys)) for x in self.sites]
        arrays = {"shared": _ends(shared.values()), "keys": _joined(shared.values()), "which": np.array(which, np.int32)}
        for name in ("ends", "experts", "counts"):
            arrays[name] = _joined(getattr(x, name) for x in self.sites)
        arrays["entries"] = _ends(x.counts for x in self.sites)
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes every keyword for its option

    @classmethod
    def read(cls, path: Path, schema: pa.Schema) -> KeyCounts:
        """What ``write`` wrote."""
        with np.load(path, allow_pickle=False) as file:
            shared = np.split(file["keys"], file["shared"])[:-1]
            keys = [shared[i] for i in file["which"]]
            ends = np.split(file["ends"], np.cumsum([len(x) for x in keys], dtype=int))
            experts, counts = (np.split(file[n], file["entries"]) for n in ("experts", "counts"))
        return cls(schema, tuple(SiteCounts(*x) for x in zip(keys, ends, experts, counts, strict=False)))


def _ends(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """int64: where each array ends, laid one after the other."""
    return np.cumsum([len(x) for x in arrays], dtype=np.int64)


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    given = list(arrays)
    return np.concatenate(given) if given else np.zeros(0, np.int32)
