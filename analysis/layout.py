"""The Parquet layout of decisions and scores: row groups of one site each, scalar columns, exact float32 weights.

Ids are dictionary-coded uint8 or uint16, by the number of experts (as BYTE_STREAM_SPLIT they are written faster, but older readers do not
know integers of that kind, and DuckDB and Polars take twice as long); weights are BYTE_STREAM_SPLIT float32, which holds bfloat16 and
float16 values exactly at their own cost; pages carry checksums. Rounded weights are float32 too, so that every reader has the values,
but dictionary-coded: an index of at most 8 bits each, as long as a site's weights span no more than 16 octaves. Ids of balanced experts
have no codec, which would make them 1 to 2 % smaller for a quarter of the time of writing them; exact floats have the codec at level -1,
which makes them 0.5 to 6 % larger for 7 to 20 % less. Columns that cannot hold a null say so, which saves a fifth of writing them. A run
that keeps no weights has no columns for them, and its ids by falling weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .memory import kept_routing
from .trace import NO_EXPERT, LayerInfo, Part, SiteRouting, SiteScores, id_dtype

GROUP_ROWS = 16_384  # a document of 1,000 tokens costs a quarter of what it does in groups of 65,536, for 1 % more bytes
PART_TOKENS = 65_536  # of a part, unless they make more decisions than
PART_DECISIONS = 2**24  # so that the memory a part takes is the same for every model
_DISTINCT = ("name", "digest")  # of each document: a dictionary of them would be the column over again, a tenth larger, and slower to read
_SAMPLE = 1_024  # rows of a site that tell whether its ids are worth a codec
_KEYS = tuple(pa.field(n, t, nullable=False) for n, t in (("row", pa.int64()), ("site", pa.uint16()), ("document", pa.int32())))


def part_tokens(layers: Sequence[LayerInfo]) -> int:
    """Tokens after which a part ends where nothing else is asked for: whole row groups, fewer for a deep model, one at least."""
    groups = PART_DECISIONS // (sum(x.top_k for x in layers) * GROUP_ROWS)
    return min(max(groups, 1) * GROUP_ROWS, PART_TOKENS)


@dataclass(frozen=True)
class Footer:
    """What a file says of itself, read and taken apart once: that of a deep model takes as long as a document."""

    metadata: pq.FileMetaData

    @classmethod
    def of(cls, path: Path | Any) -> Footer:
        return cls(pq.read_metadata(path))

    @cached_property
    def sites(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        """(number, rows) of each site's row groups: those whose least value of column 1, ``site``, is its number."""
        found: dict[int, list[tuple[int, int]]] = {}
        for i in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(i)
            known = group.column(1).statistics
            if known is not None:  # none in a group of no rows
                found.setdefault(known.min, []).append((i, group.num_rows))
        return found


def _parquet(path: Path | Any, footer: Footer) -> pq.ParquetFile:
    """A file to read from, at a path or opened by pyarrow below an address, where ranges that lie together are asked for together."""
    return pq.ParquetFile(path, metadata=footer.metadata, page_checksum_verification=True, pre_buffer=not isinstance(path, Path))


