"""Runs on disk, read: listed, opened, deleted. Parquet that any reader opens; ``writing`` writes them.

A run is a folder, or lies below an address (places). ``run.json`` is written last, and its presence is the commit; it lists every file with
its size and sha256. While a capture is under way the folder has ``progress/`` instead, from which it is resumed.

    run.json  documents.parquet  stats.parquet  token_stats.parquet  document_stats.parquet
    tokens/part-00000.parquet    one row per token (schema trace.TOKENS)
    routing/part-00000.parquet   row, site, document, e0.. (ids, null = none), w0.. (gate weights), c0.. (chosen, only for
                                 models with a native capacity); a row group holds one site,
                                 the groups of a site are in the order of its rows. Where the run was captured with weights
                                 "none" there are no w0.., and the ids of a row are in the order of falling weight: e0 is the first choice
    scores/part-00000.parquet    row, site, entropy, margin, logsumexp, p0.. (only when asked for); row groups alike
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .layout import Footer, read_experts, read_routing, read_scores, read_tokens, room_for
from .longtables import LongTable
from .memory import join_scores
from .places import Place
from .places import RunError as RunError
from .rounding import WEIGHTS
from .stats import BY_DOCUMENT, BY_TOKEN, CORE, NAMES, Statistics, following_sites
from .trace import (
    DOCUMENTS,
    SCHEMA_VERSION,
    STREAMS,
    TOKENS,
    LayerInfo,
    ModelCard,
    SiteRouting,
    SiteScores,
    Trace,
    id_dtype,
)  # fmt: skip

MANIFEST = "run.json"
READABLE = (1, SCHEMA_VERSION)
MOST_CLASSES = 1 << 20  # per site; what claims more is damage, and would be believed with memory
MOST_SECONDS = 1e10  # a capture of 300 years
KINDS = ("tokens", "routing", "scores")  # of a part's files
STATISTICS = (("stats.parquet", CORE), ("token_stats.parquet", BY_TOKEN), ("document_stats.parquet", BY_DOCUMENT))
_Piece = tuple[Mapping[str, Any], int, int]  # a part, and the start and stop within it of the rows that are asked for
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))})


def valid_run_name(name: str) -> str:
    """``name`` itself where it may name a run folder, else RunError."""
    if not _NAME.fullmatch(name) or name.split(".")[0] in _DEVICES or name.endswith("."):
        raise RunError("a run name has 1 to 64 characters of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit")
    return name


class StoredRouting:
    """RoutingSource over a run's parts; reads only the row groups a range needs."""

    def __init__(self, place: Place, layers: Sequence[LayerInfo], manifest: Mapping[str, Any]) -> None:
        self._place, self._layers, self._parts, self._version = place, layers, manifest["parts"], manifest["schema_version"]
        self._opened: dict[str, tuple[Any, Footer]] = {}
        self._weighted = manifest["options"].get("weights") != "none"

    def routings(self, sites: Sequence[int], start: int, stop: int) -> tuple[SiteRouting, ...]:
        layers, pieces = [self._layers[i] for i in sites], self._pieces(self._layers[sites[0]].stream, start, stop)
        whole, n = tuple[SiteRouting, ...](), sum(b - a for _, a, b in pieces)
        for name, at, a, b in self._files("routing", pieces):
            with naming(self._place, name):
                file, footer = self._open(name)
                whole = whole or tuple(room_for(x, n, "c0" in footer.metadata.schema.names, self._weighted) for x in layers)
                read_routing(file, layers, a, b, [_rows(r, at, at + b - a) for r in whole], footer)
        return tuple(r if r.chosen is r.experts or not np.array_equal(r.chosen, r.experts) else SiteRouting(r.experts, r.weights, r.experts)
                     for r in whole)  # fmt: skip

    def experts(self, site: int, start: int, stop: int) -> np.ndarray:
        layer, pieces = self._layers[site], self._pieces(self._layers[site].stream, start, stop)
        whole = np.empty((sum(b - a for _, a, b in pieces), layer.top_k), id_dtype(layer.n_classes))
        for name, at, a, b in self._files("routing", pieces):
            with naming(self._place, name):
                file, footer = self._open(name)
                read_experts(file, layer, a, b, whole[at : at + b - a], footer)
        return whole

    def scores(self, site: int, start: int, stop: int) -> SiteScores:
        layer, found = self._layers[site], []
        for name, _, a, b in self._files("scores", self._pieces(layer.stream, start, stop)):
            with naming(self._place, name):
                file, footer = self._open(name)
                found.append(read_scores(file, layer, a, b, footer))
        return join_scores(found)

    def tokens(self, stream: str, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows start to stop of a stream, ``columns`` of schema TOKENS."""
        there = [c for c in columns if self._version > 1 or c != "predicted"]
        tables = []
        for part, a, b in self._pieces(stream, start, stop):
            name, alone = f"tokens/part-{part['index']:05d}.parquet", sum(map(bool, part["rows"].values())) <= 1
            with naming(self._place, name):
                file, footer = self._open(name)
                tables.append(read_tokens(file, stream, a, b, there, alone, footer))
        with naming(self._place, "tokens"):  # a footer may tell another schema than those of the other parts
            rows = pa.concat_tables(tables).unify_dictionaries()
        if len(there) < len(columns):
            rows = rows.append_column(TOKENS.field("predicted"), pa.nulls(len(rows), pa.int32()))
        return rows.select(columns)

    @staticmethod
    def _files(kind: str, pieces: Sequence[_Piece]) -> Iterator[tuple[str, int, int, int]]:
        """(file, rows read before it, start and stop within it)"""
        before = 0
        for part, a, b in pieces:
            yield f"{kind}/part-{part['index']:05d}.parquet", before, a, b
            before += b - a

    def _open(self, name: str) -> tuple[Any, Footer]:
        if name not in self._opened:
            file = self._place.file(name)
            self._opened[name] = file, Footer.of(file)
        return self._opened[name]

    def _pieces(self, stream: str, start: int, stop: int) -> list[_Piece]:
        out: list[_Piece] = []
        for part in self._parts:
            first, n = part["first_rows"].get(stream, 0), part["rows"].get(stream, 0)
            a, b = max(start - first, 0), min(stop - first, n)
            if a < b or (not out and part is self._parts[-1]):
                out.append((part, a, max(a, b)))
        return out


def _rows(routing: SiteRouting, start: int, stop: int) -> SiteRouting:
    experts, weights = routing.experts[start:stop], None if routing.weights is None else routing.weights[start:stop]
    return SiteRouting(experts, weights, experts if routing.chosen is routing.experts else routing.chosen[start:stop])


def read_manifest(run: str | Path | Place) -> dict[str, Any]:
    """The manifest of a run. RunError where there is none, or it is not one."""
    place = Place.of(run)
    try:
        if place.folder is None:
            with place.file(MANIFEST) as file:
                raw = file.read()
        else:
            with os.fdopen(os.open(place.folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                raw = file.read()
    except FileNotFoundError:
        unfinished = place.holds("progress/capture.json")
        hint = "its capture did not finish: repeat the capture command to resume it" if unfinished else "there is no run.json"
        raise RunError(f"{place.name} is not a finished run: {hint}") from None
    except OSError as error:
        raise RunError(f"{place.name}/{MANIFEST} cannot be opened: {error.strerror or error}") from None
    return checked_manifest(raw, place.name)


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


def open_run(run: str | Path) -> Trace:
    """The stored run in a folder or at an address; reads the manifest and the documents, and everything else when it is asked for.

    Raises RunError for a missing, unfinished or damaged run: sizes are compared here, pages when they are read, digests in ``verify_run``.
    """
    place = Place.of(run)
    manifest = read_manifest(place)
    _check_sizes(place, listed_files(manifest))
    try:
        card = ModelCard.from_json(manifest["model"])
        with naming(place, "documents.parquet"):
            with pq.ParquetFile(place.file("documents.parquet"), page_checksum_verification=True) as file:
                documents = file.read(columns=DOCUMENTS.names).select(DOCUMENTS.names).cast(DOCUMENTS)
        core, tokens, by_document = (_long(place, n, schema) for n, schema in STATISTICS)
    except (TypeError, KeyError) as error:
        raise RunError(f"{place.name} is damaged ({error}): run `python -m analysis verify`") from error
    stats = Statistics(core, tokens, by_document, tuple(x.n_classes for x in card.layers), following_sites(card.layers))
    parts = manifest["parts"]
    if (kept := manifest["options"].get("weights", "exact")) not in WEIGHTS:
        raise RunError(f"{place.name} keeps gate weights as {kept!r}, this program reads {', '.join(WEIGHTS)}: open it with a later one")

    def load_tokens() -> pa.Table:
        tables = []
        for name in (f"tokens/part-{p['index']:05d}.parquet" for p in parts):
            with naming(place, name):
                rows = pq.read_table(place.file(name), page_checksum_verification=True)
                if manifest["schema_version"] == 1:
                    rows = rows.append_column(TOKENS.field("predicted"), pa.nulls(len(rows), pa.int32()))
                tables.append(rows.select(TOKENS.names))
        with naming(place, "tokens"):
            return pa.concat_tables(tables).unify_dictionaries()

    options = {**manifest["options"], "created": manifest["created"]}
    source = StoredRouting(place, card.layers, manifest)
    return Trace(card, documents, stats, source, load_tokens, options, place.name, source.tokens)


def _long(place: Place, name: str, schema: pa.Schema) -> LongTable:
    with naming(place, name):
        return LongTable(place.file(name), schema, partial(naming, place, name), NAMES)


def _check_sizes(place: Place, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """RunError unless every file is there and as large as the manifest says."""
    folder = place.folder
    there = place.sizes() if folder is None else {n: _size(f"{folder}/{n}") for n in listed}
    for name, file in listed.items():
        if there.get(name) != file["bytes"]:
            raise RunError(f"{place.name}/{name} is missing or has the wrong size: restore it, or capture the run again")


def _size(path: str) -> int:
    """Bytes of a plain file, -1 where there is none; one call of the system, since a run of 10^9 decisions has hundreds of files."""
    try:
        there = os.stat(path)
    except OSError:
        return -1
    return there.st_size if stat.S_ISREG(there.st_mode) else -1


@dataclass(frozen=True)
class RunSummary:
    """A run as listed: sizes in bytes, ``created`` in ISO 8601 UTC, ``complete`` False for an interrupted capture.

    ``seconds`` from the begin of its capture to its end, pauses of an interrupted one among them; None where the manifest does not say.
    """

    name: str
    folder: Path
    model: str
    family: str
    n_tokens: int
    n_documents: int
    created: str
    bytes: int
    complete: bool
    seconds: float | None = None


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
                                    m["created"], size, True, m.get("seconds")))  # fmt: skip
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


@contextmanager
def naming(place: Place, name: str) -> Iterator[None]:
    """Turn whatever a damaged or vanished file raises on reading into a RunError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "damaged" if place.folder else "damaged or out of reach"
        denied = place.folder is None and isinstance(error, OSError)  # by a store that says why
        told = str(error)[:300] if denied else type(error).__name__
        raise RunError(f"{place.name}/{name} is {reason}: restore it, or capture the run again ({told})") from error


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """ValueError, or what a missing key raises, unless every field that is read later is there and names its own run's files."""
    documents, before = 0, dict[str, int]()
    for i, part in enumerate(manifest["parts"]):
        counts = [part["documents"], *part["rows"].values(), *part["first_rows"].values()]
        if part["index"] != i or any(not isinstance(n, int) or n < 0 for n in counts) or part["rows"].keys() != part["first_rows"].keys():
            raise ValueError("parts out of order, or counts that are none")
        if part.get("first_document", documents) != documents or any(
            first != before.get(stream, 0) for stream, first in part["first_rows"].items()
        ):
            raise ValueError("documents or rows that are missing between two parts, or in both")
        documents += part["documents"]
        before |= {stream: first + part["rows"][stream] for stream, first in part["first_rows"].items()}
        if set(part["files"]) != {f"{kind}/part-{i:05d}.parquet" for kind in KINDS}:
            raise ValueError("a part lists other files")
    if set(manifest["files"]) != {"documents.parquet", *(n for n, _ in STATISTICS)}:
        raise ValueError("the run lists other files")
    for listed in listed_files(manifest).values():
        if not isinstance(listed["bytes"], int) or not isinstance(listed["sha256"], str):
            raise ValueError("a file without size or digest")
    if not isinstance(manifest["options"], dict):
        raise ValueError("options that are none")
    if (seconds := manifest.get("seconds")) is not None and not 0 <= seconds <= MOST_SECONDS:  # nor NaN
        raise ValueError("a duration that is none")
    for text in (manifest["created"], manifest["model"]["name"], manifest["model"]["family"]):
        if not isinstance(text, str):
            raise ValueError("a name that is no text")
    if not manifest["model"]["layers"] or not manifest["parts"]:
        raise ValueError("a run of nothing")
    for i, layer in enumerate(manifest["model"]["layers"]):  # sizes of arrays follow from these
        sizes = layer["n_experts"], layer.get("n_special", 0), layer["top_k"]
        if layer["index"] != i or any(not isinstance(n, int) for n in sizes) or layer["stream"] not in STREAMS:
            raise ValueError("layers out of order, or sizes that are none")
        if not (sizes[0] > 0 and sizes[1] >= 0 and 0 < sizes[2] <= sizes[0] + sizes[1] <= MOST_CLASSES):
            raise ValueError("a layer whose experts or top-k cannot be")
