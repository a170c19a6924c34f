"""Run a model over documents and record every routing decision: hooks -> Parts -> Trace.

The hooks are in recorder.py; here documents become batches, and what was recorded becomes tables.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import model_card
from .places import Place
from .recorder import CaptureCancelled, CaptureError, Recorder, recording
from .rounding import WEIGHTS, rounded
from .routers import Routed, RouterError, Site, find_sites, router_scores
from .stats import merge_statistics, part_statistics
from .tokens import Pieces, encode
from .trace import (
    DOCUMENTS,
    TOKENS,
    LayerInfo,
    Part,
    PartsInMemory,
    SiteRouting,
    SiteScores,
    Trace,
    check_part,
    id_dtype,
    join_routing,
    join_scores,
    token_digest,
)  # fmt: skip
from .writing import RunWriter

PART_TOKENS = 65_536
UNKNOWN = -1  # where the model predicted nothing


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
class PlannedPart:
    """A part before it is captured: its documents as (digest, label, name), and per stream its first row and number of rows."""

    index: int
    first_document: int
    documents: tuple[tuple[str, str | None, str], ...]
    first_rows: dict[str, int]
    rows: dict[str, int]


@dataclass(frozen=True)
class _Document:
    index: int
    name: str
    label: str | None
    ids: list[int]


@dataclass(frozen=True)
class _Piece:
    """One document of one stream as recorded: ids and per-token columns (``predicted`` int32, UNKNOWN for none); per site routing, scores,
    sums of probabilities.
    """

    document: _Document
    stream: str
    ids: np.ndarray
    loss: np.ndarray
    predicted: np.ndarray
    n_prefill: int
    routing: tuple[SiteRouting | None, ...]
    scores: tuple[SiteScores | None, ...]
    sums: tuple[np.ndarray | None, ...]


def capture_parts(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    labels: Iterable[str | None] | None = None,
    names: Iterable[str] | None = None,
    batch_size: int = 8,
    part_tokens: int = PART_TOKENS,
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
    """Yield Parts of about ``part_tokens`` tokens; memory does not grow with the corpus.

    Documents keep their order and are never split. ``texts`` may be a generator. ``new_tokens`` continues each
    document greedily with a KV cache; the last generated token is never fed back, so it has no routing and no row.
    A model whose routing mixes the tokens of a forward (Doge) reads one document at a time whatever ``batch_size``.
    Encoder-decoder models read the text in the encoder; their decoder runs on its start token alone.
    Batches never straddle parts, so a resumed capture runs exactly the batches of an uninterrupted one. ``committed``
    holds (digest, label, name) of the documents already recorded, which are compared and passed over. ``first_document``,
    ``first_part`` and ``first_rows`` are the numbers that the first text, its part and its rows get.
    ``pieces_of`` is Pieces.of(tokenizer) where it is at hand: a tokenizer of 150,000 pieces takes 0.2 s to read.
    ``weights`` "8-bit" rounds gate weights before anything is counted, so that all figures of a run follow from what it holds (rounding.py).
    Raises PromptTooLong, CaptureCancelled, CaptureError, RouterError, TraceError.
    """
    if weights not in WEIGHTS:
        raise CaptureError(f"no way {weights!r} to keep gate weights: there are {' and '.join(WEIGHTS)}")
    sites = find_sites(model)
    batch_size = 1 if any(s.kind.mixes for s in sites) else batch_size
    total = len(texts) if isinstance(texts, Sequence) else None
    documents = _documents(tokenizer, texts, labels, names, committed, _limit(model, max_tokens) - new_tokens, first_document)
    pieces_of, rows, began = pieces_of or Pieces.of(tokenizer), dict(first_rows or {}), time.monotonic()
    done = Progress(len(committed), total, 0, 0.0)
    for index in itertools.count(first_part):
        pieces: list[_Piece] = []
        tokens = 0
        chunk = _until(documents, part_tokens)
        for batch in _batched(chunk, batch_size):
            if cancelled is not None and cancelled():
                raise CaptureCancelled("capture cancelled")
            with recording(model, sites, cancelled) as recorder, torch.inference_mode():
                run = _generate if new_tokens else _forward
                pieces += run(model, recorder, batch, new_tokens, probabilities)
            tokens = sum(len(d.ids) for d in batch)
            done = Progress(done.documents + len(batch), total, done.tokens + tokens, time.monotonic() - began)
            if progress is not None:
                progress(done)
        if not pieces:
            return
        part = _part(index, pieces, sites, pieces_of, rows)
        if weights != "exact":
            routing = tuple(replace(r, weights=rounded(r.weights)) for r in part.routing)
            part = replace(part, routing=routing, weights=weights)
        check_part(part, [s.info for s in sites])
        for stream in {p.stream for p in pieces}:
            rows[stream] = rows.get(stream, 0) + sum(len(p.ids) for p in pieces if p.stream == stream)
        yield part


def plan_parts(model: Any, tokenizer: Any, texts: Iterable[str], *, labels: Iterable[str | None] | None = None,
               names: Iterable[str] | None = None, part_tokens: int = PART_TOKENS, max_tokens: int | None = None) -> list[PlannedPart]:  # fmt: skip
    """The parts that ``capture_parts`` will yield for the same arguments, without a forward; not for ``new_tokens``.

    Raises PromptTooLong, CaptureError, as capturing would.
    """
    documents = _documents(tokenizer, texts, labels, names, (), _limit(model, max_tokens))
    plan: list[PlannedPart] = []
    rows: dict[str, int] = {}
    while chunk := list(_until(documents, part_tokens)):
        n = sum(len(d.ids) for d in chunk)
        mine = {"encoder": n, "decoder": len(chunk)} if model.config.is_encoder_decoder else {"decoder": n}
        known = tuple((token_digest(d.ids), d.label, d.name) for d in chunk)
        plan.append(PlannedPart(len(plan), chunk[0].index, known, {s: rows.get(s, 0) for s in mine}, mine))
        rows = {s: rows.get(s, 0) + mine[s] for s in mine}
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
               committed: Sequence[tuple[str, str | None, str]], limit: int, first: int = 0) -> Iterator[_Document]:  # fmt: skip
    end: Any = object()
    given: list[Iterator[Any]] = [iter(texts), *(itertools.repeat(None) if x is None else iter(x) for x in (labels, names))]
    for index in itertools.count(first):
        text, label, name = (next(x, end) for x in given)
        if end in (text, *(v for v, x in ((label, labels), (name, names)) if x is not None)):
            if any(v is not end for v, x in ((text, texts), (label, labels), (name, names)) if x is not None):
                raise CaptureError("texts, labels and names differ in number: give one of each per document")
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
        yield _Document(index, name, label, ids)


def _until(documents: Iterator[_Document], tokens: int) -> Iterator[_Document]:
    """Documents until ``tokens`` are reached; the one that reaches it belongs to this part."""
    seen = 0
    for document in documents:
        yield document
        seen += len(document.ids)
        if seen >= tokens:
            return


def _batched(items: Iterable[_Document], size: int) -> Iterator[tuple[_Document, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _forward(model: Any, recorder: Recorder, batch: Sequence[_Document], _: int, probabilities: bool) -> list[_Piece]:
    """One padded forward. Padding goes right, where neither attention nor a native capacity lets it touch real tokens."""
    longest = max(len(d.ids) for d in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(batch):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        mask[row, : len(document.ids)] = 1
    device = _device(model)
    given: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    two_streams = bool(model.config.is_encoder_decoder)
    start: list[int] = []
    if two_streams:
        start = [model.config.decoder_start_token_id or 0]
        given["decoder_input_ids"] = torch.full((len(batch), 1), start[0], device=device)
    logits = _next_token_logits(model, model(**given, use_cache=False))
    routed = [forwards[0] for forwards in recorder.take(1)]
    _check_rows(recorder.sites, routed, {"decoder": len(batch) if two_streams else ids.numel(), "encoder": ids.numel()})
    pieces = []
    for row, document in enumerate(batch):
        for stream in ("encoder", "decoder") if two_streams else ("decoder",):
            tokens = start if stream == "decoder" and two_streams else document.ids
            width = 1 if stream == "decoder" and two_streams else longest
            loss, predicted = np.full(len(tokens), np.nan, np.float32), np.full(len(tokens), UNKNOWN, np.int32)
            if logits is not None and stream == "decoder":
                predicted[:] = logits[row, : len(tokens)].argmax(-1).cpu().numpy()
            if logits is not None and not two_streams and len(tokens) > 1:
                target = ids[row, 1 : len(tokens)].to(logits.device)
                loss[:-1] = F.cross_entropy(logits[row, : len(tokens) - 1].float(), target, reduction="none").cpu().numpy()
            wanted = slice(row * width, row * width + len(tokens))
            columns = loss, predicted
            pieces.append(_piece(document, stream, tokens, columns, len(tokens), recorder.sites, routed, wanted, probabilities))
    return pieces


def _device(model: Any) -> Any:
    """Where inputs belong; a model offloaded whole is on the meta device but runs elsewhere."""
    if model.device.type != "meta":
        return model.device
    return getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu"


def _next_token_logits(model: Any, output: Any) -> Tensor | None:
    """Logits over the vocabulary [B, T, V]; None for a model without language head, whose tokens have no loss."""
    return output.logits if model.get_output_embeddings() is not None else None


def _check_rows(sites: Sequence[Site], routed: Sequence[Routed], tokens: dict[str, int]) -> None:
    for site, one in zip(sites, routed, strict=True):
        if len(one.ids) != tokens[site.info.stream]:
            raise CaptureError(f"{site.info.name} routed {len(one.ids)} of {tokens[site.info.stream]} tokens: which ones cannot be told")


def _generate(model: Any, recorder: Recorder, batch: Sequence[_Document], new: int, probabilities: bool) -> list[_Piece]:
    """Greedy continuation, one document at a time: the first forward is the prefill, each later one a decode step."""
    if model.config.is_encoder_decoder:
        raise CaptureError("generation is recorded for decoder-only models; capture without new tokens")
    pieces = []
    for document in batch:
        ids = torch.tensor([document.ids], device=_device(model))
        with _last_predictions(model) as last:
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, num_beams=1)
        taken = recorder.take(None)
        routed = [_joined(forwards) for forwards in taken]
        fed = made[0, : routed[0].ids.shape[0]].tolist()
        _check_rows(recorder.sites, routed, {"decoder": len(fed)})
        if fed[: len(document.ids)] != document.ids or len(fed) != made.shape[1] - 1:
            raise CaptureError(f"{document.name}: generation fed {len(fed)} tokens of {made.shape[1]}; use plain greedy search")
        columns = np.full(len(fed), np.nan, np.float32), np.full(len(fed), UNKNOWN, np.int32)
        columns[1][len(fed) - len(last) :] = [int(i) for i in last]
        pieces.append(_piece(document, "decoder", fed, columns, len(document.ids), recorder.sites, routed,
                             slice(0, len(fed)), probabilities))  # fmt: skip
    return pieces


@contextmanager
def _last_predictions(model: Any) -> Iterator[list[Tensor]]:
    """Collects the id of the largest logit at the last position of every forward that this thread runs; [] without language head.

    generate computes no logits before the prompt's last token, and what it picks may be bent by the model's generation settings.
    """
    found: list[Tensor] = []
    mine, head = threading.get_ident(), model.get_output_embeddings() is not None

    def keep(_module: Any, _given: Any, output: Any) -> None:
        if head and threading.get_ident() == mine:
            found.append(output.logits[0, -1].argmax())

    hook = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _joined(forwards: Sequence[Routed]) -> Routed:
    ids = torch.cat([r.ids for r in forwards])
    same = all(r.chosen is r.ids for r in forwards)
    logits = [r.logits for r in forwards if r.logits is not None]
    return Routed(
        ids,
        torch.cat([r.weights for r in forwards]),
        ids if same else torch.cat([r.chosen for r in forwards]),
        torch.cat([x.flatten(0, -2) for x in logits]) if len(logits) == len(forwards) else None,
    )


def _piece(document: _Document, stream: str, ids: Sequence[int], columns: tuple[np.ndarray, np.ndarray], n_prefill: int, sites: Sequence[Site],
           routed: Sequence[Routed], rows: slice, probabilities: bool) -> _Piece:  # fmt: skip
    """Tables of one document; ``columns`` are loss and predicted. Probabilities are summed at once and kept only if asked for: they are wide."""
    routing: list[SiteRouting | None] = []
    scores: list[SiteScores | None] = []
    sums: list[np.ndarray | None] = []
    for site, whole in zip(sites, routed, strict=True):
        mine = site.info.stream == stream
        routing.append(_routing(site.info, whole, rows) if mine else None)
        scored = _scores(site.info, whole, rows) if mine else None
        shares = None if scored is None else scored.probabilities
        sums.append(None if shares is None else shares.sum(0, dtype=np.float64))
        scores.append(scored if scored is None or probabilities else replace(scored, probabilities=None))
    return _Piece(document, stream, np.array(ids, np.int32), *columns, n_prefill, tuple(routing), tuple(scores), tuple(sums))


def _routing(info: LayerInfo, routed: Routed, rows: slice) -> SiteRouting:
    dtype = id_dtype(info.n_classes)
    ids = routed.ids[rows].cpu().numpy().astype(dtype)
    if ids.shape[1] != info.top_k:
        raise RouterError(f"{info.name} routed each token to {ids.shape[1]} experts, its configuration says {info.top_k}")
    weights = routed.weights[rows].float().cpu().numpy()
    chosen = ids if routed.chosen is routed.ids else routed.chosen[rows].cpu().numpy().astype(dtype)
    return SiteRouting(ids, weights, ids if chosen is not ids and np.array_equal(ids, chosen) else chosen)


def _scores(info: LayerInfo, routed: Routed, rows: slice) -> SiteScores:
    """Entropy, margin and logsumexp from the router's logits; NaN where its scores are not known."""
    n = len(range(*rows.indices(routed.ids.shape[0])))
    if routed.logits is None:
        unknown = np.full(n, np.nan, np.float32)
        return SiteScores(unknown, unknown, unknown, None)
    logits = routed.logits.flatten(0, -2)[rows]
    shares, selection, volume = router_scores(info, logits)
    entropy = torch.special.entr(shares).sum(-1)
    margin = torch.full_like(entropy, torch.nan)
    if selection is not None and info.top_k < selection.shape[1]:
        taken = torch.zeros_like(selection, dtype=torch.bool).scatter_(1, routed.chosen[rows].to(torch.long), True)
        last = selection.masked_fill(~taken, torch.inf).amin(-1)
        margin = last - selection.masked_fill(taken, -torch.inf).amax(-1)
    first, second, third = (x.cpu().numpy().astype(np.float32) for x in (entropy, margin, volume))
    return SiteScores(first, second, third, shares.cpu().numpy())


