"""Bytes per decision of a stored run's files, of the formats others use for the same decisions, and of the entropy bound."""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from analysis.layout import write_routing
from analysis.places import Place
from analysis.rounding import rounded
from analysis.store import open_run, read_manifest
from analysis.trace import Trace
from analysis.verifying import stored_part

SAMPLE = 200  # tokens written as JSON lines, where all would take minutes


def sizes_table(folder: Path) -> str:
    """Markdown: our files over the whole run, the rest over its first part."""
    trace = open_run(folder)
    layers = trace.layers
    n = min(trace.n_tokens("decoder"), 65_536)
    read = [trace.routing(x.index, 0, n) for x in layers]
    ids = np.stack([r.experts for r in read], 1)  # [tokens, sites, k]
    weights = np.stack([r.weights for r in read], 1)
    rows = [
        *_own(folder, trace),
        *_kept(folder, trace, "8-bit"),
        *_kept(folder, trace, "none"),
        *_others(ids, weights, layers[0].n_classes),
    ]
    tokens = trace.stream_tokens("decoder")["token_id"].to_numpy()[:n]
    bound = _id_bits(ids, tokens, layers[0].n_classes), _weight_bits(weights)
    rows += [("entropy bound", "ids, given the token id", bound[0] / 8), ("entropy bound", "ids and bfloat16 weights", sum(bound) / 8)]
    lines = ["| file | holds | bytes per decision |", "|---|---|---|", *(f"| {a} | {b} | {c:.3f} |" for a, b, c in rows), ""]
    ratio = [next(c for a, b, c in rows if a == "ours: routing" and b == what) / bound for what, bound in (
        ("ids", bound[0] / 8), ("ids and weights", sum(bound) / 8))]  # fmt: skip
    return "\n".join([*lines, f"Ours over the bound: {ratio[0]:.2f} for ids, {ratio[1]:.2f} for ids and weights."])


def _own(folder: Path, trace: Trace) -> list[tuple[str, str, float]]:
    decisions = sum(trace.stats.n_tokens(x.index) * x.top_k for x in trace.layers)

    def size(pattern: str) -> float:
        return sum(p.stat().st_size for p in folder.glob(pattern)) / decisions

    ids, weights = (n / decisions for n in _columns(folder.glob("routing/*.parquet")))
    return [("ours: routing", "ids", ids), ("ours: routing", "ids and weights", ids + weights),
            ("ours: routing", "whole files: with row, site, document, footers, checksums", size("routing/*")),
            ("ours: scores", "entropy, margin, logsumexp (float32)", size("scores/*")), ("ours: tokens, documents", "text, ids, labels, loss",
             size("tokens/*") + size("documents.parquet")), ("ours: statistics", "all counts", size("*stats.parquet"))]  # fmt: skip


def _columns(paths: Iterable[Path]) -> tuple[int, int]:
    """Bytes of ids and of weights in files of decisions."""
    found = {"e": 0, "w": 0}
    for footer in map(pq.read_metadata, paths):
        for g in range(footer.num_row_groups):
            for c in range(footer.num_columns):
                column = footer.row_group(g).column(c)
                kind, number = column.path_in_schema[0], column.path_in_schema[1:]
                if kind in found and number.isdigit():
                    found[kind] += column.total_compressed_size
    return found["e"], found["w"]


def _kept(folder: Path, trace: Trace, weights: str) -> list[tuple[str, str, float]]:
    """The first part written again as capture(..., weights=weights) does."""
    part = replace(stored_part(Place.of(folder), trace, read_manifest(folder)["parts"][0]), weights=weights)
    if weights == "8-bit":
        part = replace(part, routing=tuple(replace(r, weights=rounded(r.weights)) for r in part.routing))
    decisions = sum(r.experts.size for r in part.routing)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "routing.parquet"
        write_routing(part, trace.layers, path)
        (ids, weights_size), whole = _columns([path]), path.stat().st_size
    name, holds = (
        ("ours: routing, 8-bit weights", "ids and weights") if weights_size else ("ours: routing, no weights", "ids by falling weight")
    )
    return [(name, holds, (ids + weights_size) / decisions),
            (name, "whole file: with row, site, document, footers, checksums", whole / decisions)]  # fmt: skip


def _others(ids: np.ndarray, weights: np.ndarray, classes: int) -> list[tuple[str, str, float]]:
    narrow = ids.astype(np.uint8 if classes <= 256 else np.uint16)

    def written(save: object, *arrays: object) -> float:
        file = io.BytesIO()
        save(*((file, *arrays) if save is not torch.save else (*arrays, file)))  # type: ignore[operator]
        return file.tell() / ids.size

    half = weights.astype(np.float16)
    line = [json.dumps({"ids": e.tolist(), "weights": [[round(float(x), 6) for x in y] for y in w]}) + "\n"
            for e, w in zip(ids[:SAMPLE], weights[:SAMPLE], strict=True)]  # fmt: skip
    file = io.BytesIO()
    np.save(file, ids.astype(np.int16))
    return [
        ("torch.save int32", "ids", written(torch.save, torch.from_numpy(ids.astype(np.int32)))),
        ("torch.save int32, float32", "ids and weights",
         written(torch.save, (torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(weights)))),
        ("JSON with base64 of npy int16", "ids", len(base64.b64encode(file.getvalue())) / ids.size),
        ("npz, deflated", "ids", written(partial(_npz, ids=narrow))), ("npz, deflated", "ids and float16 weights", written(partial(_npz, ids=narrow, weights=half))),
        (f"JSON lines (of {SAMPLE} tokens)", "ids and weights to 6 digits", sum(map(len, line)) / ids[:SAMPLE].size),
    ]  # fmt: skip


def _npz(file: io.BytesIO, **arrays: np.ndarray) -> None:
    np.savez_compressed(file, allow_pickle=False, **arrays)


def _id_bits(ids: np.ndarray, tokens: np.ndarray, classes: int) -> float:
    """Bits per id of an adaptive coder that knows the token id, each site on its own."""
    code = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    total = 0.0
    for layer in ids.transpose(1, 0, 2):
        cells = np.bincount((code[:, None] * classes + layer).ravel(), minlength=(int(code.max()) + 1) * classes)
        total += _adaptive(cells.reshape(-1, classes))
    return total / ids.size


def _weight_bits(weights: np.ndarray) -> float:
    """Bits per bfloat16 weight of an adaptive coder of order 0, each site and slot on its own."""
    symbols = np.unique(weights.view(np.uint32) >> 16, return_inverse=True)[1].reshape(weights.shape)
    width = int(symbols.max()) + 1
    cells = [np.bincount(symbols[:, i, j], minlength=width) for i in range(weights.shape[1]) for j in range(weights.shape[2])]
    return _adaptive(np.array(cells)) / weights.size


def _adaptive(counts: np.ndarray) -> float:
    """Bits in which a coder that learns the counts [contexts, symbols] as it goes writes them; the best of four rates of learning."""
    lgamma = np.vectorize(math.lgamma, otypes=[float])
    values, how_many = np.unique(counts, return_counts=True)
    sums, contexts = np.unique(counts.sum(1), return_counts=True)
    width, best = counts.shape[1], math.inf
    for a in (0.5, 0.1, 0.03, 0.01):
        nats = ((lgamma(sums + a * width) - math.lgamma(a * width)) * contexts).sum() - (
            (lgamma(values + a) - math.lgamma(a)) * how_many
        ).sum()
        best = min(best, float(nats) / math.log(2))
    return best
