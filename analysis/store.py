"""Runs on disk, read: listed, opened, verified, deleted. Parquet that any reader opens; ``writing`` writes them.

A run is a folder. ``run.json`` is written last, and its presence is the commit; it lists every file with its size and
sha256. While a capture is under way the folder has ``progress/`` instead, from which it is resumed.

    run.json  documents.parquet  stats.parquet  token_stats.parquet  document_stats.parquet
    tokens/part-00000.parquet    one row per token (schema trace.TOKENS)
    routing/part-00000.parquet   row, site, document, e0.. (ids, null = none), w0.. (gate weights), c0.. (chosen, only for
                                 models with a native capacity); a row group holds one site,
                                 the groups of a site are in the order of its rows
    scores/part-00000.parquet    row, site, entropy, margin, logsumexp, p0.. (only when asked for); row groups alike
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import stamp
from .layout import Footer, read_experts, read_routing, read_scores, read_tokens
from .longtables import LongTable, where, whole
from .rounding import WEIGHTS, rounded
from .stats import BY_DOCUMENT, BY_TOKEN, CORE, NAMES, Statistics, following_sites, merge_statistics, part_statistics
from .trace import (
    DOCUMENTS,
    SCHEMA_VERSION,
    TOKENS,
    LayerInfo,
    ModelCard,
    Part,
    SiteRouting,
    SiteScores,
    Trace,
    TraceError,
    check_part,
    join_routing,
    join_scores,
)  # fmt: skip

MANIFEST = "run.json"
READABLE = (1, SCHEMA_VERSION)
STATISTICS = (("stats.parquet", CORE), ("token_stats.parquet", BY_TOKEN), ("document_stats.parquet", BY_DOCUMENT))
_Piece = TypeVar("_Piece", SiteRouting, SiteScores, np.ndarray)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/")
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))})


class RunError(ValueError):
    """A run that cannot be used; the message says which file, what is wrong and what to do."""


def valid_run_name(name: str) -> str:
    """``name`` itself where it may name a run folder, else RunError."""
    if not _NAME.fullmatch(name) or name.split(".")[0] in _DEVICES or name.endswith("."):
        raise RunError("a run name has 1 to 64 characters of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit")
    return name


class StoredRouting:
    """RoutingSource over a run's parts; reads only the row groups a range needs."""

    def __init__(self, folder: Path, layers: Sequence[LayerInfo], manifest: Mapping[str, Any]) -> None:
        self._folder, self._layers, self._parts, self._version = folder, layers, manifest["parts"], manifest["schema_version"]
        self._footers: dict[str, Footer] = {}

    def routing(self, site: int, start: int, stop: int) -> SiteRouting:
        return join_routing(self._read(read_routing, "routing", site, start, stop))

    def experts(self, site: int, start: int, stop: int) -> np.ndarray:
        return np.concatenate(self._read(read_experts, "routing", site, start, stop))

    def scores(self, site: int, start: int, stop: int) -> SiteScores:
        return join_scores(self._read(read_scores, "scores", site, start, stop))

    def tokens(self, stream: str, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows start to stop of a stream, ``columns`` of schema TOKENS."""
        there = [c for c in columns if self._version > 1 or c != "predicted"]
        tables = []
        for part, a, b in self._pieces(stream, start, stop):
            name, alone = f"tokens/part-{part['index']:05d}.parquet", sum(map(bool, part["rows"].values())) <= 1
            with _naming(self._folder, name):
                tables.append(read_tokens(self._folder / name, stream, a, b, there, alone, self._footer(name)))
        rows = pa.concat_tables(tables).unify_dictionaries()
        if len(there) < len(columns):
            rows = rows.append_column(TOKENS.field("predicted"), pa.nulls(len(rows), pa.int32()))
        return rows.select(columns)

    def _read(self, read: Callable[..., _Piece], kind: str, site: int, start: int, stop: int) -> list[_Piece]:
        pieces = []
        for part, a, b in self._pieces(self._layers[site].stream, start, stop):
            name = f"{kind}/part-{part['index']:05d}.parquet"
            with _naming(self._folder, name):
                pieces.append(read(self._folder / name, self._layers[site], a, b, self._footer(name)))
        return pieces

    def _footer(self, name: str) -> Footer:
        if name not in self._footers:
            self._footers[name] = Footer.of(self._folder / name)
        return self._footers[name]

    def _pieces(self, stream: str, start: int, stop: int) -> list[tuple[Mapping[str, Any], int, int]]:
        out: list[tuple[Mapping[str, Any], int, int]] = []
        for part in self._parts:
            first, n = part["first_rows"].get(stream, 0), part["rows"].get(stream, 0)
            a, b = max(start - first, 0), min(stop - first, n)
            if a < b or (not out and part is self._parts[-1]):
                out.append((part, a, max(a, b)))
        return out


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run. RunError where there is none, or it is not one."""
    path = folder / MANIFEST
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        if _ADDRESS.match(str(folder)):  # a Path has one slash of the two
            raise RunError(f"{folder.name} lies in an object store: python -m analysis copy ADDRESS FOLDER, then open the folder") from None
        unfinished = (folder / "progress").is_dir()
        hint = "its capture did not finish: repeat the capture command to resume it" if unfinished else "there is no run.json"
        raise RunError(f"{folder.name} is not a finished run: {hint}") from None
    except OSError as error:
        raise RunError(f"{folder.name}/{MANIFEST} cannot be opened: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        return checked_manifest(file.read(), folder.name)


def checked_manifest(raw: bytes, name: str) -> dict[str, Any]:
    """The manifest in ``raw``, of the run ``name``. RunError where it is not one."""
    try:
        manifest = json.loads(raw)
        version = manifest["schema_version"]
        if version in READABLE:
            _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RunError(f"{name}/{MANIFEST} is damaged: restore it, or capture the run again") from None
    if version not in READABLE:
        raise RunError(f"{name} has schema version {version}, this program reads {' and '.join(map(str, READABLE))}")
    return dict(manifest)


def open_run(folder: str | Path) -> Trace:
    """The stored run in ``folder``; reads the manifest and the documents, and everything else when it is asked for.

    Raises RunError for a missing, unfinished or damaged run: sizes are compared here, pages when they are read, digests in ``verify_run``.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, listed in listed_files(manifest).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != listed["bytes"]:
            raise RunError(f"{folder.name}/{name} is missing or has the wrong size: restore it, or capture the run again")
    try:
        card = ModelCard.from_json(manifest["model"])
        documents = _read(folder / "documents.parquet", DOCUMENTS)
        core, tokens, by_document = (LongTable(folder / n, schema, partial(_naming, folder, n), NAMES) for n, schema in STATISTICS)
    except (TypeError, KeyError) as error:
        raise RunError(f"{folder.name} is damaged ({error}): run `python -m analysis verify`") from error
    stats = Statistics(core, tokens, by_document, tuple(x.n_classes for x in card.layers), following_sites(card.layers))
    parts = manifest["parts"]
    if (kept := manifest["options"].get("weights", "exact")) not in WEIGHTS:
        raise RunError(
            f"{folder.name} keeps gate weights as {kept!r}, this program reads {' and '.join(WEIGHTS)}: open it with a later one"
        )

    def load_tokens() -> pa.Table:
        tables = []
        for name in (f"tokens/part-{p['index']:05d}.parquet" for p in parts):
            with _naming(folder, name):
                rows = pq.read_table(folder / name, page_checksum_verification=True)
                if manifest["schema_version"] == 1:
                    rows = rows.append_column(TOKENS.field("predicted"), pa.nulls(len(rows), pa.int32()))
                tables.append(rows.select(TOKENS.names))
        return pa.concat_tables(tables).unify_dictionaries()

    options = {**manifest["options"], "created": manifest["created"]}
    source = StoredRouting(folder, card.layers, manifest)
    return Trace(card, documents, stats, source, load_tokens, options, folder.name, source.tokens)


def verify_run(folder: str | Path) -> tuple[str, ...]:
    """Problems found, in words; empty where the run is sound: digests, no stray files, invariants, statistics."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
        listed = listed_files(manifest)
        problems = [f"{n}: its sha256 differs from the manifest" for n, s in listed.items()
                    if not (folder / n).is_file() or stamp(folder / n)["sha256"] != s["sha256"]]  # fmt: skip
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
        problems += [f"{n}: not part of the run" for n in sorted(there - set(listed))]
        if problems:
            return tuple(problems)
        trace = open_run(folder)
        with tempfile.TemporaryDirectory() as scratch:
            again = merge_statistics(_counted_again(folder, trace, manifest["parts"]), Path(scratch))
            problems += [f"{n}: counts differ from those of the recorded decisions" for n in _other_counts(trace.stats, again)]
    except (RunError, TraceError, pa.ArrowException, OSError) as error:
        return (str(error),)
    return tuple(problems)


def _counted_again(folder: Path, trace: Trace, parts: Sequence[Mapping[str, Any]]) -> Iterator[Statistics]:
    """Statistics of each part, checked and counted again from the stored decisions; probability sums, which only the capture knew, are 0.

    Raises TraceError for a part that breaks an invariant, or parts that together are not the documents' tokens.
    """
    for stream in {x.stream for x in trace.layers}:
        rows = sum(record["rows"].get(stream, 0) for record in parts)
        if rows != trace.n_tokens(stream):
            raise TraceError(f"{folder.name}: {rows} tokens in the parts of stream {stream}, {trace.n_tokens(stream)} in documents.parquet")
    for record in parts:
        yield _count_part(folder, trace, record)  # in a function, so that no part is held while the next is read


def _count_part(folder: Path, trace: Trace, record: Mapping[str, Any]) -> Statistics:
    part = stored_part(folder, trace, record)
    check_part(part, trace.layers)
    if trace.rounding and not all(np.array_equal(rounded(r.weights), r.weights) for r in part.routing):
        raise TraceError(
            f"{folder.name}: routing/part-{part.index:05d}.parquet has gate weights that are not rounded, as run.json says they are"
        )
    return part_statistics(part, trace.layers)


def stored_part(folder: Path, trace: Trace, record: Mapping[str, Any]) -> Part:
    """The part that a manifest's ``record`` lists, read again; its probability sums are 0, its documents are all of the run's."""
    name = f"tokens/part-{record['index']:05d}.parquet"
    with _naming(folder, name):
        tokens = pq.read_table(folder / name, page_checksum_verification=True)
    own = {"parts": [record], "schema_version": SCHEMA_VERSION}  # so that footers, a MB each, go with the part
    trace = replace(trace, source=StoredRouting(folder, trace.layers, own))
    ranges = [(record["first_rows"][x.stream], record["rows"][x.stream]) for x in trace.layers]
    routing = tuple(trace.routing(i, a, a + n) for i, (a, n) in enumerate(ranges))
    scores = tuple(trace.scores(i, a, a + n) for i, (a, n) in enumerate(ranges))
    zeros = tuple(np.zeros(x.n_classes) for x in trace.layers)
    return Part(record["index"], tokens, trace.documents, routing, scores, zeros, record["first_rows"])


def same_counts(a: Statistics, b: Statistics) -> bool:
    """Whether two statistics agree in every key, count and sum, but for the probability sums, which only the capture knew."""
    return not list(_other_counts(a, b))


def _other_counts(stored: Statistics, counted: Statistics) -> Iterator[str]:
    """The files whose rows are not those counted again: the long tables are compared site by site, as the order of sites is free."""
    pairs = zip(STATISTICS, (stored.core_rows, stored.token_rows, stored.document_rows),
                (counted.core_rows, counted.token_rows, counted.document_rows), strict=True)  # fmt: skip
    for (name, _), a, b in pairs:
        sites = range(len(stored.classes))
        tables = [(whole(a), whole(b))] if name == "stats.parquet" else ((where(a, "site", s), where(b, "site", s)) for s in sites)
        same = [len(x) if _same_counts(x, y) else -1 for x, y in tables]
        if min(same) < 0 or sum(same) != a.num_rows:
            yield name


def _same_counts(a: pa.Table, b: pa.Table) -> bool:
    """Equal keys and counts, and sums within 1e-9, but for the probability sums, which only the capture knew."""
    columns = [n for n in a.column_names if n != "sum"]
    if not a.select(columns).combine_chunks().equals(b.select(columns).combine_chunks()):
        return False
    if "sum" not in a.column_names:
        return True
    derivable = pc.not_equal(a["statistic"], "probability")
    mine, other = (t["sum"].filter(derivable).to_numpy() for t in (a, b))
    return bool(np.allclose(mine, other, rtol=1e-9, atol=1e-9))


@dataclass(frozen=True)
class RunSummary:
    """A run as listed: sizes in bytes, ``created`` in ISO 8601 UTC, ``complete`` False for an interrupted capture."""

    name: str
    folder: Path
    model: str
    family: str
    n_tokens: int
    n_documents: int
    created: str
    bytes: int
    complete: bool


def list_runs(root: str | Path) -> tuple[RunSummary, ...]:
    """Runs directly below ``root``, newest first; folders that are no run, and links, are passed over."""
    root, found = Path(root), []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_symlink() or not folder.is_dir() or not _NAME.fullmatch(folder.name):
            continue
        size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
        if (folder / MANIFEST).is_file():
            try:
                m = read_manifest(folder)
            except RunError:
                found.append(RunSummary(folder.name, folder, "damaged", "", 0, 0, "", size, False))
                continue
            tokens = sum(n for p in m["parts"] for n in p["rows"].values())
            documents = sum(p["documents"] for p in m["parts"])
            found.append(RunSummary(folder.name, folder, m["model"]["name"], m["model"]["family"], tokens, documents,
                                    m["created"], size, True))  # fmt: skip
        elif (folder / "progress" / "capture.json").is_file():
            found.append(RunSummary(folder.name, folder, "unfinished", "", 0, 0, "", size, False))
    return tuple(sorted(found, key=lambda r: r.created, reverse=True))


def delete_run(root: str | Path, name: str) -> None:
    """Delete a run below ``root`` for good. RunError for a name that is not a run there, or a link."""
    root = Path(root).resolve()
    folder = root / valid_run_name(name)
    if folder.is_symlink() or not folder.is_dir() or folder.resolve().parent != root:
        raise RunError(f"there is no run {name} to delete")
    (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted folder never looks like a run
    shutil.rmtree(folder)


def listed_files(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every file of a run but its manifest, by path in the run's folder: size in bytes and sha256."""
    files = dict(manifest["files"])
    for part in manifest["parts"]:
        files |= part["files"]
    return files


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    with _naming(path.parent, path.name):
        return pq.read_table(path, page_checksum_verification=True).select(schema.names).cast(schema)


@contextmanager
def _naming(folder: Path, name: str) -> Iterator[None]:
    """Turn whatever a damaged or vanished file raises on reading into a RunError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise RunError(f"{folder.name}/{name} is {reason}: restore it, or capture the run again ({type(error).__name__})") from error


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """ValueError, or what a missing key raises, unless every field that is read later is there and names its own run's files."""
    for i, part in enumerate(manifest["parts"]):
        counts = [part["documents"], *part["rows"].values(), *part["first_rows"].values()]
        if part["index"] != i or any(not isinstance(n, int) or n < 0 for n in counts) or part["rows"].keys() != part["first_rows"].keys():
            raise ValueError("parts out of order, or counts that are none")
        if set(part["files"]) != {f"{kind}/part-{i:05d}.parquet" for kind in ("tokens", "routing", "scores")}:
            raise ValueError("a part lists other files")
    if set(manifest["files"]) != {"documents.parquet", *(n for n, _ in STATISTICS)}:
        raise ValueError("the run lists other files")
    for listed in listed_files(manifest).values():
        if not isinstance(listed["bytes"], int) or not isinstance(listed["sha256"], str):
            raise ValueError("a file without size or digest")
    if not isinstance(manifest["options"], dict):
        raise ValueError("options that are none")
    for text in (manifest["created"], manifest["model"]["name"], manifest["model"]["family"]):
        if not isinstance(text, str):
            raise ValueError("a name that is no text")
