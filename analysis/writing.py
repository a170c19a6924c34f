"""Writes runs: part by part, resumable; ``store`` describes the folder and reads it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from zipfile import BadZipFile

import pyarrow as pa
import pyarrow.parquet as pq

from .corecounts import CoreCounts
from .files import stamp, sweep, write_atomically, write_json
from .keycounts import KeyCounts, PartCounts, StoredCounts
from .layout import write_routing, write_scores, write_table
from .longtables import LongTable, write_long
from .places import Place, RunError
from .stats import BY_DOCUMENT, BY_TOKEN, CORE, Statistics, following_sites, merge_statistics, part_statistics
from .store import KINDS, MANIFEST, MOST_SECONDS, STATISTICS, open_run, valid_run_name
from .trace import SCHEMA_VERSION, LayerInfo, ModelCard, Part, Trace

CAPTURE = "progress/capture.json"  # what is being captured, there before any part
_LOCK = "progress/lock"
_DOCUMENTS = "documents-{}.parquet"  # of a part
_PROGRESS = ("core-{}.npz", "by_token-{}.npz", "by_document-{}.npz")  # the statistics of a part, as STATISTICS those of the run


class RunWriter:
    """Writes a run part by part; a context manager. Leaving it without ``commit`` keeps what was written, for resuming.

    ``parts``, ``documents`` and ``rows`` (per stream) say what is already there. What is written or read here lies in ``folder``, a
    workspace of ``place``: where that is an address, parts stay there, and only records, documents and statistics come here.
    """

    def __init__(self, place: Place, folder: Path, card: ModelCard, options: Mapping[str, Any]) -> None:
        self.place, self.folder, self.card, self.options, self._opened = place, folder, card, dict(options), ExitStack()
        self.refresh()

    @classmethod
    def open(cls, where: str | Path, card: ModelCard, options: Mapping[str, Any]) -> RunWriter:
        """Start a run in a folder or below an address, or resume the interrupted one that is there.

        Raises RunError where a finished run or something else is there, another process writes (an address has no lock: one capture at a time is the
        caller's to see to), or model or options differ.
        """
        place = Place.of(where)
        valid_run_name(place.name)
        if place.holds(MANIFEST):
            raise RunError(f"{place.name} is a finished run: choose another name, or delete it first")
        _check_vacant(place)
        with ExitStack() as opened:
            folder = opened.enter_context(place.workspace())
            opened.callback(os.close, _locked(folder, place.name))
            sweep(folder)
            _check_same_capture(place, folder, card, options)
            writer = cls(place, folder, card, options)
            writer._opened = opened.pop_all()
            return writer

    def refresh(self) -> dict[int, dict[str, Any]]:
        """Look again at what is stored; records of the whole parts by number, of which those after a gap do not count yet.

        Nor does a part whose documents and rows are not numbered on from the part before: where what lay before it was captured again from
        other texts, it is captured again too.
        """
        stored = _part_records(self.place, self.folder)
        self.place.fetch(self.folder, *(_of_part(_DOCUMENTS, i) for i in stored))
        self._records: list[dict[str, Any]] = []
        self.parts, self.documents = 0, 0
        self.rows: dict[str, int] = {}
        while self.parts in stored and self._follows(stored[self.parts]):
            self._count(stored[self.parts])
        return stored

    def _follows(self, record: Mapping[str, Any]) -> bool:
        first_rows = {s: self.rows.get(s, 0) for s in record["first_rows"]}
        return (record["first_document"], record["first_rows"]) == (self.documents, first_rows)

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
        rows = {r["document"]: (r["digest"], r["label"], r["name"]) for r in self._documents_of(part).to_pylist()}
        return [rows[d] for d in sorted(rows)]

    def _documents_of(self, part: int) -> pa.Table:
        with self._repairable(_of_part(_DOCUMENTS, part)):
            return pq.read_table(self._progress(_DOCUMENTS, part), page_checksum_verification=True)

    @contextmanager
    def _repairable(self, what: str) -> Iterator[None]:
        """Turn what damage among the files of an unfinished capture raises on reading into a RunError that says how to go on."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, LookupError, BadZipFile) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk: what pyarrow finds in a file has no number
                raise
            raise RunError(
                f"{self.place.name}/{what} is damaged ({type(error).__name__}): delete that part's record, progress/part-*.json, and repeat the command, or delete the run"
            ) from error

    def _progress(self, name: str, part: int) -> Path:
        return self.folder / _of_part(name, part)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def write(self, part: Part) -> None:
        """Store one part; once this returns, a crash cannot lose it."""
        if part.index != self.parts:
            raise RunError(f"part {part.index} out of order: {self.place.name} has {self.parts}")
        self._count(write_part(self.place, part, self.card.layers))

    def commit(self) -> Trace:
        """``finish``, and open the run, which must lie in a folder."""
        self.finish()
        return open_run(self.folder)

    def finish(self) -> None:
        """Merge the statistics and write the manifest, last. RunError for a run of no parts.

        Parquet files of parts that are not of this run go first: those of a part that was never whole, or that fewer texts no longer have.
        Whoever reads the folder ``routing`` as one table would count them.
        """
        if not self._records:
            raise RunError("nothing was captured: no documents were given")
        sweep(self.folder)  # what killed workers of a cluster left
        self.place.fetch(self.folder, *(_of_part(name, i) for i in range(self.parts) for name in _PROGRESS))
        documents = pa.concat_tables([self._documents_of(i) for i in range(self.parts)])
        write_atomically(self.folder / "documents.parquet", partial(write_table, documents))
        sums = self.folder / "progress" / "sums"
        sums.mkdir(exist_ok=True)
        with self._repairable("progress, the counts of its parts,"):
            stats = merge_statistics(self._part_statistics(), sums)
        core = stats.core_rows.groups() if isinstance(stats.core_rows, CoreCounts) else [stats.core]
        write_atomically(self.folder / STATISTICS[0][0], partial(write_long, core, CORE, differences=("count",)))
        for (name, _), rows in zip(STATISTICS[1:], (stats.token_rows, stats.document_rows), strict=True):
            write_atomically(self.folder / name, partial(_store, rows))
        names = ("documents.parquet", *(n for n, _ in STATISTICS))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self._lasted(),
            "model": self.card.to_json(),
            "options": self.options,
            "parts": self._records,
            "files": {n: stamp(self.folder / n) for n in names},
        }
        own = {f for record in self._records for f in record["files"]}
        self.place.discard(*(n for n in self.place.sizes() if n not in own and any(fnmatch(n, f"{kind}/*.parquet") for kind in KINDS)))
        self.place.store(self.folder, *names)
        write_json(self.folder / MANIFEST, manifest)
        self.place.store(self.folder, MANIFEST)
        self.place.remove("progress")

    def _lasted(self) -> float | None:
        """Seconds since the capture was begun, pauses among them; None where its record is of an earlier version, or a clock was put back."""
        begun = json.loads((self.folder / CAPTURE).read_text(encoding="utf-8")).get("begun")
        lasted = time.time() - begun if isinstance(begun, int | float) else -1
        return round(lasted, 1) if 0 <= lasted <= MOST_SECONDS else None

    def _part_statistics(self) -> Iterator[Statistics]:
        """The statistics of each part, read when it is its turn."""
        classes, following = tuple(x.n_classes for x in self.card.layers), following_sites(self.card.layers)
        for i in range(self.parts):
            core, tokens, documents = (self._progress(name, i) for name in _PROGRESS)
            counts = StoredCounts(tokens, BY_TOKEN), StoredCounts(documents, BY_DOCUMENT)
            yield Statistics(CoreCounts.read(core, CORE), *counts, classes, following)


