"""Made-up parts and traces: numpy only, any shape, two streams, drops, many experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from analysis.stats import merge_statistics, part_statistics
from analysis.trace import (
    DOCUMENTS,
    TOKENS,
    LayerInfo,
    ModelCard,
    Part,
    PartsInMemory,
    SiteRouting,
    SiteScores,
    Trace,
    id_dtype,
    token_digest,
)


def site(index: int, n_experts: int = 8, top_k: int = 2, stream: str = "decoder", capacity: int | None = None,
         special: int = 0) -> LayerInfo:  # fmt: skip
    return LayerInfo(
        index, index, stream, f"{stream}.layers.{index}.mlp", n_experts, top_k, "softmax", stream, special, native_capacity=capacity
    )


PLAIN = (site(0), site(1))
MANY = (site(0, 300, 4), site(1, 300, 4))
SPECIAL = (site(0, 8, 3, special=4), site(1, 8, 1, special=1))
TWO_STREAMS = (site(0, 4, 1, "encoder", 5), site(1, 4, 1, "encoder", 5), site(2, 4, 1, "decoder", 5))


def card(layers: Sequence[LayerInfo], name: str = "made up") -> ModelCard:
    return ModelCard(name, "none", "None", len(layers), 8, 50, 1000, 500, "float32", tuple(layers), 512, "digest")


def make_part(layers: Sequence[LayerInfo], lengths: Sequence[int], seed: int = 0, index: int = 0, first_document: int = 0,
              first_row: int = 0, labels: Sequence[str | None] = ("a", "b"), texts: Sequence[str] | None = None,
              names: Sequence[str] | None = None, n_ids: int = 50) -> Part:  # fmt: skip
    """A part of random routing over ``n_ids`` token ids; every document has the same length in each stream."""
    rng = np.random.default_rng([seed, index])
    streams = [s for s in ("encoder", "decoder") if any(x.stream == s for x in layers)]
    tokens, documents = [], []
    total = sum(lengths)
    for stream in streams:
        ids = rng.integers(0, n_ids, total).astype(np.int32)
        shown = [f"t{i}" if texts is None else texts[i % len(texts)] for i in ids]
        number = np.repeat(np.arange(len(lengths)) + first_document, lengths)
        loss = rng.random(total).astype(np.float32)
        loss[np.cumsum(lengths) - 1] = np.nan
        label = [labels[d % len(labels)] for d in number]
        columns = {
            "stack": pa.array([stream] * total), "document": pa.array(number.astype(np.int32)),
            "position": pa.array(np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)), "token_id": pa.array(ids),
            "token": pa.array(shown), "token_bytes": pa.array([n.encode("utf-8", "surrogatepass") for n in shown], pa.binary()),
            "label": pa.array(label, pa.string()), "loss": pa.array(loss, from_pandas=True), "phase": pa.array(["prefill"] * total),
        }  # fmt: skip
        tokens.append(pa.table({n: c.cast(TOKENS.field(n).type) for n, c in columns.items()}, schema=TOKENS))
        row = first_row
        for d, n in enumerate(lengths):
            mine = ids[row - first_row : row - first_row + n].tolist()
            name = names[d % len(names)] if names else f"doc {first_document + d}"
            documents.append((first_document + d, stream, name, labels[(first_document + d) % len(labels)], row, n,
                              token_digest(mine)))  # fmt: skip
            row += n
    routing, scores, sums = [], [], []
    for layer in layers:
        order = rng.random((total, layer.n_classes)).argsort(1)[:, : layer.top_k].astype(id_dtype(layer.n_classes))
        weights = rng.random((total, layer.top_k)).astype(np.float32)
        executed = order
        if layer.native_capacity is not None:
            executed = np.where(rng.random(order.shape) < 0.2, -1, order).astype(order.dtype)
            weights = np.where(executed < 0, 0, weights)
        routing.append(SiteRouting(executed, weights, order if layer.native_capacity is not None else executed))
        columns3 = [rng.random(total).astype(np.float32) for _ in range(3)]
        scores.append(SiteScores(*columns3))
        sums.append(rng.random(layer.n_classes))
    table = pa.table(dict(zip(DOCUMENTS.names, zip(*documents, strict=True), strict=True)), schema=DOCUMENTS)
    return Part(index, pa.concat_tables(tokens), table, tuple(routing), tuple(scores), tuple(sums), {s: first_row for s in streams})


def make_parts(layers: Sequence[LayerInfo], n: int = 3, seed: int = 0) -> list[Part]:
    """Consecutive parts of three documents each."""
    parts, row = [], 0
    for i in range(n):
        lengths = [5 + i, 3, 9]
        parts.append(make_part(layers, lengths, seed, i, 3 * i, row))
        row += sum(lengths)
    return parts


def make_trace(layers: Sequence[LayerInfo] = PLAIN, parts: Sequence[Part] | None = None, name: str = "made-up") -> Trace:
    """A trace in memory."""
    parts = make_parts(layers) if parts is None else parts
    stats = merge_statistics([part_statistics(p, layers) for p in parts])
    tokens = pa.concat_tables([p.tokens for p in parts]).unify_dictionaries()
    documents = pa.concat_tables([p.documents for p in parts])
    return Trace(card(layers), documents, stats, PartsInMemory(parts, len(layers)), lambda: tokens, {}, name)


def differences(a: Trace, b: Trace) -> list[str]:
    """What differs between two traces; empty where they are equal in every recorded value."""
    out = [] if a.layers == b.layers else ["layers"]
    out += [] if a.documents.equals(b.documents) else ["documents"]
    for column in TOKENS.names:
        mine, other = (t.tokens[column].to_pylist() if t.tokens is not None else [] for t in (a, b))
        if repr(mine) != repr(other):
            out.append(f"tokens.{column}")
    for layer in a.layers:
        x, y = a.routing(layer.index), b.routing(layer.index)
        p, q = a.scores(layer.index), b.scores(layer.index)
        for what, u, v in (("experts", x.experts, y.experts), ("weights", x.weights, y.weights), ("chosen", x.chosen, y.chosen),
                           ("entropy", p.entropy, q.entropy), ("margin", p.margin, q.margin)):  # fmt: skip
            if not np.array_equal(u, v, equal_nan=u.dtype.kind == "f"):
                out.append(f"{layer.name}.{what}")
    for what in ("core", "by_token", "by_document"):
        mine, other = getattr(a.stats, what), getattr(b.stats, what)
        columns = [c for c in mine.column_names if c != "sum"]
        if not mine.select(columns).combine_chunks().equals(other.select(columns).combine_chunks()):
            out.append(f"stats.{what}")
    return out
