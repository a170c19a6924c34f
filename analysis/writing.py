"""Writes runs: part by part, resumable; ``store`` describes the folder and reads it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .files import stamp, sweep, write_atomically, write_json
from .layout import write_routing, write_scores, write_table
from .longtables import LongTable, by_site, write_long
from .stats import Statistics, following_sites, merge_statistics, part_statistics
from .store import MANIFEST, STATISTICS, RunError, open_run, valid_run_name
from .trace import SCHEMA_VERSION, LayerInfo, ModelCard, Part, Trace

_PROGRESS = ("core", "tokens", "by_documents")  # the statistics of a part, as STATISTICS those of the run


class RunWriter:
    """Writes a run part by part; a context manager. Leaving it without ``commit`` keeps what was written, for resuming.

    ``parts``, ``documents`` and ``rows`` (per stream) say what is already there.
    """

    def __init__(self, folder: Path, card: ModelCard, options: Mapping[str, Any], lock: int) -> None:
        self.folder, self.card, self.options, self._lock = folder, card, dict(options), lock
        self.refresh()

    @classmethod
    def open(cls, folder: Path, card: ModelCard, options: Mapping[str, Any]) -> RunWriter:
        """Start a run in ``folder``, or resume the interrupted one that is there.

        Raises RunError where a finished run is there, another process writes, or model or options differ.
        """
        valid_run_name(folder.name)
        if (folder / MANIFEST).exists():
            raise RunError(f"{folder.name} is a finished run: choose another name, or delete it first")
        progress = folder / "progress"
        progress.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder, 0o700)
        lock = os.open(progress / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep(folder)
            _check_same_capture(progress / "capture.json", card, options)
        except BlockingIOError:
            os.close(lock)
            raise RunError(f"{folder.name} is being written by another capture: wait for it or choose another name") from None
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, card, options, lock)

    def refresh(self) -> frozenset[int]:
        """Look again at what is stored; numbers of the whole parts, of which those after a gap do not count yet."""
        stored = _part_records(self.folder)
        self._records: list[dict[str, Any]] = []
        self.parts, self.documents = 0, 0
        self.rows: dict[str, int] = {}
        while self.parts in stored:
            self._count(stored[self.parts])
        return frozenset(stored)

    def _count(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self.parts += 1
        self.documents += record["documents"]
        for stream, n in record["rows"].items():
            self.rows[stream] = self.rows.get(stream, 0) + n

    def committed(self) -> list[tuple[str, str | None, str]]:
        """(digest, label, name) of every document already stored, in order."""
        return [d for i in range(self.parts) for d in self.documents_of(i)]

    def documents_of(self, part: int) -> list[tuple[str, str | None, str]]:
        """(digest, label, name) of every document of a stored part, in order."""
        table = pq.read_table(self.folder / "progress" / f"documents-{part:05d}.parquet").to_pylist()
        rows = {r["document"]: (r["digest"], r["label"], r["name"]) for r in table}
        return [rows[d] for d in sorted(rows)]

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._lock)

    def write(self, part: Part) -> None:
        """Store one part; once this returns, a crash cannot lose it."""
        if part.index != self.parts:
            raise RunError(f"part {part.index} out of order: {self.folder.name} has {self.parts}")
        self._count(write_part(self.folder, part, self.card.layers))

    def commit(self) -> Trace:
        """Merge the statistics, write the manifest, and open the finished run. RunError for a run of no parts."""
        if not self._records:
            raise RunError("nothing was captured: no documents were given")
        progress = self.folder / "progress"

        sweep(self.folder)  # what killed workers of a cluster left
        documents = pa.concat_tables([pq.read_table(progress / f"documents-{i:05d}.parquet") for i in range(self.parts)])
        write_atomically(self.folder / "documents.parquet", partial(write_table, documents))
        (progress / "sums").mkdir(exist_ok=True)
        stats = merge_statistics(self._part_statistics(), progress / "sums")
        for (name, _), rows in zip(STATISTICS, (stats.core_rows, stats.token_rows, stats.document_rows), strict=True):
            write_atomically(self.folder / name, partial(_store, rows))
        names = ("documents.parquet", *(n for n, _ in STATISTICS))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.card.to_json(),
            "options": self.options,
            "parts": self._records,
            "files": {n: stamp(self.folder / n) for n in names},
        }
        write_json(self.folder / MANIFEST, manifest)
        shutil.rmtree(progress)
        return open_run(self.folder)

    def _part_statistics(self) -> Iterator[Statistics]:
        """The statistics of each part, read when it is its turn."""
        classes, following = tuple(x.n_classes for x in self.card.layers), following_sites(self.card.layers)
        for i in range(self.parts):
            paths = (self.folder / "progress" / f"{name}-{i:05d}.parquet" for name in _PROGRESS)
            core, by_token, by_document = (LongTable(p, schema) for p, (_, schema) in zip(paths, STATISTICS, strict=True))
            yield Statistics(core, by_token, by_document, classes, following)


def _store(rows: pa.Table | LongTable, path: Path) -> None:
    """Statistics as one file: that where they lie already, or counts by token id or document in row groups of one site."""
    if isinstance(rows, LongTable):
        os.replace(rows.path, path)
    else:
        write_long([rows] if "statistic" in rows.schema.names else by_site(rows), rows.schema, path)


def write_part(folder: Path, part: Part, layers: Sequence[LayerInfo]) -> dict[str, Any]:
    """Write a part's files below ``folder``, each atomically, its record last: until that is there, the part is not.

    The same part gives the same bytes, so writing it again, or from two processes at once, changes nothing.
    """
    number, progress = f"{part.index:05d}", folder / "progress"
    stats = part_statistics(part, layers)
    files = [f"{kind}/part-{number}.parquet" for kind in ("tokens", "routing", "scores")]
    write_atomically(folder / files[0], lambda p: write_table(part.tokens, p))
    write_atomically(folder / files[1], lambda p: write_routing(part, layers, p))
    write_atomically(folder / files[2], lambda p: write_scores(part, layers, p))
    write_atomically(progress / f"documents-{number}.parquet", partial(write_table, part.documents))
    for name, rows in zip(_PROGRESS, (stats.core_rows, stats.token_rows, stats.document_rows), strict=True):
        write_atomically(progress / f"{name}-{number}.parquet", partial(_store, rows))
    record = {
        "index": part.index,
        "documents": len(set(part.documents["document"].to_pylist())),
        "first_rows": dict(part.first_rows),
        "rows": {s: len(part.stream_tokens(s)) for s in part.first_rows},
        "files": {f: stamp(folder / f) for f in files},
    }
    write_json(progress / f"part-{number}.json", record)
    return record


def _check_same_capture(path: Path, card: ModelCard, options: Mapping[str, Any]) -> None:
    """Record what is being captured, or compare with the record of the interrupted capture."""
    mine = json.loads(json.dumps({"model": card.to_json(), "options": dict(options), "schema_version": SCHEMA_VERSION}))
    if not path.exists():
        write_json(path, mine)
        return
    started = json.loads(path.read_text(encoding="utf-8"))
    for what in mine:
        if started.get(what) != mine[what]:
            raise RunError(f"the interrupted capture in this folder used other {what}: use the same, or delete the run")


def _part_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Records of stored parts by number; a part counts only when its record and all its files are whole."""
    records: dict[int, dict[str, Any]] = {}
    for path in (folder / "progress").glob("part-*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if all((folder / f).is_file() and (folder / f).stat().st_size == s["bytes"] for f, s in record["files"].items()):
            records[record["index"]] = record
    return records