def _store(rows: pa.Table | LongTable | PartCounts | CoreCounts, path: Path) -> None:
    """Statistics as one file: that where they lie already, or a part's counts as such."""
    if isinstance(rows, LongTable):
        os.replace(rows.path, path)
    else:
        assert isinstance(rows, KeyCounts | CoreCounts)
        rows.write(path)


def write_part(place: Place, part: Part, layers: Sequence[LayerInfo]) -> dict[str, Any]:
    """Write a part's files, each atomically, its record last: until that is there, the part is not.

    The same part gives the same bytes, so writing it again, or from two processes at once, changes nothing.
    """
    number = f"{part.index:05d}"
    stats = part_statistics(part, layers)
    files = [f"{kind}/part-{number}.parquet" for kind in KINDS]
    progress = [_of_part(name, part.index) for name in (_DOCUMENTS, *_PROGRESS)]
    with place.workspace() as folder:
        write_atomically(folder / files[0], lambda p: write_table(part.tokens, p))
        write_atomically(folder / files[1], lambda p: write_routing(part, layers, p))
        write_atomically(folder / files[2], lambda p: write_scores(part, layers, p))
        write_atomically(folder / progress[0], partial(write_table, part.documents))
        for name, rows in zip(progress[1:], (stats.core_rows, stats.token_rows, stats.document_rows), strict=True):
            write_atomically(folder / name, partial(_store, rows))
        place.store(folder, *files, *progress)
        record = {
            "index": part.index,
            "first_document": min(part.documents["document"].to_pylist()),
            "documents": len(set(part.documents["document"].to_pylist())),
            "first_rows": dict(part.first_rows),
            "rows": {s: len(part.stream_tokens(s)) for s in part.first_rows},
            "files": {f: stamp(folder / f) for f in files},
        }
        write_json(folder / _record(part.index), record)
        place.store(folder, _record(part.index))
    return record


