"""The only writer of files for people: tables of a run as CSV, Parquet or JSON.

Parquet and JSON are lossless and carry the run, its n and the definitions. In JSON, bytes are base64, NaN is null and
infinities are the strings "inf" and "-inf". CSV holds visible text: text is JSON-escaped and quoted, numbers are bare,
and a cell that a spreadsheet would run as a formula starts with an apostrophe (``csv_text`` and ``csv_original`` are
inverse); missing values and NaN are empty, ``token_bytes`` is left out. Comment lines would break CSV readers, so what
the other formats carry along comes from ``describe`` (``python -m analysis export RUN --table T --describe``).
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from .files import write_atomically
from .metrics import METRICS, balance_table, load_table
from .stability import document_balance, label_balance, maxvio_table, position_balance
from .trace import NO_EXPERT, SCHEMA_VERSION, LayerInfo, Trace

FORMATS = ("csv", "parquet", "json")
BATCH = 65_536
MOST_ROWS = 2_000_000  # of a file made in memory: decisions of 8 experts are then 430 MB as CSV, 1.3 GB as JSON
_FORMULA = frozenset("=+-@|%'")


class ExportError(ValueError):
    """A table, format or setting that does not exist, or a table this run cannot give."""


@dataclass(frozen=True)
class ExportTable:
    """A table people can take away: its name, what a row is, a reader that yields it in pieces, and what its columns mean.

    ``settings`` are what the reader takes by name, with what it uses where nothing is said: the same as on the page.
    """

    name: str
    definition: str
    read: Callable[..., Iterator[pa.Table]]
    columns: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _decisions(trace: Trace) -> Iterator[pa.Table]:
    """One row per token and site, site by site, in pieces of at most BATCH tokens; at least one piece, maybe empty."""
    width = max(x.top_k for x in trace.layers)
    native = any(x.native_capacity is not None for x in trace.layers)
    for layer in trace.layers:
        n = trace.n_tokens(layer.stream)
        for start in range(0, max(1, n), BATCH):
            stop = min(start + BATCH, n)
            rows = trace.stream_tokens(layer.stream, start, stop)
            routing, scores = trace.routing(layer.index, start, stop), trace.scores(layer.index, start, stop)
            columns: dict[str, Any] = {n: _plain(rows[n]) for n in rows.column_names}
            columns["site"] = pa.array([layer.index] * len(rows), pa.int16())
            columns["layer"] = pa.array([layer.layer] * len(rows), pa.int32())
            for i in range(width):
                columns[f"expert_{i}"] = _slot(routing.experts, i, pa.int32())
                if routing.weights is not None:
                    columns[f"weight_{i}"] = _slot(routing.weights, i, pa.float32())
                if native:
                    columns[f"chosen_{i}"] = _slot(routing.chosen, i, pa.int32())
            for name in ("entropy", "margin", "logsumexp"):
                columns[name] = pa.array(getattr(scores, name), pa.float32(), from_pandas=True)
            yield pa.table(columns)


def _slot(values: np.ndarray, i: int, type_: pa.DataType) -> pa.Array:
    """Slot i of ids or weights [n, k]; null where the site has fewer slots or, for ids, where there is no expert."""
    if i >= values.shape[1]:
        return pa.nulls(len(values), type_)
    column = np.ascontiguousarray(values[:, i])
    return pa.array(column, type_) if type_ == pa.float32() else pa.array(column.astype("int32"), mask=column == NO_EXPERT)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _tokens(trace: Trace) -> Iterator[pa.Table]:
    for stream in dict.fromkeys(x.stream for x in trace.layers):
        for start in range(0, max(1, trace.n_tokens(stream)), BATCH):
            rows = trace.stream_tokens(stream, start, min(start + BATCH, trace.n_tokens(stream)))
            yield pa.table({n: _plain(rows[n]) for n in rows.column_names})


def _per_layer(trace: Trace, tables: Iterable[tuple[LayerInfo, pa.Table]]) -> Iterator[pa.Table]:
    for layer, table in tables:
        place = {"site": pa.array([layer.index] * len(table), pa.int16()), "layer": pa.array([layer.layer] * len(table), pa.int32()),
                 "stack": pa.array([layer.stack] * len(table), pa.string())}  # fmt: skip
        yield pa.table({**place, **{n: table[n] for n in table.column_names if n != "site"}})


def _batches(trace: Trace, batch_tokens: int, order: str) -> Iterator[pa.Table]:
    rows = maxvio_table(trace, batch_tokens, 0 if order == "mixed" else None)
    return _per_layer(trace, ((x, rows.slice(i, 1)) for i, x in enumerate(trace.layers)))


def _capacity(trace: Trace, preset: str, policy: str, scope: str, size: int | None, order: str) -> Iterator[pa.Table]:
    from .capacity import MissingScores, site_curves  # numba is slow to import, and no other table needs it
    from .slots import CapacityError

    try:
        for _, table in site_curves(trace, policy=policy, scope=scope, size=size, mixed=0 if order == "mixed" else None, preset=preset):
            yield table
    except MissingScores as error:
        raise ExportError(f"{error}: give another policy, such as position") from error
    except CapacityError as error:
        raise ExportError(str(error)) from error


def _metric(name: str) -> str:
    m = METRICS[name]
    return f"{m.definition} [{m.unit}]; by chance: {m.chance} ({m.source})"


_PLACE = {
    "site": "place of the routed layer in the run, from 0",
    "layer": "number of the block in its stack",
    "stack": "encoder or decoder",
}
_PIECE = {**_PLACE, "n": "tokens of the piece that passed the layer", "dead": "experts with no assignment in the piece",
          **{m: _metric(m) for m in ("max_over_mean", "cv", "normalised_entropy", "gini", "effective_experts", "cold", "chance_max_over_mean", "chance_cv")}}  # fmt: skip
_TOKEN = {"stack": _PLACE["stack"], "document": "number of the document in the run, from 0", "position": "place in the document; 0 is its first recorded token",
          "token_id": "the tokenizer's id", "token": "its text; bytes that are not UTF-8 on their own as \\xNN", "token_bytes": "its bytes, exactly; missing where the tokenizer cannot say",
          "label": "the document's label", "loss": "nats of predicting the next token; missing where there is none", "phase": "prefill (text given) or decode (text generated)",
          "predicted": "id of the largest logit: the next token as the model would have it"}  # fmt: skip
_LOAD = {**_PLACE, "expert": "its number in the layer; unrelated between layers", "assignments": "tokens sent to the expert, as executed", "share": "of the layer's assignments; uniform routing gives every class the same",
         "relative": "assignments over the mean of the layer's experts; 1 is even", "gate_mass": "sum of the gate weights of its assignments", "first_choices": "tokens for which it has the largest gate weight",
         "n": "tokens that passed the layer", "special": "true for a class without weights (skip, zero-compute)"}  # fmt: skip
_DECISION = {**_TOKEN, **_PLACE, "expert_i": "an expert that executed the token (slot order is not rank); missing: none", "weight_i": "its gate weight; gate_weights says whether exact or rounded",
             "chosen_i": "what the router chose, before any native drop", "entropy": "of the token's router probabilities, nats", "margin": "score of the last chosen less that of the best not chosen",
             "logsumexp": "of the router's logits"}  # fmt: skip
_DOCUMENT = {"document": _TOKEN["document"], "stack": _PLACE["stack"], "name": "as given at capture", "label": "as given at capture", "first_row": "of the document in the table of tokens, within its stack",
             "n_tokens": "recorded tokens", "digest": "SHA-256 of its token ids as little-endian int32"}  # fmt: skip
_BATCH = {**_PLACE, "n": "tokens that passed the layer", "batches": "of whole documents, each closed once it holds batch_tokens; a rest that falls short goes to the last", "batch_n": "tokens of a batch, mean", "run": "MaxVio over the whole run: (largest load - mean) / mean",
          "chance_run": "upper bound of run expected under uniform routing", "batch": "MaxVio per batch, mean over batches", "least": "of any batch", "p95": "95th percentile over batches", "most": "of any batch", "spread": "sample standard deviation (n - 1) of MaxVio over batches", "chance_spread": "the same if batches were drawn at random from the run: an upper bound",
          "chance_batch": "upper bound of batch expected under uniform routing"}  # fmt: skip
_CURVE = {**_PLACE, "factor": "capacity factor", "tokens": "that passed the layer", "assignments": "chosen by the router", "dropped": "assignments above the expert capacity", "kept": "assignments executed",
          "fully_dropped": "tokens that lose all experts", "partly_dropped": "tokens that lose some, not all", "top1_dropped": "tokens that lose the expert of largest gate weight", "partly_dropped_share": "partly_dropped / tokens", "top1_dropped_share": "top1_dropped / tokens", "slots": "computed, over experts and batches", "idle": "slots without a token", "gate_mass": "sum of gate weights", "gate_mass_lost": "of dropped assignments",
          "chance_dropped": "expected under uniform routing in the same batches", "dropped_share": "dropped / assignments", "fully_dropped_share": "fully_dropped / tokens",
          "gate_mass_lost_share": "gate_mass_lost / gate_mass", "slot_use": "kept / slots", "chance_dropped_share": "chance_dropped / assignments"}  # fmt: skip
_SETTINGS = MappingProxyType({"preset": "megatron", "policy": None, "scope": "documents", "size": None, "order": "mixed"})

TABLES: Mapping[str, ExportTable] = MappingProxyType(
    {
        t.name: t
        for t in (
            ExportTable("load", "one row per layer and expert: assignments, share of the layer's, relative to an even share of the experts (special: a class without weights)",
                        lambda trace: iter([load_table(trace)]), _LOAD),
            ExportTable("balance", "one row per layer: every balance metric", lambda trace: iter([balance_table(trace)]), {**_PLACE, "n": _LOAD["n"], **{m: _metric(m) for m in METRICS}}),
            ExportTable("decisions", "one row per token and layer: experts and gate weights as executed (slot order is not rank), and router scores",
                        _decisions, _DECISION),
            ExportTable("tokens", "one row per token", _tokens, _TOKEN),
            ExportTable("documents", "one row per document and token stream", lambda trace: iter([trace.documents]), _DOCUMENT),
            ExportTable("labels", "one row per layer and label: balance", lambda trace: _per_layer(trace, ((x, label_balance(trace, x.index)) for x in trace.layers)),
                        {**_PIECE, "label": "of the documents", "documents": "that carry the label; missing where the run has counts alone"}),
            ExportTable("positions", "one row per layer and stretch of positions: balance", lambda trace: _per_layer(trace, ((x, position_balance(trace, x.index)) for x in trace.layers)),
                        {**_PIECE, "first": "position of the stretch, from 0", "last": "position of the stretch", "documents": "that reach the stretch; missing where the run has counts alone"}),
            ExportTable("document-balance", "one row per layer and document, the most uneven for its length first: balance",
                        lambda trace: _per_layer(trace, ((x, document_balance(trace, x.index)) for x in trace.layers)),
                        {**_PIECE, "document": _TOKEN["document"], "name": "of the document", "label": "of the document; missing for none", "excess": "max_over_mean / chance_max_over_mean; above 1 is more than chance"}),
            ExportTable("batches", "one row per layer: MaxVio over the run and per batch, with chance", _batches, _BATCH, {"batch_tokens": 1_024, "order": "mixed"}),
            ExportTable("capacity", "one row per layer and capacity factor: what overflows and what idles", _capacity, _CURVE, _SETTINGS),
        )
    }
)  # fmt: skip


def describe(trace: Trace, table: str, settings: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What a reader of an export must know: the run, its model, n, what a row is and depends on, and what the columns mean."""
    one = TABLES[table]
    absent = {"weight_i"} if trace.weights_kept == "none" else set()
    about = _about(trace) | {
        "table": table,
        "row": one.definition,
        "definitions": {n: d for n, d in one.columns.items() if n not in absent},
    }
    return about | ({"settings": settled} if (settled := _settled(table, settings)) else {})