def _part(index: int, pieces: Sequence[_Piece], sites: Sequence[Site], texts: Pieces, rows: dict[str, int]) -> Part:
    """Assemble a Part: token rows by stream, arrays of each site joined in document order."""
    streams = [s for s in ("encoder", "decoder") if any(p.stream == s for p in pieces)]
    tokens, documents = [], []
    for stream in streams:
        mine = [p for p in pieces if p.stream == stream]
        tokens.append(_token_rows(stream, mine, texts))
        at = rows.get(stream, 0)
        for piece in mine:
            d = piece.document
            documents.append((d.index, stream, d.name, d.label, at, len(piece.ids), token_digest(d.ids)))
            at += len(piece.ids)
    routing, scores, sums = [], [], []
    for s, site in enumerate(sites):
        mine = [p for p in pieces if p.stream == site.info.stream]
        routing.append(join_routing([r for p in mine if (r := p.routing[s]) is not None]))
        scores.append(join_scores([x for p in mine if (x := p.scores[s]) is not None]))
        sums.append(sum((v for p in mine if (v := p.sums[s]) is not None), np.zeros(site.info.n_classes)))
    table = pa.table(dict(zip(DOCUMENTS.names, zip(*documents, strict=True), strict=True)), schema=DOCUMENTS)
    first = {s: rows.get(s, 0) for s in streams}
    return Part(index, pa.concat_tables(tokens), table, tuple(routing), tuple(scores), tuple(sums), first)


