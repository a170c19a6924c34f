"""Run a model over documents and record every routing decision: hooks -> Parts -> Trace.

The hooks are in recorder.py, one forward in forwards.py, tables in assembling.py; here documents become batches and parts. While the device
works on a batch, the host makes arrays of the one before and a thread writes the part before: one of each at most, so that memory stays flat.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import nn

from .assembling import Document, Piece, assembled
from .forwards import Started, forward, generate
from .layout import part_tokens as default_part_tokens
from .memory import PartsInMemory
from .models import model_card
from .places import Place
from .recorder import CaptureCancelled, CaptureError, recording
from .rounding import WEIGHTS, rounded
from .routers import find_sites
from .stats import merge_statistics, part_statistics
from .tokens import Pieces, encode
from .trace import LayerInfo, Part, Trace, check_part, gate_weights, token_digest
from .writing import RunWriter

T = TypeVar("T")


class PromptTooLong(CaptureError):
    """A document has more tokens than the model's context or the limit set. Nothing is ever cut."""


@dataclass(frozen=True)
class Progress:
    """How far a capture is. ``total`` is None for a stream of unknown length."""

    documents: int
    total: int | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class PlannedDocument:
    """A document before it is captured: (digest, label, name), and the rows it will have in each stream."""

    known: tuple[str, str | None, str]
    rows: dict[str, int]


@dataclass(frozen=True)
class PlannedPart:
    """A part before it is captured: its documents as (digest, label, name), and per stream its first row and number of rows."""

    index: int
    first_document: int
    documents: tuple[tuple[str, str | None, str], ...]
    first_rows: dict[str, int]
    rows: dict[str, int]


