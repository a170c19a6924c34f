"""What was recorded of some documents, assembled into a Part: arrays in, Arrow tables out. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .memory import join_routing, join_scores
from .tokens import Pieces
from .trace import DOCUMENTS, TOKENS, LayerInfo, Part, SiteRouting, SiteScores, token_digest

UNKNOWN = -1  # where the model predicted nothing


@dataclass(frozen=True)
class Document:
    """A text as it goes through the model: its number in the run and its token ids."""

    index: int
    name: str
    label: str | None
    ids: list[int]


@dataclass(frozen=True)
class Fed:
    """The tokens of a document that one stream of the model was given, the first ``n_prefill`` of them as text."""

    document: Document
    ids: Sequence[int]
    n_prefill: int


@dataclass(frozen=True)
class Piece:
    """Some documents of one stream as recorded, one after the other.

    loss float32 [n], NaN for none; predicted int32 [n], UNKNOWN for none. Per site routing, scores and sums of probabilities, float64
    [m, classes] in the order in which they are added; None at sites of another stream, and sums where scores are unknown.
    """

    stream: str
    fed: tuple[Fed, ...]
    loss: np.ndarray
    predicted: np.ndarray
    routing: tuple[SiteRouting | None, ...]
    scores: tuple[SiteScores | None, ...]
    sums: tuple[np.ndarray | None, ...]

    @property
    def tokens(self) -> int:
        """Rows of the piece."""
        return sum(len(f.ids) for f in self.fed)


def assembled(index: int, pieces: Sequence[Piece], layers: Sequence[LayerInfo], texts: Pieces, rows: dict[str, int]) -> Part:
    """Part ``index``: token rows by stream, arrays of each site joined in document order. ``rows``: how many each stream has before it."""
    streams = [s for s in ("encoder", "decoder") if any(p.stream == s for p in pieces)]
    tokens, documents = [], []
    for stream in streams:
        mine = [p for p in pieces if p.stream == stream]
        tokens.append(_token_rows(stream, mine, texts))
        at = rows.get(stream, 0)
        for fed in (f for p in mine for f in p.fed):
            d = fed.document
            documents.append((d.index, stream, d.name, d.label, at, len(fed.ids), token_digest(d.ids)))
            at += len(fed.ids)
    routing, scores, sums = [], [], []
    for s, layer in enumerate(layers):
        mine = [p for p in pieces if p.stream == layer.stream]
        routing.append(join_routing([r for p in mine if (r := p.routing[s]) is not None]))
        scores.append(join_scores([x for p in mine if (x := p.scores[s]) is not None]))
        sums.append(sum((row for p in mine if (v := p.sums[s]) is not None for row in v), np.zeros(layer.n_classes)))
    table = pa.table(dict(zip(DOCUMENTS.names, zip(*documents, strict=True), strict=True)), schema=DOCUMENTS)
    first = {s: rows.get(s, 0) for s in streams}
    return Part(index, pa.concat_tables(tokens), table, tuple(routing), tuple(scores), tuple(sums), first)


def _token_rows(stream: str, pieces: Sequence[Piece], texts: Pieces) -> pa.Table:
    fed = [f for p in pieces for f in p.fed]
    lengths = [len(f.ids) for f in fed]
    ids = np.concatenate([np.array(f.ids, np.int32) for f in fed])
    text, raw = texts.columns(ids)
    loss, predicted = (np.concatenate([getattr(p, c) for p in pieces]) for c in ("loss", "predicted"))
    phase = np.concatenate([np.arange(len(f.ids)) >= f.n_prefill for f in fed])
    columns: dict[str, Any] = {
        "stack": pa.array([stream] * len(ids)),
        "document": np.repeat([f.document.index for f in fed], lengths),
        "position": np.concatenate([np.arange(n) for n in lengths]),
        "token_id": ids,
        "token": text,
        "token_bytes": raw,
        "label": pa.array(np.repeat(np.array([f.document.label for f in fed], object), lengths), pa.string()),
        "loss": pa.array(loss, from_pandas=True),
        "phase": pa.array(np.where(phase, "decode", "prefill")),
        "predicted": pa.array(predicted, mask=predicted == UNKNOWN),
    }
    return pa.table({n: pa.array(c).cast(TOKENS.field(n).type) if not isinstance(c, pa.Array) else c.cast(TOKENS.field(n).type)
                     for n, c in columns.items()}, schema=TOKENS)  # fmt: skip
