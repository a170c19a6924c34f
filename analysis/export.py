"""The only writer of files for people: tables of a run as CSV, Parquet or JSON.

Parquet and JSON are lossless and carry the run, its n and the definitions. CSV holds visible text: token text is
JSON-escaped, every field is quoted, and a cell that a spreadsheet would run as a formula starts with an apostrophe
(``csv_text`` and ``csv_original`` are inverse). CSV has no place for metadata; ``describe`` gives it.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from .metrics import METRICS, balance_table, load_table
from .store import write_atomically
from .trace import SCHEMA_VERSION, Trace

FORMATS = ("csv", "parquet", "json")
BATCH = 65_536
_FORMULA = ("=", "+", "-", "@", "'", "\t", "\r", "\n", "|", "%")


class ExportError(ValueError):
    """A table or format that does not exist, or a table this run cannot give."""


@dataclass(frozen=True)
class ExportTable:
    """A table people can take away: its name, what a row is, and a reader that yields it in pieces."""

    name: str
    definition: str
    read: Callable[[Trace], Iterator[pa.Table]]


def _decisions(trace: Trace) -> Iterator[pa.Table]:
    """One row per token and site, site by site, in pieces of at most BATCH tokens."""
    width = max(x.top_k for x in trace.layers)
    for layer in trace.layers:
        tokens = trace.stream_tokens(layer.stream)
        for start in range(0, len(tokens), BATCH):
            rows = tokens.slice(start, BATCH)
            stop = start + len(rows)
            routing, scores = trace.routing(layer.index, start, stop), trace.scores(layer.index, start, stop)
            columns: dict[str, Any] = {n: _plain(rows[n]) for n in rows.column_names}
            columns["site"] = pa.array([layer.index] * len(rows), pa.int16())
            columns["layer"] = pa.array([layer.layer] * len(rows), pa.int32())
            for i in range(width):
                there = i < layer.top_k
                experts = routing.experts[:, i] if there else None
                columns[f"expert_{i}"] = pa.nulls(len(rows), pa.int32()) if experts is None else pa.array(
                    experts.astype("int32"), mask=experts < 0)  # fmt: skip
                columns[f"weight_{i}"] = pa.array(routing.weights[:, i]) if there else pa.nulls(len(rows), pa.float32())
            for name in ("entropy", "margin", "logsumexp"):
                columns[name] = pa.array(getattr(scores, name), from_pandas=True)
            yield pa.table(columns)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _tokens(trace: Trace) -> Iterator[pa.Table]:
    for stream in dict.fromkeys(x.stream for x in trace.layers):
        rows = trace.stream_tokens(stream)
        yield pa.table({n: _plain(rows[n]) for n in rows.column_names})


TABLES: Mapping[str, ExportTable] = MappingProxyType(
    {
        t.name: t
        for t in (
            ExportTable("load", "one row per layer and expert: assignments, share of the layer's, relative to an even share",
                        lambda trace: iter([load_table(trace)])),
            ExportTable("balance", "one row per layer: every balance metric", lambda trace: iter([balance_table(trace)])),
            ExportTable("decisions", "one row per token and layer: experts and gate weights as executed, and router scores",
                        _decisions),
            ExportTable("tokens", "one row per token", _tokens),
            ExportTable("documents", "one row per document and token stream", lambda trace: iter([trace.documents])),
        )
    }
)  # fmt: skip


def describe(trace: Trace, table: str) -> dict[str, Any]:
    """What a reader of an export must know: the run, its model, n, what a row is, and the metrics' definitions."""
    from . import __version__

    return {
        "run": trace.name,
        "model": trace.model.name,
        "model_digest": trace.model.digest,
        "tokens": {s: trace.n_tokens(s) for s in dict.fromkeys(x.stream for x in trace.layers)},
        "table": table,
        "row": TABLES[table].definition,
        "definitions": {m.name: f"{m.definition}; by chance: {m.chance} ({m.source})" for m in METRICS.values()},
        "schema_version": SCHEMA_VERSION,
        "routerscope": __version__,
    }


def export_table(trace: Trace, table: str, format: str, target: Path | BinaryIO) -> int:
    """Write a table to a path (atomically) or an open binary file; returns the rows written. Raises ExportError."""
    if table not in TABLES or format not in FORMATS:
        raise ExportError(f"no table {table!r} as {format!r}: tables are {', '.join(TABLES)}; formats {', '.join(FORMATS)}")
    if table in ("decisions", "tokens") and trace.load_tokens is None:
        raise ExportError(f"run {trace.name!r} holds statistics only: it has no {table}")
    writer = {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}[format]
    if not isinstance(target, Path):
        return writer(TABLES[table].read(trace), describe(trace, table), target)
    rows = 0

    def write(path: Path) -> None:
        nonlocal rows
        with path.open("wb") as file:
            rows = writer(TABLES[table].read(trace), describe(trace, table), file)

    write_atomically(target, write)
    return rows


def export_bytes(trace: Trace, table: str, format: str) -> bytes:
    """A table as the bytes of a file, for a download."""
    buffer = io.BytesIO()
    export_table(trace, table, format, buffer)
    return buffer.getvalue()


def csv_text(text: str) -> str:
    """Text as it stands in a CSV cell: JSON-escaped without quotes, guarded with an apostrophe against formulas."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    escaped = "".join(c if c.isprintable() else _escape(c) for c in escaped)
    return f"'{escaped}" if escaped.startswith(_FORMULA) else escaped


def csv_original(cell: str) -> str:
    """The text behind a CSV cell; inverse of ``csv_text``."""
    return str(json.loads(f'"{cell.removeprefix(chr(39))}"'))


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _write_csv(tables: Iterator[pa.Table], about: Mapping[str, Any], file: BinaryIO) -> int:
    rows = 0
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for table in tables:
        columns = [n for n in table.column_names if n != "token_bytes"]
        if rows == 0:
            writer.writerow(columns)
        for row in zip(*(table[n].to_pylist() for n in columns), strict=True):
            writer.writerow([csv_text(x) if isinstance(x, str) else "" if x is None else x for x in row])
        rows += len(table)
    text.detach()
    return rows


def _write_parquet(tables: Iterator[pa.Table], about: Mapping[str, Any], file: BinaryIO) -> int:
    first = next(tables)
    schema = first.schema.with_metadata({"routerscope": json.dumps(about)})
    rows = 0
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table.cast(first.schema).replace_schema_metadata(schema.metadata))
            rows += len(table)
    return rows


def _write_json(tables: Iterator[pa.Table], about: Mapping[str, Any], file: BinaryIO) -> int:
    """{"about": ..., "rows": [...]} written in pieces; bytes as base64, NaN as null."""
    rows = 0
    file.write(b'{"about": ' + json.dumps(about).encode() + b', "rows": [')
    for table in tables:
        for row in table.to_pylist():
            file.write((b",\n" if rows else b"\n") + json.dumps({k: _json(v) for k, v in row.items()}, allow_nan=False).encode())
            rows += 1
    file.write(b"\n]}\n")
    return rows


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and value != value else value
