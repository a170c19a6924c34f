"""Counts by (site, key, expert) as a part's kernel writes them, a sixth of the bytes of a long table; the key is a token id or a document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .files import write_arrays


@dataclass(frozen=True)
class SiteCounts:
    """One site: ``keys`` int32 [g], ascending; the entries of key i end at ``ends`` int [g]: ``experts``, ascending, and ``counts``, not negative."""

    keys: np.ndarray
    ends: np.ndarray
    experts: np.ndarray
    counts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64 [g]: entries of each key."""
        ends: np.ndarray = self.ends.astype(np.int64)
        return np.asarray(np.diff(ends, prepend=0))


@dataclass(frozen=True)
class KeyCounts:
    """The sites of a part in turn. ``schema`` is that of the long table it stands for: sorted by site, key and expert; one column is the key."""

    schema: pa.Schema
    sites: tuple[SiteCounts, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the long table."""
        return sum(len(x.counts) for x in self.sites)

    def table(self) -> pa.Table:
        """The long table."""
        return pa.concat_tables([self.schema.empty_table(), *self.tables()])

    def tables(self) -> Iterator[pa.Table]:
        """The long table site by site."""
        return (rows_of(self.schema, i, x) for i, x in enumerate(self.sites))

    def where(self, column: str, value: str | int, total: int | None = None) -> pa.Table:
        """The rows of one site; ``column`` must be "site"."""
        assert column == "site" and isinstance(value, int)
        return rows_of(self.schema, value, self.sites[value]) if value < len(self.sites) else self.schema.empty_table()

    def write(self, path: Path) -> None:
        """As a file for ``StoredCounts``."""
        write_sites(path, self.sites)


@dataclass(frozen=True)
class StoredCounts:
    """Counts where ``write_sites`` put them, of which nothing is read before it is asked for."""

    path: Path
    schema: pa.Schema

    @contextmanager
    def opened(self) -> Iterator[OpenedCounts]:
        """The file while the block runs. Raises what numpy does for a damaged one."""
        with np.load(self.path, allow_pickle=False) as file:
            sizes = file["sizes"]
            yield OpenedCounts(file, sizes, [file[f"keys-{i}"] for i in range(sizes[:, 0].max(initial=-1) + 1)])

    def read(self) -> KeyCounts:
        """All sites."""
        with self.opened() as file:
            return KeyCounts(self.schema, tuple(file.site(i) for i in range(len(file.sizes))))

    @property
    def num_rows(self) -> int:
        """Rows of the long table."""
        return self.read().num_rows

    def table(self) -> pa.Table:
        """The long table."""
        return self.read().table()

    def where(self, column: str, value: str | int, total: int | None = None) -> pa.Table:
        """As KeyCounts has it."""
        return self.read().where(column, value, total)


PartCounts = KeyCounts | StoredCounts


@dataclass(frozen=True)
class OpenedCounts:
    """``file``, and what is read on opening it: of each site the place in ``keys`` of its own, its entries, and the bytes of an end, an expert
    and a count, int64 [sites, 5]."""

    file: Mapping[str, np.ndarray]
    sizes: np.ndarray
    keys: list[np.ndarray]

    def site(self, i: int) -> SiteCounts:
        """One site, whose keys are the same array as those of others that share it."""
        which, n, *widths = self.sizes[i].tolist()
        keys, content, values, at = self.keys[which], self.file[f"site-{i}"], list[np.ndarray](), 0
        for length, width in zip((len(keys), n, n), widths, strict=True):
            values.append(content[at : at + length * width].view(f"u{width}"))
            at += length * width
        return SiteCounts(keys, *values)


def write_sites(path: Path, sites: Iterable[SiteCounts]) -> None:
    """Sites, taken one by one, as an .npz file, whose checksums numpy compares: the bytes of each, so that one is read alone, and keys that they
    share once."""

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        shared, sizes = list[np.ndarray](), list[tuple[int, ...]]()
        for i, x in enumerate(sites):
            which = next((j for j, keys in enumerate(shared) if keys is x.keys), len(shared))
            if which == len(shared):
                shared.append(x.keys)
                yield f"keys-{which}", x.keys
            values = x.ends, x.experts, x.counts
            sizes.append((which, len(x.counts), *(a.itemsize for a in values)))
            yield f"site-{i}", np.concatenate([a.view(np.uint8) for a in values])
        yield "sizes", np.array(sizes, np.int64).reshape(-1, 5)

    write_arrays(path, arrays())


def rows_of(schema: pa.Schema, site: int, counts: SiteCounts) -> pa.Table:
    """The counts of one site as rows of the long table."""
    (key,) = {*schema.names} - {"site", "expert", "count"}
    keys = np.repeat(counts.keys, counts.lengths)
    values = {"site": np.full(len(keys), site, np.int16), key: keys, "expert": counts.experts, "count": counts.counts}
    return pa.table([pa.array(values[f.name].astype(f.type.to_pandas_dtype(), copy=False), f.type) for f in schema], schema=schema)
