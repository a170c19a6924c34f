"""Long sorted tables of counts on disk: written in row groups of one key, read by the row groups that a question needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .corecounts import CoreCounts
from .keycounts import PartCounts

GROUP_ROWS = 65_536


@dataclass(frozen=True)
class Span:
    """Row groups that hold the sites ``first`` to ``last``, whole, and nothing else."""

    first: int
    last: int
    groups: range
    rows: int


class LongTable:
    """A table in a Parquet file, of which nothing is read before it is asked for.

    ``path`` may be an open file of pyarrow's, of an object store. ``reading`` surrounds every access, so that the owner of the file can
    name it in errors. Pages carry checksums, but what the footer says of them does not: a text there must be one of ``texts``, and
    ``where`` can be told what the counts must add up to.
    """

    def __init__(self, path: Path | Any, schema: pa.Schema, reading: Callable[[], AbstractContextManager[None]] = nullcontext,
                 texts: frozenset[str] = frozenset()) -> None:  # fmt: skip
        self.path, self.schema, self._reading, self._texts = path, schema, reading, texts

    def table(self) -> pa.Table:
        """The whole table."""
        with self._reading():
            return self._spelled(self._read(range(self._footer.num_row_groups)), {})

    def where(self, column: str, value: str | int, total: int | None = None) -> pa.Table:
        """The rows with ``value`` in ``column``, in the file's order. ValueError where their counts do not sum to ``total``."""
        return self._found(column, value, total, self.schema.names)

    def counts(self, column: str, value: str | int, total: int) -> np.ndarray:
        """int64: the counts of ``where``, most often without reading the other columns."""
        return np.asarray(self._found(column, value, total, ["count"])["count"].to_numpy())

    def _found(self, column: str, value: str | int, total: int | None, names: Sequence[str]) -> pa.Table:
        with self._reading():
            extents = self._extents(column)
            groups = [i for i, x in enumerate(extents) if x is not None and x[0] <= value <= x[1]]
            if total is not None and all(extents[i] == (value, value) for i in groups):  # checked by its sum: the column need not be read
                found = self._read(groups, [n for n in names if n != column])
                if column in names:
                    of = pa.repeat(pa.scalar(value, self.schema.field(column).type), len(found))
                    found = found.add_column(names.index(column), column, of).cast(self.schema)
            else:
                found = self._spelled(_where(self._read(groups), column, value), {column: value})
            if total is not None and (pc.sum(found["count"]).as_py() or 0) != total:
                raise ValueError(f"the counts where {column} is {value} do not add up to {total}")
            return found

    def cells(self, value: str, site: int, sizes: Sequence[int]) -> np.ndarray | pa.Table | None:
        """The rows of one site where the first column holds ``value``: int64 [sizes[site]], their counts, where every cell has a row, else
        the rows. None where row groups do not hold whole sites: then ``where`` finds them. ``sizes``: cells of each site.

        Which rows are meant follows from how many there are, and what a footer says that no other could: every site that has cells is in one
        stretch of row groups, in order, of as many rows as the cells of its sites.
        """
        with self._reading():
            if value not in self._places:
                self._places[value] = self._spans(value, sizes)
            span = self._places[value].get(site)
            if span is None:
                return None
            if span.rows != sum(sizes[span.first : span.last + 1]):
                return _where(self._read(span.groups, ["site", "a", "b", "count"]), "site", site)
            if span.first == span.last:
                return self._counts(span)
            if span not in self._kept:
                self._kept[span] = self._counts(span)
            before = sum(sizes[span.first : site])
            return self._kept[span][before : before + sizes[site]]

    def _counts(self, span: Span) -> np.ndarray:
        with self._open() as file:
            found = np.asarray(file.read_row_groups(list(span.groups), columns=["count"], use_threads=False)["count"].to_numpy())
        if len(found) != span.rows:
            raise ValueError(f"row groups {span.groups} hold {len(found)} rows instead of {span.rows}")
        return found

    @property
    def num_rows(self) -> int:
        """Rows, as the footer says."""
        with self._reading():
            return int(self._footer.num_rows)

    @cached_property
    def _kept(self) -> dict[Span, np.ndarray]:
        """Counts of spans of several sites, which are small: they are asked for one site after the other."""
        return {}

    @cached_property
    def _places(self) -> dict[str, Mapping[int, Span]]:
        """Of each statistic that was asked for, ``_spans``."""
        return {}

    def _spans(self, value: str, sizes: Sequence[int]) -> Mapping[int, Span]:
        """Where each site of a statistic lies; nothing where a row group holds another one too, or a site that has cells is not found in order."""
        found: list[Span] = []
        for i, (held, sites) in enumerate(zip(self._extents("statistic"), self._extents("site"), strict=True)):
            if held is None or sites is None or not held[0] <= value <= held[1]:
                continue
            first, last, rows = *sites, self._footer.row_group(i).num_rows
            more = bool(found) and first == last == found[-1].first == found[-1].last and found[-1].groups.stop == i
            if held[0] != held[1] or (not more and first <= (found[-1].last if found else -1)):
                return {}
            if more:
                before = found.pop()
                found.append(Span(first, last, range(before.groups.start, i + 1), before.rows + rows))
            else:
                found.append(Span(first, last, range(i, i + 1), rows))
        places = {site: span for span in found for site in range(span.first, min(span.last + 1, len(sizes)))}
        return places if all(site in places for site, n in enumerate(sizes) if n) else {}

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        return pq.read_metadata(self.path)

    def _extents(self, column: str) -> list[tuple[Any, Any] | None]:
        at, out = self._footer.schema.names.index(column), []
        for i in range(self._footer.num_row_groups):
            group = self._footer.row_group(i)
            known = group.column(at).statistics
            if group.num_rows and (known is None or not known.has_min_max):
                raise ValueError(f"row group {i} does not say which {column} it holds")
            extent = (known.min, known.max) if group.num_rows else None
            if extent is not None and isinstance(extent[0], str) and not self._texts.issuperset(extent):
                raise ValueError(f"row group {i} holds {column} {extent}, which is none")
            out.append(extent)
        return out

    def _open(self, texts: Sequence[str] = ()) -> pq.ParquetFile:
        """The file; columns ``texts`` as dictionaries."""
        beside = not isinstance(self.path, Path)  # ranges that lie together are asked for together
        return pq.ParquetFile(
            self.path, metadata=self._footer, read_dictionary=list(texts), page_checksum_verification=True, pre_buffer=beside
        )

    def _spelled(self, table: pa.Table, known: Mapping[str, str | int]) -> pa.Table:
        """The table in the schema; a text that is ``known``, or null, in every row is not looked up row by row: that would take most of the time."""
        for i, field in enumerate(self.schema):
            nothing = table[field.name].null_count == len(table)
            if pa.types.is_string(field.type) and (nothing or field.name in known):
                value = pa.scalar(None if nothing else known[field.name], field.type)
                table = table.set_column(i, field, pa.repeat(value, len(table)))
        return table.cast(self.schema)

    def _read(self, groups: Sequence[int], names: Sequence[str] = ()) -> pa.Table:
        """Texts as dictionaries: what is not asked for is never spelled out. Columns ``names``, default all."""
        names = list(names or self.schema.names)
        with self._open([f.name for f in self.schema if pa.types.is_string(f.type)]) as file:
            return file.read_row_groups(list(groups), columns=names, use_threads=len(groups) > 1).select(names)