def capture_parts(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    labels: Iterable[str | None] | None = None,
    names: Iterable[str] | None = None,
    batch_size: int = 8,
    part_tokens: int | None = None,
    max_tokens: int | None = None,
    probabilities: bool = False,
    weights: str = "exact",
    new_tokens: int = 0,
    committed: Sequence[tuple[str, str | None, str]] = (),
    first_document: int = 0,
    first_part: int = 0,
    first_rows: dict[str, int] | None = None,
    pieces_of: Pieces | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[Part]:
    """Yield Parts of about ``part_tokens`` tokens, by default as many as layout.part_tokens says; memory does not grow with the corpus.

    Documents keep their order and are never split. ``texts`` may be a generator. ``new_tokens`` continues each
    document greedily with a KV cache; the last generated token is never fed back, so it has no routing and no row.
    A model whose routing mixes the tokens of a forward (Doge) reads one document at a time whatever ``batch_size``.
    Encoder-decoder models read the text in the encoder; their decoder runs on its start token alone.
    Batches never straddle parts, so a resumed capture runs exactly the batches of an uninterrupted one. ``committed``
    holds (digest, label, name) of the documents already recorded, which are compared and passed over. ``first_document``,
    ``first_part`` and ``first_rows`` are the numbers that the first text, its part and its rows get.
    ``pieces_of`` is Pieces.of(tokenizer) where it is at hand: a tokenizer of 150,000 pieces takes 0.2 s to read.
    ``weights`` "8-bit" rounds gate weights before anything is counted, so that all figures of a run follow from what it holds (rounding.py);
    "none" has them counted as executed, and drops them when the part is stored.
    Raises PromptTooLong, CaptureCancelled, CaptureError, RouterError, TraceError.
    """
    if weights not in WEIGHTS:
        raise CaptureError(f"no way {weights!r} to keep gate weights: there are {', '.join(WEIGHTS)}")
    sites = find_sites(model)
    batch_size = 1 if any(s.kind.mixes for s in sites) else batch_size
    limit = _limit(model, max_tokens)
    if new_tokens >= limit:
        raise CaptureError(f"{new_tokens:,} new tokens leave no room for a text: a document has at most {limit:,} tokens here")
    documents = _documents(tokenizer, texts, labels, names, committed, limit - new_tokens, first_document)

    def start(batch: Sequence[Document]) -> Started:
        if cancelled is not None and cancelled():
            raise CaptureCancelled("capture cancelled")
        with recording(model, sites, cancelled) as recorder, torch.inference_mode():
            if new_tokens:
                return generate(model, recorder, batch, new_tokens, probabilities)
            return forward(model, recorder, batch, probabilities)

    layers, rows, began = [s.info for s in sites], dict(first_rows or {}), time.monotonic()
    part_tokens = part_tokens or default_part_tokens(layers)
    done = Progress(len(committed), len(texts) if isinstance(texts, Sequence) else None, 0, 0.0)
    index, pieces, pieces_of = first_part, list[Piece](), pieces_of or Pieces.of(tokenizer)
    for found in _overlapped(_started(start, documents, part_tokens, batch_size)):
        if found is None:
            yield _kept(assembled(index, pieces, layers, pieces_of, rows), layers, weights)
            for piece in pieces:
                rows[piece.stream] = rows.get(piece.stream, 0) + piece.tokens
            index, pieces = index + 1, []
            continue
        pieces += found
        batch = {f.document.index: len(f.document.ids) for piece in found for f in piece.fed}
        done = Progress(done.documents + len(batch), done.total, done.tokens + sum(batch.values()), time.monotonic() - began)
        if progress is not None:
            progress(done)


def _started(start: Callable[[Sequence[Document]], Started], documents: Iterator[Document], part_tokens: int,
             batch_size: int) -> Iterator[Started | None]:  # fmt: skip
    """Every batch, started when it is asked for; None where a part ends. Batches never straddle parts."""
    while True:
        started = False
        for batch in _batched(_until(documents, part_tokens, lambda d: len(d.ids)), batch_size):
            started = True
            yield start(batch)
        if not started:
            return
        yield None


def _overlapped(batches: Iterator[Started | None]) -> Iterator[list[Piece] | None]:
    """What each batch recorded, and None where a part ends; each is waited for once the device has the next batch to work on.

    One batch waits at most. What came before an error is still given out, or raises its own.
    """
    waiting: Started | None = None
    while True:
        now, ended, failed = None, False, None
        try:
            now = next(batches, None)
            if waiting is not None and now is None:
                ended = True
                now = next(batches, None)
        except BaseException as error:
            failed = error
        if waiting is not None:
            yield waiting.finish()
        if ended:
            yield None
        if failed is not None:
            raise failed
        if now is None:
            return
        waiting = now


def _kept(part: Part, layers: Sequence[LayerInfo], weights: str) -> Part:
    """The part with its gate weights as they are to be kept, checked."""
    if weights == "8-bit":
        part = replace(part, routing=tuple(replace(r, weights=rounded(gate_weights(r, "this part"))) for r in part.routing))
    check_part(part, layers)
    return replace(part, weights=weights)


def plan_documents(model: Any, tokenizer: Any, texts: Iterable[str], *, labels: Iterable[str | None] | None = None,
                   names: Iterable[str] | None = None, first_document: int = 0, max_tokens: int | None = None) -> list[PlannedDocument]:  # fmt: skip
    """What ``plan_parts`` needs to know of each text; ``first_document`` is the first one's number. Raises PromptTooLong, CaptureError, as capturing would."""
    documents = _documents(tokenizer, texts, labels, names, (), _limit(model, max_tokens), first_document)
    two_streams = bool(model.config.is_encoder_decoder)  # whose decoder runs on its start token alone
    return [
        PlannedDocument(
            (token_digest(d.ids), d.label, d.name), {"encoder": len(d.ids), "decoder": 1} if two_streams else {"decoder": len(d.ids)}
        )
        for d in documents
    ]


def plan_parts(documents: Iterable[PlannedDocument], part_tokens: int) -> list[PlannedPart]:
    """The parts that ``capture_parts`` will yield for these documents, without a forward; not for ``new_tokens``."""
    plan: list[PlannedPart] = []
    first, rows, waiting = 0, dict[str, int](), iter(documents)
    while chunk := list(_until(waiting, part_tokens, lambda d: max(d.rows.values()))):
        mine = {stream: sum(d.rows[stream] for d in chunk) for stream in chunk[0].rows}
        plan.append(PlannedPart(len(plan), first, tuple(d.known for d in chunk), {s: rows.get(s, 0) for s in mine}, mine))
        first, rows = first + len(chunk), {s: rows.get(s, 0) + n for s, n in mine.items()}
    return plan


def capture(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    labels: Iterable[str | None] | None = None,
    names: Iterable[str] | None = None,
    out: str | Path | None = None,
    name: str = "",
    model_path: str | Path | None = None,
    **options: Any,
) -> Trace:
    """Record the routing of ``texts`` through ``model``; options as in ``capture_parts``.

    ``out`` is the folder of the run: an interrupted capture into it is resumed. None keeps the trace in memory.
    """
    card = model_card(model, tokenizer, model_path or getattr(model, "name_or_path", None) or None)
    options = {**options, "part_tokens": options.get("part_tokens") or default_part_tokens(card.layers)}
    # What decides the recorded numbers; a resumed run must have the same.
    kept = {k: v for k, v in options.items() if k not in ("progress", "cancelled")}
    if out is None:
        parts = list(capture_parts(model, tokenizer, texts, labels=labels, names=names, **options))
        if not parts:
            raise CaptureError("nothing to capture: no documents were given")
        documents = pa.concat_tables([p.documents for p in parts])
        tokens = pa.concat_tables([p.tokens for p in parts]).unify_dictionaries()
        stats = merge_statistics([part_statistics(p, card.layers) for p in parts])
        source = PartsInMemory(parts, len(card.layers))
        return Trace(card, documents, stats, source, lambda: tokens, kept, name)
    if Place.of(out).folder is None:
        raise CaptureError(
            "one process captures into a folder: copy the run to its address then (python -m analysis copy), or give --cluster"
        )
    with RunWriter.open(out, card, kept) as writer:
        resumed: dict[str, Any] = {"committed": writer.committed(), "first_part": writer.parts, "first_rows": writer.rows}
        _written_behind(writer, capture_parts(model, tokenizer, texts, labels=labels, names=names, **options, **resumed))
        return writer.commit()


def _written_behind(writer: RunWriter, parts: Iterable[Part]) -> None:
    """Write each part in a second thread while the model works on the next.

    Two parts are in memory at most: a model that is faster than the disk waits. What a write raises is raised here, before
    the next one starts; where the capture stops first, the write under way is finished, so that no captured part is lost.
    """
    with ThreadPoolExecutor(1, "routerscope-writer") as thread:
        writing: Future[None] | None = None
        for part in parts:
            if writing is not None:
                writing.result()
            writing = thread.submit(writer.write, part)
        if writing is not None:
            writing.result()


def _limit(model: nn.Module, max_tokens: int | None) -> int:
    """Tokens a document may have: the limit set or the model's context, whichever is less."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return min(x for x in (max_tokens, getattr(config, "max_position_embeddings", None), 1 << 31) if x is not None)


def _documents(tokenizer: Any, texts: Iterable[str], labels: Iterable[str | None] | None, names: Iterable[str] | None,
               committed: Sequence[tuple[str, str | None, str]], limit: int, first: int = 0) -> Iterator[Document]:  # fmt: skip
    end: Any = object()
    given: list[Iterator[Any]] = [iter(texts), *(itertools.repeat(None) if x is None else iter(x) for x in (labels, names))]
    for index in itertools.count(first):
        text, label, name = (next(x, end) for x in given)
        if end in (text, *(v for v, x in ((label, labels), (name, names)) if x is not None)):
            if any(v is not end for v, x in ((text, texts), (label, labels), (name, names)) if x is not None):
                raise CaptureError("texts, labels and names differ in number: give one of each per document")
            if index < len(committed):
                raise CaptureError(
                    f"{index:,} texts were given, but this interrupted run has recorded {len(committed):,}: give the same texts, or delete the run"
                )
            return
        name = name or f"document {index + 1}"
        ids = encode(tokenizer, [text])[0]
        if index < len(committed):
            if committed[index] != (token_digest(ids), label, name):
                raise CaptureError(
                    f"{name} differs from what this interrupted run recorded in its place: give the same texts, or delete the run"
                )
            continue
        if not ids:
            raise CaptureError(f"{name} is empty: it has no tokens to route")
        if len(ids) > limit:
            raise PromptTooLong(f"{name} has {len(ids):,} tokens, the limit is {limit:,}: split it, nothing is cut off")
        yield Document(index, name, label, ids)


def _until(documents: Iterator[T], tokens: int, tokens_of: Callable[[T], int]) -> Iterator[T]:
    """Documents until ``tokens`` are reached; the one that reaches it belongs to this part."""
    seen = 0
    for document in documents:
        yield document
        seen += tokens_of(document)
        if seen >= tokens:
            return


def _batched(items: Iterable[Document], size: int) -> Iterator[tuple[Document, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
