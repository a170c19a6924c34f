"""Made-up parts and traces: numpy only, any shape, two streams, drops, many experts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from analysis.counting import compiled
from analysis.layout import part_tokens as default_part_tokens
from analysis.memory import PartsInMemory
from analysis.stats import merge_statistics, part_statistics
from analysis.trace import (
    DOCUMENTS,
    TOKENS,
    LayerInfo,
    ModelCard,
    Part,
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
              names: Sequence[str] | None = None, n_ids: int = 50, token_ids: np.ndarray | None = None) -> Part:  # fmt: skip
    """A part of random routing over ``n_ids`` token ids, or ``token_ids``; every document has the same length in each stream."""
    rng = np.random.default_rng([seed, index])
    streams = [s for s in ("encoder", "decoder") if any(x.stream == s for x in layers)]
    tokens, documents = [], []
    total = sum(lengths)
    for stream in streams:
        ids = rng.integers(0, n_ids, total).astype(np.int32) if token_ids is None else token_ids
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
            "predicted": pa.array(np.roll(ids, -3), mask=rng.random(total) < 0.1),
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


LABELS = ("prose", "news", "code", "mathematics", "dialogue", "law", "medicine", "poetry")
VOCABULARY = 50_000
TEXTS = tuple((f" word{i}", f"part{i}", f" name{i}", f"{i}", "," * (1 + i % 7))[i % 5] for i in range(VOCABULARY))


def zipf_parts(layers: Sequence[LayerInfo], tokens: int, seed: int = 0, part_tokens: int | None = None) -> Iterator[Part]:
    """Parts of ``tokens`` tokens in all that look like text: what benches run on. The number of experts must be a power of two.

    Documents of LABELS in turn, of log-normal length (median 400, 16 to 4,096; the second of each part has 1,000, the last is cut).
    Token ids follow Zipf(1.05) over VOCABULARY, each label with an order of its own for half of its tokens. At each site a
    token id has 3k candidates, of which k are drawn without return, the first ones most often; slots by falling weight,
    weights exact in bfloat16.
    """
    part_tokens = part_tokens or default_part_tokens(layers)
    order = np.random.default_rng([seed, 2]).permuted(np.tile(np.arange(VOCABULARY, dtype=np.int32), (len(LABELS), 1)), axis=1)
    share = 1 / np.arange(1, VOCABULARY + 1) ** 1.05
    edges = np.cumsum(share / share.sum())
    first_document = 0
    for index, first in enumerate(range(0, tokens, part_tokens)):
        part = _zipf_part(layers, order, edges, [seed, index], min(part_tokens, tokens - first), first_document, first)
        first_document += len(part.documents)
        yield part
        del part  # before the next is made


def _zipf_part(layers: Sequence[LayerInfo], order: np.ndarray, edges: np.ndarray, seed: Sequence[int], n: int, first_document: int,
               first_row: int) -> Part:  # fmt: skip
    rng = np.random.default_rng(seed)
    lengths = np.append([137, 1_000], np.clip(np.exp(rng.normal(np.log(400), 0.9, n // 16)), 16, 4_096).astype(int))
    lengths = np.diff(np.unique(np.minimum(np.append(0, np.cumsum(lengths)), n)))
    label = (first_document + np.repeat(np.arange(len(lengths)), lengths)) % len(LABELS)
    ids = np.minimum(np.searchsorted(edges, rng.random(n)), VOCABULARY - 1).astype(np.int32)
    ids = np.where(rng.random(n) < 0.5, order[label, ids], ids)
    blank = make_part((site(0, 1, 1),), lengths.tolist(), *seed, first_document, first_row, LABELS, TEXTS, token_ids=ids)
    routing = tuple(_drawn(x, ids, [*seed, x.index]) for x in layers)
    sums = tuple(np.bincount(r.experts.ravel(), r.weights.ravel(), x.n_classes) for r, x in zip(routing, layers, strict=True))
    return replace(blank, routing=routing, scores=tuple(_scores_of(r) for r in routing), probability_sums=sums)


def _drawn(layer: LayerInfo, ids: np.ndarray, seed: Sequence[int]) -> SiteRouting:
    table = np.random.default_rng([layer.index, 1])  # the same in every part
    start = table.integers(0, layer.n_experts, VOCABULARY)
    step = 2 * table.integers(0, layer.n_experts // 2, VOCABULARY) + 1  # odd: the candidates are distinct
    experts, weights = np.empty((len(ids), layer.top_k), np.int16), np.empty((len(ids), layer.top_k), np.float32)
    wide = min(3 * layer.top_k, layer.n_experts)
    _race(ids, start, step, layer.n_experts, wide, np.random.default_rng(seed).integers(2**31), experts, weights)
    weights = (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return SiteRouting(experts, weights, experts)


@compiled
def _race(ids: np.ndarray, start: np.ndarray, step: np.ndarray, n_experts: int, wide: int, seed: int, experts: np.ndarray,
          weights: np.ndarray) -> None:  # fmt: skip
    """The k candidates that arrive first, at exponential times of rate exp(-0.3 j); weights are shares of 1 / time."""
    np.random.seed(seed)
    k = experts.shape[1]
    times = np.empty(k)
    for t in range(ids.shape[0]):
        times[:] = np.inf
        for j in range(wide):
            time = -np.log(1 - np.random.random()) * np.exp(0.3 * j) + 1e-12
            at = k
            while at > 0 and time < times[at - 1]:
                at -= 1
            if at < k:
                for i in range(k - 1, at, -1):
                    times[i], experts[t, i] = times[i - 1], experts[t, i - 1]
                times[at], experts[t, at] = time, (start[ids[t]] + j * step[ids[t]]) % n_experts
        total = (1 / times).sum()
        for i in range(k):
            weights[t, i] = 1 / times[i] / total


def _scores_of(routing: SiteRouting) -> SiteScores:
    w = np.maximum(routing.weights, 1e-6)
    return SiteScores(-(w * np.log(w)).sum(1), w[:, -2] - w[:, -1] if w.shape[1] > 1 else w[:, 0], -np.log(w[:, 0]))


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
            if (u is None) != (v is None) or (u is not None and not np.array_equal(u, v, equal_nan=u.dtype.kind == "f")):
                out.append(f"{layer.name}.{what}")
    for what in ("core", "by_token", "by_document"):
        mine, other = getattr(a.stats, what), getattr(b.stats, what)
        columns = [c for c in mine.column_names if c != "sum"]
        if not mine.select(columns).combine_chunks().equals(other.select(columns).combine_chunks()):
            out.append(f"stats.{what}")
    return out


def weighted_trace(k: int, n: int = 4000, seed: int = 0) -> Trace:
    """Experts drawn without return at fixed odds from 1 to 8: uneven loads, no partnership, no memory."""
    layers = (site(0, 8, k), site(1, 8, k))
    part = make_part(layers, [n // 4] * 4, seed)
    rng = np.random.default_rng(seed)
    routing = []
    for old in part.routing:
        sets = []
        while len(sets) < n:  # draws with return, kept where all differ: odds of a set are the product of its experts' odds
            drawn = rng.choice(8, (4 * n, k), p=np.arange(1, 9) / 36)
            ordered = np.sort(drawn, 1)
            sets += drawn[(ordered[:, 1:] != ordered[:, :-1]).all(1)].tolist()
        experts = np.array(sets[:n], np.int16)
        routing.append(SiteRouting(experts, old.weights, experts))
    return make_trace(layers, [replace(part, routing=tuple(routing))])


def change_byte(path: Path, name: str) -> None:
    """Flip a bit of an array in an .npz file."""
    with zipfile.ZipFile(path) as file:
        at = file.getinfo(f"{name}.npy").header_offset + 300
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))