def _of_part(name: str, part: int) -> str:
    return f"progress/{name.format(f'{part:05d}')}"


def _record(part: int) -> str:
    return f"progress/part-{part:05d}.json"


def _check_vacant(place: Place) -> None:
    """RunError where files of something else lie: a run would mix with them, and ending it deletes ``progress`` and parts not its own."""
    if not place.holds(CAPTURE):
        begun = (_LOCK, "progress/.*.tmp")  # what a capture leaves that was killed as it began
        if (other := next((n for n in place.sizes() if not any(fnmatch(n, own) for own in begun)), None)) is not None:
            raise RunError(f"{place.name} holds files that are of no capture, such as {other}: choose another name, or empty it")


def _locked(folder: Path, name: str) -> int:
    """A descriptor that locks the capture into ``folder``, which is made where it is not there. RunError where another holds it."""
    (folder / "progress").mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(folder, 0o700)
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunError(f"{name} is being written by another capture: wait for it or choose another name") from None
    return lock


def _check_same_capture(place: Place, folder: Path, card: ModelCard, options: Mapping[str, Any]) -> None:
    """Record what is being captured, or compare with the record of the interrupted capture."""
    known = {"model": card.to_json(), "options": dict(options), "schema_version": SCHEMA_VERSION, "progress files": _PROGRESS}
    mine = json.loads(json.dumps(known))
    if not place.holds(CAPTURE):
        write_json(folder / CAPTURE, {**mine, "begun": time.time()})
        place.store(folder, CAPTURE)
        return
    place.fetch(folder, CAPTURE)
    try:
        started = dict(json.loads((folder / CAPTURE).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise RunError(f"{place.name}/{CAPTURE} is damaged: what was being captured is not known; delete the run") from None
    for what in mine:
        if started.get(what) != mine[what]:
            then, now = started.get("options", {}), mine["options"]
            which = ", ".join(sorted(n for n in {*then, *now} if then.get(n) != now.get(n)))
            named = f" ({which})" if what == "options" else ""
            raise RunError(f"the interrupted capture in this folder used other {what}{named}: use the same, or delete the run")


def _part_records(place: Place, folder: Path) -> dict[int, dict[str, Any]]:
    """Records of stored parts by number; a part counts only when its record and all its files are whole."""
    records: dict[int, dict[str, Any]] = {}
    sizes = place.sizes()
    names = [n for n in sizes if fnmatch(n, "progress/part-*.json")]
    place.fetch(folder, *names)
    for name in names:
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # a damaged record is none: its part is captured again
            record = json.loads((folder / name).read_text(encoding="utf-8"))
            whole = all(sizes.get(f) == s["bytes"] for f, s in record["files"].items())
            if whole and _record(record["index"]) == name and "first_document" in record:
                records[record["index"]] = record
    return records