def whole(rows: pa.Table | LongTable | PartCounts | CoreCounts) -> pa.Table:
    """All rows, of a table in memory or on disk, or of a part's counts."""
    return rows if isinstance(rows, pa.Table) else rows.table()


def where(rows: pa.Table | LongTable | PartCounts | CoreCounts, column: str, value: str | int, total: int | None = None) -> pa.Table:
    """The rows with ``value`` in ``column``, of a table in memory or on disk, or of a part's counts; ``total`` is what to check those on disk by."""
    return _where(rows, column, value) if isinstance(rows, pa.Table) else rows.where(column, value, total)


def _where(table: pa.Table, column: str, value: str | int) -> pa.Table:
    values, sought = table[column], value
    if pa.types.is_dictionary(values.type):
        if not values.null_count and all(len(x.dictionary) == 1 and x.dictionary[0].as_py() == value for x in values.chunks):
            return table
        values = values.unify_dictionaries()
        sought = values.chunk(0).dictionary.index(value).as_py() if values.num_chunks else -1
        values = pa.chunked_array([x.indices for x in values.chunks], values.type.index_type)
    if pa.types.is_integer(values.type):
        found = np.flatnonzero(values.to_numpy() == sought)
        if len(found) and found[-1] - found[0] == len(found) - 1:  # one stretch, as in every table sorted by the column
            return table.slice(found[0], len(found))
    return table.filter(pc.equal(table[column], value))


def write_long(tables: Iterable[pa.Table], schema: pa.Schema, path: Path, differences: Sequence[str] = ()) -> None:
    """Tables one below the other in a Parquet file, each in row groups of its own; zstd, page checksums.

    Numbers are BYTE_STREAM_SPLIT, most of whose bytes are 0: a fifth less than in a dictionary or as differences, in less time. Columns
    ``differences`` are DELTA_BINARY_PACKED without a codec all the same, a fifth larger, but read in half the time. Columns
    that cannot hold a null say so, which saves a fifth of writing them; those that ``where`` asks for say what each row group holds.
    """
    stored = pa.schema([f.with_nullable(f.name in ("label", "a", "b")) for f in schema])
    numbers = [f.name for f in schema if pa.types.is_integer(f.type)]
    encodings = dict.fromkeys(numbers, "BYTE_STREAM_SPLIT") | dict.fromkeys(differences, "DELTA_BINARY_PACKED")
    codecs = {n: "none" if n in differences else "zstd" for n in schema.names}
    with pq.ParquetWriter(path, stored, compression=codecs, compression_level={n: 1 for n in codecs if codecs[n] == "zstd"},
                          write_page_checksum=True, write_batch_size=GROUP_ROWS, use_dictionary=[n for n in schema.names if n not in numbers],
                          column_encoding=encodings,
                          write_statistics=[n for n in schema.names if n in ("statistic", "site", "token_id", "document")]) as writer:  # fmt: skip
        for table in tables:
            writer.write_table(table.select(schema.names).cast(stored), row_group_size=GROUP_ROWS)