def write_table(table: pa.Table, path: Path) -> None:
    """A table as one Parquet file, zstd, with page checksums; what texts a row group holds is not said, as nobody asks and it takes long."""
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    numbers = [f.name for f in table.schema if pa.types.is_integer(f.type)]
    pq.write_table(table, path, compression="zstd", compression_level=1, write_page_checksum=True, write_batch_size=GROUP_ROWS,
                   use_dictionary=[n for n in table.schema.names if n not in (*floats, *numbers, *_DISTINCT)], write_statistics=numbers,
                   column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT") | dict.fromkeys(numbers, "DELTA_BINARY_PACKED"))  # fmt: skip


def write_routing(part: Part, layers: Sequence[LayerInfo], path: Path) -> None:
    """Decisions of a part: row, site, document, e*, w* (unless it keeps none) and, for models with native capacity, c*."""
    width = max(x.top_k for x in layers)
    ids = pa.uint8() if max(x.n_classes for x in layers) <= 256 else pa.uint16()
    kinds = [("e", ids), ("w", pa.float32())][: 1 if part.weights == "none" else 2]
    if dropping := any(x.native_capacity is not None for x in layers):
        kinds.append(("c", ids))
    columns = [(f"{kind}{i}", type_) for kind, type_ in kinds for i in range(width)]
    full = len({x.top_k for x in layers}) == 1  # then no weight is null, nor an id of a model that drops none
    whole = full and not dropping and not any(_missing(r.experts) for r in part.routing)
    fields = [pa.field(n, t, nullable=not (full if n[0] == "w" else whole)) for n, t in columns]
    schema = pa.schema([*_KEYS, *fields])
    keys = _keys(part, layers)
    split = [n for n, _ in columns if n[0] == "w" and part.weights == "exact"]

    def tables() -> Iterator[pa.Table]:
        for i, layer in enumerate(layers):
            routing = kept_routing(part, i)
            arrays: dict[str, Any] = {"e": routing.experts, "w": routing.weights, "c": routing.chosen}
            values = [c for kind, type_ in kinds for c in _columns(arrays[kind], width, type_)]
            yield pa.table([*keys(layer), *values], schema=schema)

    bare = [n for n, _ in columns if n[0] != "w"] if _balanced(part, layers) else []
    _write_groups(tables(), schema, path, [n for n, _ in columns], split, bare)


def _group_rows(n: int) -> int:
    """Rows of the row groups of n rows, all alike: a part ends with a document, and up to an eighth of a group more is no group of its own."""
    groups = max(-(-8 * n // (9 * GROUP_ROWS)), 1)
    return max(-(-n // groups), 1)


def _missing(ids: np.ndarray) -> bool:
    """Whether some slot has no expert."""
    return bool(ids.size and ids.min() == NO_EXPERT)


def _balanced(part: Part, layers: Sequence[LayerInfo]) -> bool:
    """Whether a codec would find next to nothing in packed ids: by order, a sample of each site's is within 5 % of the bits they take."""
    bits = []
    for layer, routing in zip(layers, part.routing, strict=True):
        counts = np.bincount(routing.experts[:_SAMPLE].ravel() + 1, minlength=2)
        share = counts[counts > 0] / max(counts.sum(), 1)
        bits.append((-(share * np.log2(share)).sum(), (layer.n_classes - 1).bit_length()))
    found, taken = np.sum(bits, axis=0)
    return bool(found > 0.95 * taken)


def write_scores(part: Part, layers: Sequence[LayerInfo], path: Path) -> None:
    """Router scores of a part: row, site, entropy, margin, logsumexp and, where kept, p*."""
    names = ["entropy", "margin", "logsumexp"]
    width = max((s.probabilities.shape[1] for s in part.scores if s.probabilities is not None), default=0)
    columns = [*names, *(f"p{i}" for i in range(width))]
    full = all(s.probabilities is not None and s.probabilities.shape[1] == width for s in part.scores)
    schema = pa.schema([*_KEYS[:2], *(pa.field(n, pa.float32(), nullable=n not in names and not full) for n in columns)])
    keys = _keys(part, layers)

    def tables() -> Iterator[pa.Table]:
        for layer, s in zip(layers, part.scores, strict=True):
            given = np.zeros((len(s.entropy), 0), np.float32) if s.probabilities is None else s.probabilities
            values = [pa.array(getattr(s, n), pa.float32()) for n in names]
            yield pa.table([*keys(layer)[:2], *values, *_columns(given, width, pa.float32())], schema=schema)

    _write_groups(tables(), schema, path, columns, columns)


def room_for(layer: LayerInfo, n: int, dropping: bool, weighted: bool = True) -> SiteRouting:
    """Arrays for n tokens of a site, to be filled; ``chosen`` has its own where the model drops natively and files hold it; no weights unless ``weighted``."""
    experts = np.empty((n, layer.top_k), id_dtype(layer.n_classes))
    weights = np.empty(experts.shape, np.float32) if weighted else None
    return SiteRouting(experts, weights, np.empty_like(experts) if dropping else experts)


def read_routing(path: Path | Any, layers: Sequence[LayerInfo], start: int, stop: int, into: Sequence[SiteRouting],
                 footer: Footer | None = None) -> None:  # fmt: skip
    """Fill the arrays of ``into`` with rows start to stop (within the part) of sites ``layers``, from the row groups that hold them alone.

    ``chosen`` is left alone where it is ``experts``; ``footer`` is given where it was read before. To read all sites at once takes two
    thirds of the time of one after the other, for a document of a model with few experts per token.
    """
    footer = Footer.of(path) if footer is None else footer
    weighted, dropping = all(r.weights is not None for r in into), any(r.chosen is not r.experts for r in into)
    names = [f"{kind}{i}" for kind in "e" + "w" * weighted + "c" * dropping for i in range(max(x.top_k for x in layers))]
    table, starts = _read_rows(path, footer, [x.index for x in layers], names, start, stop)
    ids = np.result_type(*(r.experts for r in into))
    columns = {n: _filled(table[n], 0.0) if n[0] == "w" else _filled(table[n], NO_EXPERT, ids) for n in names}
    for first, r in zip(starts, into, strict=True):
        _interleave(columns, "e", first, r.experts)
        if r.weights is not None:
            _interleave(columns, "w", first, r.weights)
        if r.chosen is not r.experts:
            _interleave(columns, "c", first, r.chosen)


def read_experts(path: Path | Any, layer: LayerInfo, start: int, stop: int, into: np.ndarray, footer: Footer | None = None) -> None:
    """The experts of ``read_routing`` alone: a third of the bytes, and no weight is unpacked."""
    names = [f"e{i}" for i in range(layer.top_k)]
    table, (first,) = _read_rows(path, Footer.of(path) if footer is None else footer, [layer.index], names, start, stop)
    _interleave({n: _filled(table[n], NO_EXPERT, into.dtype) for n in names}, "e", first, into)


def _filled(column: pa.ChunkedArray, missing: float, type_: np.dtype | type = np.float32) -> np.ndarray:
    """The column, ``missing`` where it is null; nothing is copied where nothing is null and all is in one piece."""
    if column.null_count:
        column = pc.fill_null(column.cast(pa.from_numpy_dtype(type_)), missing)
    return np.asarray(column.to_numpy())


def _interleave(columns: Mapping[str, np.ndarray], kind: str, first: int, out: np.ndarray) -> None:
    """out [n, k]: rows ``first`` and after of the columns ``kind`` 0 to k - 1."""
    for i in range(out.shape[1]):
        out[:, i] = columns[f"{kind}{i}"][first : first + len(out)]


def read_scores(path: Path | Any, layer: LayerInfo, start: int, stop: int, footer: Footer | None = None) -> SiteScores:
    """Rows start to stop (within the part) of one site's scores; ``footer`` as in ``read_routing``."""
    footer = Footer.of(path) if footer is None else footer
    kept = "p0" in footer.metadata.schema.names
    names = ["entropy", "margin", "logsumexp", *(f"p{i}" for i in range(layer.n_classes if kept else 0))]
    table, (first,) = _read_rows(path, footer, [layer.index], names, start, stop)
    columns = [table[n].slice(first, stop - start).to_numpy() for n in names]
    return SiteScores(columns[0], columns[1], columns[2], np.stack(columns[3:], axis=1) if kept else None)


def read_tokens(path: Path | Any, stream: str, start: int, stop: int, columns: Sequence[str], alone: bool,
                footer: Footer | None = None) -> pa.Table:  # fmt: skip
    """Rows start to stop (within the part) of one stream, from the row groups that hold them; ``alone``: the part has no other stream."""
    footer = Footer.of(path) if footer is None else footer
    with _parquet(path, footer) as file:
        if alone:
            rows = np.arange(start, min(stop, file.metadata.num_rows))
        else:
            rows = np.flatnonzero(pc.equal(file.read(columns=["stack"])["stack"], stream).to_numpy())[start:stop]
        if len(rows) != stop - start:
            raise ValueError(f"{len(rows)} rows of stream {stream} instead of {stop - start}")
        ends = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))])
        first, last = np.searchsorted(ends, [rows[0], rows[-1]], "right") - 1 if len(rows) else (0, -1)
        table = file.read_row_groups(list(range(first, last + 1)), columns=list(columns)).select(columns)
    if not len(rows):
        return table
    rows = rows - ends[first]
    together = rows[-1] - rows[0] == len(rows) - 1  # then nothing is copied
    return table.slice(rows[0], len(rows)) if together else table.take(pa.array(rows))


def _read_rows(
    path: Path | Any, footer: Footer, sites: Sequence[int], names: Sequence[str], start: int, stop: int
) -> tuple[pa.Table, list[int]]:
    """(the row groups that hold rows start to stop of the sites, where row ``start`` of each site is in them); ValueError where one has fewer."""
    groups, starts, read = list[int](), list[int](), 0
    for site in sites:
        rows, skipped, mine = 0, 0, 0
        for i, n in footer.sites.get(site, ()):
            if rows + n <= start:
                skipped += n
            elif rows < stop and start < stop:
                groups.append(i)
                mine += n
            rows += n
        if rows < stop:
            raise ValueError(f"{rows} rows of site {site} instead of {stop} or more")
        starts.append(read + start - skipped)
        read += mine
    with _parquet(path, footer) as file:
        table = file.read_row_groups(groups, columns=list(names), use_threads=len(groups) > 1)  # of one, they cost more than they save
    if len(table) != read:
        raise ValueError(f"{len(table)} rows instead of {read}")
    return table, starts


def _keys(part: Part, layers: Sequence[LayerInfo]) -> Callable[[LayerInfo], list[pa.Array]]:
    """What gives the columns row, site and document of a site; rows and documents are those of its stream."""
    shared = {}
    for stream in {x.stream for x in layers}:
        tokens, first = part.stream_tokens(stream), part.first_rows[stream]
        shared[stream] = pa.array(np.arange(first, first + len(tokens), dtype=np.int64)), tokens["document"].combine_chunks()

    def keys(layer: LayerInfo) -> list[pa.Array]:
        rows, documents = shared[layer.stream]
        return [rows, pa.array(np.full(len(rows), layer.index, np.uint16)), documents]

    return keys


def _columns(array: np.ndarray, width: int, type_: pa.DataType) -> list[pa.Array]:
    """The columns of [n, k] as Arrow, and null ones up to ``width``; null where, for ids, there is no expert."""
    values = np.empty(array.shape[::-1], type_.to_pandas_dtype())
    for start in range(0, len(array), GROUP_ROWS):  # what the processor's cache holds
        values[:, start : start + GROUP_ROWS] = array[start : start + GROUP_ROWS].T
    some = pa.types.is_integer(type_) and _missing(array)
    missing = np.ascontiguousarray(array.T == NO_EXPERT) if some else [None] * len(values)
    found = [pa.array(v, type_, mask=m) for v, m in zip(values, missing, strict=True)]
    return found + [pa.nulls(len(array), type_)] * (width - len(found))


def _write_groups(tables: Iterator[pa.Table], schema: pa.Schema, path: Path, values: Sequence[str], split: Sequence[str],
                  bare: Sequence[str] = ()) -> None:  # fmt: skip
    """Tables as row groups, columns ``split`` as BYTE_STREAM_SPLIT, ``bare`` without a codec; the keys alone say what they hold, as nobody
    looks for a weight and a footer is read whole. Of keys that repeat, the codec finds the repetitions sooner than a dictionary does."""
    keys = [n for n in schema.names if n not in values]
    encodings = dict.fromkeys(split, "BYTE_STREAM_SPLIT") | dict.fromkeys(keys, "PLAIN") | {"row": "DELTA_BINARY_PACKED"}
    codecs = {n: "none" if n in bare or n == "row" else "zstd" for n in schema.names}
    levels = {n: -1 if n in split else 1 for n, codec in codecs.items() if codec == "zstd"}
    with pq.ParquetWriter(path, schema, compression=codecs, compression_level=levels, write_page_checksum=True, column_encoding=encodings,
                          use_dictionary=[n for n in schema.names if n not in encodings], write_statistics=keys,
                          write_batch_size=2 * GROUP_ROWS) as writer:  # fmt: skip
        for table in tables:
            writer.write_table(table, row_group_size=_group_rows(len(table)))