def _token_rows(stream: str, pieces: Sequence[_Piece], texts: Pieces) -> pa.Table:
    lengths = [len(p.ids) for p in pieces]
    ids = np.concatenate([p.ids for p in pieces])
    text, raw = texts.columns(ids)
    loss, predicted = (np.concatenate([getattr(p, c) for p in pieces]) for c in ("loss", "predicted"))
    phase = np.concatenate([np.arange(len(p.ids)) >= p.n_prefill for p in pieces])
    columns = {
        "stack": pa.array([stream] * len(ids)),
        "document": np.repeat([p.document.index for p in pieces], lengths),
        "position": np.concatenate([np.arange(n) for n in lengths]),
        "token_id": ids,
        "token": text,
        "token_bytes": raw,
        "label": pa.array(np.repeat(np.array([p.document.label for p in pieces], object), lengths), pa.string()),
        "loss": pa.array(loss, from_pandas=True),
        "phase": pa.array(np.where(phase, "decode", "prefill")),
        "predicted": pa.array(predicted, mask=predicted == UNKNOWN),
    }
    return pa.table({n: pa.array(c).cast(TOKENS.field(n).type) if not isinstance(c, pa.Array) else c.cast(TOKENS.field(n).type)
                     for n, c in columns.items()}, schema=TOKENS)  # fmt: skip