def _settled(table: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a table as its reader takes it: what was not chosen is as on the page. Raises ExportError."""
    known = TABLES[table].settings
    if unknown := settings.keys() - known.keys():
        takes = f": it takes {', '.join(known)}" if known else ""
        raise ExportError(f"the table {table} takes no {', '.join(sorted(unknown))}{takes}")
    settled = {**known, **settings}
    if table == "capacity":
        from .slots import PRESETS

        if settled["preset"] not in PRESETS:
            raise ExportError(f"no preset {settled['preset']!r}: choose one of {', '.join(PRESETS)}")
        settled["policy"] = settled["policy"] or PRESETS[settled["preset"]].policy
        settled["size"] = settled["size"] or {"documents": 16, "tokens": 4_096}.get(settled["scope"])
    return settled


def describe_computed(trace: Trace | None, what: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same for what a page computed: the run, its model and n where it is of a run, what is shown and what it depends on."""
    return ({} if trace is None else _about(trace)) | {"row": what, "settings": dict(settings)}


def _definitions(names: Sequence[str]) -> dict[str, str]:
    """Of a page's columns: those of the table of TABLES that has them all, else of the metrics among them."""
    same = next((t.columns for t in TABLES.values() if t.columns.keys() >= set(names)), {})
    return {n: same[n] if same else _metric(n) for n in names if same or n in METRICS}


def _about(trace: Trace) -> dict[str, Any]:
    from . import __version__

    return {
        "run": trace.name,
        "recorded": trace.options.get("created"),
        "model": trace.model.name,
        "model_digest": trace.model.digest,
        "tokens": {s: trace.n_tokens(s) for s in dict.fromkeys(x.stream for x in trace.layers)},
        "gate_weights": trace.weights_note or "exact, as executed",
        "schema_version": SCHEMA_VERSION,
        "routerscope": __version__,
    }


def export_table(trace: Trace, table: str, format: str, target: Path | BinaryIO, settings: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Write a table to a path (atomically) or an open binary file; returns the rows written. ``settings``: of TABLES. Raises ExportError."""
    if table not in TABLES or format not in FORMATS:
        raise ExportError(f"no table {table!r} as {format!r}: tables are {', '.join(TABLES)}; formats {', '.join(FORMATS)}")
    without = trace.load_tokens is None or (table in ("decisions", "capacity") and trace.source is None)
    if table in ("decisions", "tokens", "capacity") and without:
        raise ExportError(f"run {trace.name!r} holds statistics only, no {table}: capture it again with tokens")
    settled = _settled(table, settings)
    writer = {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}[format]

    def written(file: BinaryIO) -> int:
        return writer(TABLES[table].read(trace, **settled), describe(trace, table, settings), file)

    if not isinstance(target, Path):
        return written(target)
    rows = 0

    def write(path: Path) -> None:
        nonlocal rows
        with path.open("wb") as file:
            rows = written(file)

    write_atomically(target, write)
    return rows


def growing_rows(trace: Trace, table: str) -> int:
    """Rows of a table that grows with the text; 0 for any other."""
    streams, documents = {x.stream for x in trace.layers}, trace.documents
    rows = {
        "decisions": lambda: sum(trace.n_tokens(x.stream) for x in trace.layers),
        "tokens": lambda: sum(trace.n_tokens(s) for s in streams),
        "documents": lambda: len(documents),
        "document-balance": lambda: sum(len(trace.documents_in(x.stream)) for x in trace.layers),
    }
    return rows[table]() if table in rows else 0


def export_bytes(trace: Trace, table: str, format: str) -> bytes:
    """A table as the bytes of a file, for a download. Raises ExportError for one of more than MOST_ROWS, which ``export_table`` can write."""
    if (rows := growing_rows(trace, table)) > MOST_ROWS:
        raise ExportError(f"{table} of {rows:,} rows would be made in memory: write them to a file, python -m analysis export")
    buffer = io.BytesIO()
    export_table(trace, table, format, buffer)
    return buffer.getvalue()


def computed_bytes(trace: Trace | None, rows: pa.Table, what: str, settings: Mapping[str, Any], format: str) -> bytes:
    """A table computed for a page, as the bytes of a file; ``what`` says what a row is, ``settings`` what it depends on; no run, no ``trace``."""
    if format not in FORMATS:
        raise ExportError(f"no format {format!r}: formats are {', '.join(FORMATS)}")
    named = list(METRICS) if "metric" in rows.column_names else rows.column_names
    about = describe_computed(trace, what, settings) | {"definitions": _definitions(named)}
    buffer = io.BytesIO()
    {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}[format](iter([rows]), about, buffer)
    return buffer.getvalue()


def csv_text(text: str) -> str:
    """Text as it stands in a CSV cell: JSON-escaped without quotes, guarded with an apostrophe against formulas."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    escaped = "".join(c if c.isprintable() else _escape(c) for c in escaped)
    # Spreadsheets in East Asian settings take full-width signs for the plain ones, so those are guarded as well.
    return f"'{escaped}" if unicodedata.normalize("NFKC", escaped[:1])[:1] in _FORMULA else escaped


def csv_original(cell: str) -> str:
    """The text behind a CSV cell; inverse of ``csv_text``."""
    return str(json.loads(f'"{cell.removeprefix(chr(39))}"'))


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _write_csv(tables: Iterator[pa.Table], about: Mapping[str, Any], file: BinaryIO) -> int:
    first = _visible(next(tables))
    rows = 0
    options = pa_csv.WriteOptions(quoting_style="needed")
    with pa_csv.CSVWriter(file, first.schema, write_options=options) as writer:
        for table in itertools.chain([first], map(_visible, tables)):
            writer.write_table(table)
            rows += len(table)
    return rows


def _visible(table: pa.Table) -> pa.Table:
    """A table as it goes into a CSV: text made visible and guarded, NaN missing, no raw bytes."""
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type):
            coded = column.dictionary_encode()
            column = pa.array([csv_text(x) for x in coded.dictionary.to_pylist()], pa.string()).take(coded.indices)
        elif pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        if not pa.types.is_binary(column.type):
            columns[name] = column
    return pa.table(columns)


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
    for batch in itertools.chain.from_iterable(t.to_batches(max_chunksize=4096) for t in tables):
        for row in batch.to_pylist():
            file.write((b",\n" if rows else b"\n") + json.dumps({k: _json(v) for k, v in row.items()}, allow_nan=False).encode())
            rows += 1
    file.write(b"\n]}\n")
    return rows


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
