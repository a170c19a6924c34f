"""How stable is the balance of load: from batch to batch, along the text, between labels?

A layer may be even over a run and overloaded in every batch. From statistics alone. Every table has n and what uniform random routing of
so many tokens would give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import balance
from .longtables import LongTable
from .stats import Statistics
from .trace import LayerInfo, Trace

KEPT_BYTES, KEPT_SITES = 1 << 21, 64  # of a site's loads that are kept, and sites: 128 MiB at most, and again for batches
_READING = tuple(Lock() for _ in range(KEPT_SITES))
LEAST_DOCUMENTS = 30  # a text in ten is missing from 30 of them in 4 % of cases: 0.9^30
SCHEMA = (("n", pa.int64()), ("max_over_mean", pa.float64()), ("cv", pa.float64()), ("normalised_entropy", pa.float64()),
          ("gini", pa.float64()), ("effective_experts", pa.float64()), ("cold", pa.float64()), ("dead", pa.float64()), ("chance_max_over_mean", pa.float64()), ("chance_cv", pa.float64()))  # fmt: skip


def batch_maxvio(trace: Trace, site: int, batch_tokens: int = 1) -> float:
    """MaxVio per batch, averaged over batches; 0 to E - 1; NaN without assignments. Wang et al., arXiv 2408.15664.

    ``batch_tokens`` as in ``batch_loads``; at its default every document is a batch.
    """
    loads = batch_loads(trace, site, batch_tokens)[1]
    return float((loads.max(1) / loads.mean(1) - 1).mean()) if len(loads) else float("nan")


def batch_loads(trace: Trace, site: int, batch_tokens: int = 1, mixed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [batches] tokens, int64 [batches, E] assignments) of the site's batches that have any, in the order filled.

    Batches are runs of whole documents, closed once they hold ``batch_tokens``; at least one document. A last one that falls short is
    joined to the one before. ``mixed`` is a seed by which documents are shuffled before they fill batches; None keeps
    the order recorded, which may follow labels.
    """
    sizes, counts = _documents(trace, site)
    if mixed is not None:
        order = np.random.default_rng(mixed).permutation(len(sizes))  # one order for every site of a stream
        sizes, counts = sizes[order], counts[order]
    starts = _batches(sizes, batch_tokens)
    n, loads = _together(sizes, starts), _together(counts[:, : trace.layers[site].n_experts], starts)
    ran = loads.sum(1) > 0
    return (n, loads) if ran.all() else (n[ran], loads[ran])


def maxvio_batches(trace: Trace, site: int, batch_tokens: int = 1, mixed: int | None = None) -> pa.Table:
    """MaxVio of every batch of ``batch_loads``: batch (from 1), n (tokens), maxvio, chance.

    chance: balance.chance_max_over_mean of so many tokens, less 1.
    """
    layer = trace.layers[site]
    n, loads = batch_loads(trace, site, batch_tokens, mixed)
    chance = of_each(n, _chance_maxima, layer.n_classes, layer.top_k) - 1
    return pa.table({"batch": pa.array(np.arange(1, len(n) + 1), pa.int64()), "n": pa.array(n, pa.int64()),
                     "maxvio": pa.array(loads.max(1) / loads.mean(1) - 1, pa.float64()), "chance": pa.array(chance, pa.float64())})  # fmt: skip


def maxvio_table(trace: Trace, batch_tokens: int = 1, mixed: int | None = None) -> pa.Table:
    """MaxVio of every site over the run and per batch (``maxvio_batches``), beside what uniform random routing would give.

    site, n (tokens), batches, batch_n (tokens of a batch, mean), run, chance_run; batch (as ``batch_maxvio``), least, p95 and
    most of a batch, chance_batch: mean over batches of the upper bound of balance.chance_max_over_mean, less 1. spread is the
    standard deviation over batches (n - 1; NaN for fewer than two), chance_spread as ``_chance_spread``.
    """
    rows = []
    for layer in trace.layers:
        found = maxvio_batches(trace, layer.index, batch_tokens, mixed)
        n, each, chance = (found[c].to_numpy() if len(found) else np.full(1, np.nan) for c in ("n", "maxvio", "chance"))
        whole, load = trace.stats.n_tokens(layer.index), trace.stats.load(layer.index)[: layer.n_experts]
        rows.append({"site": layer.index, "n": whole, "batches": len(found), "batch_n": float(n.mean()),
                     "run": balance.maxvio(load), "chance_run": balance.chance_max_over_mean(whole, layer.n_classes, layer.top_k) - 1,
                     "batch": float(each.mean()), "least": float(each.min()), "p95": float(np.percentile(each, 95)), "most": float(each.max()),
                     "chance_batch": float(chance.mean()), "spread": float(each.std(ddof=1)) if len(each) > 1 else float("nan"),
                     "chance_spread": _chance_spread(load, whole, n)})  # fmt: skip
    return pa.Table.from_pylist(rows)


def _chance_spread(load: np.ndarray, tokens: int, sizes: np.ndarray) -> float:
    """Upper bound of the standard deviation of MaxVio over batches of ``sizes`` tokens, were the run's tokens dealt to them at random.

    A batch's load of an expert with share p of the run's tokens is then at most as spread as Binomial(n, p). The variance of
    the largest of jointly normal variables is at most that of the most variable one (Poincaré's inequality), so here
    max p (1 - p) / n over the squared mean share. The loads are taken as normal; the tests simulate it.
    """
    if not load.sum() or np.isnan(sizes).any():
        return float("nan")
    share = load / tokens
    return float(np.sqrt((share * (1 - share)).max() * (1 / sizes).mean()) / share.mean())


def least_stable(table: pa.Table) -> tuple[int, bool] | None:
    """(row of ``maxvio_table`` with the largest spread, whether that is more than chance); None without two batches anywhere.

    More than chance: above chance_spread by twice the relative standard error 1 / sqrt(2 (batches - 1)) of a standard deviation.
    """
    spread, chance, batches = (table[c].to_numpy() for c in ("spread", "chance_spread", "batches"))
    if not np.isfinite(spread).any():
        return None
    row = int(np.nanargmax(spread))
    return row, bool(spread[row] > chance[row] * (1 + 2 / np.sqrt(2 * (batches[row] - 1))))


def of_each(n: np.ndarray, function: Callable[..., np.ndarray], *settings: int) -> np.ndarray:
    """float64 [n], not to be changed: ``function`` of values [m] and ``settings``, asked once for equal ones, as many batches and documents are."""
    return _of_each(n.astype(np.int64).tobytes(), function, settings)


@lru_cache(maxsize=64)
def _of_each(n: bytes, function: Callable[..., np.ndarray], settings: tuple[int, ...]) -> np.ndarray:
    """Kept: layers are alike, and so are their batches."""
    values, at = np.unique(np.frombuffer(n, np.int64), return_inverse=True)
    found = function(values, *settings)[at]
    found.setflags(write=False)
    return found


def _chance_maxima(tokens: np.ndarray, n_experts: int, top_k: int) -> np.ndarray:
    return np.array([balance.chance_max_over_mean(x, n_experts, top_k) for x in tokens.tolist()], np.float64)


def _chance_cvs(tokens: np.ndarray, n_experts: int, top_k: int) -> np.ndarray:
    return np.array([balance.chance_cv(x, n_experts, top_k) for x in tokens.tolist()], np.float64)


@dataclass(frozen=True)
class DeadExperts:
    """Experts without any assignment over all sites: ``dead`` of ``experts``, ``at`` these (site, expert ids); ``chance`` expects so many.

    ``chance`` takes tokens as independent, which those of one document are not: ``few`` where the run has fewer than
    LEAST_DOCUMENTS ``documents``, so that an expert without a token may merely have met none of its texts.
    """

    dead: int
    experts: int
    at: tuple[tuple[int, tuple[int, ...]], ...]
    chance: float
    documents: int
    tokens: int

    @property
    def few(self) -> bool:
        """Too few documents to call an expert dead; a run that holds no documents but counts is not judged by them."""
        return 0 < self.documents < LEAST_DOCUMENTS


def dead_experts(trace: Trace) -> DeadExperts:
    """Dead experts of sites that executed anything; by chance as balance.chance_dead has it, summed over those sites."""
    loads = {x.index: trace.stats.load(x.index)[: x.n_experts] for x in trace.layers}
    ran = [x for x in trace.layers if loads[x.index].any()]
    at = tuple((x.index, tuple(np.flatnonzero(loads[x.index] == 0).tolist())) for x in ran if (loads[x.index] == 0).any())
    chance = sum(balance.chance_dead(trace.stats.n_tokens(x.index), x.n_classes, x.top_k) * x.n_experts / x.n_classes for x in ran)
    streams = dict.fromkeys(x.stream for x in trace.layers)
    return DeadExperts(sum(len(e) for _, e in at), sum(x.n_experts for x in ran), at, float(chance),
                       len(set(trace.documents["document"].to_pylist())), sum(trace.n_tokens(s) for s in streams))  # fmt: skip


def position_balance(trace: Trace, site: int) -> pa.Table:
    """Balance per stretch of positions (0, 1-2, 3-6, ... doubling): first, last, documents, then the columns of SCHEMA.

    documents: those that reach ``first``; the last stretch ends where the longest document does. Null and uncut for a run of counts alone.
    """
    layer = trace.layers[site]
    loads = trace.stats.position_load(site)
    n = -(-loads.sum(1) // layer.top_k)  # tokens, but for assignments dropped natively
    bucket = np.arange(len(loads))
    sizes = _sizes(trace, site)
    first, last = 2**bucket - 1, 2 ** (bucket + 1) - 2
    table = _described(layer, n, loads)
    reached = (sizes[None] > first[:, None]).sum(1)
    table = table.add_column(0, "documents", pa.array(reached if len(sizes) else [None] * len(n), pa.int64()))
    table = table.add_column(0, "last", pa.array(np.minimum(last, sizes.max() - 1) if len(sizes) else last, pa.int64()))
    return table.add_column(0, "first", pa.array(first, pa.int64()))


@dataclass(frozen=True)
class LatePositions:
    """The positions that fewer than half of the documents reach: from ``first`` on, in ``documents`` of ``of``.

    ``label`` is the one with most of their tokens, ``share`` of them; ``overall`` is its share of all tokens. None without labels.
    """

    first: int
    documents: int
    of: int
    label: str | None
    share: float
    overall: float


def late_positions(trace: Trace, site: int) -> LatePositions | None:
    """Whose text the late stretches of ``position_balance`` are made of; None where half of the documents reach every stretch."""
    rows = position_balance(trace, site).to_pylist()
    sizes = _sizes(trace, site)
    late = next((r for r in rows if len(sizes) and 2 * r["documents"] < len(sizes)), None)
    if late is None:
        return None
    labels = trace.documents_in(trace.layers[site].stream)["label"].to_pylist()
    beyond = np.maximum(sizes - late["first"], 0)
    tokens = {x: int(beyond[[y == x for y in labels]].sum()) for x in dict.fromkeys(labels) if x is not None}
    label = max(tokens, key=tokens.__getitem__) if tokens else None
    mine = np.array([y == label for y in labels])
    return LatePositions(late["first"], late["documents"], len(sizes), label,
                         *(float(s[mine].sum() / s.sum()) if label is not None else float("nan") for s in (beyond, sizes)))  # fmt: skip


def _sizes(trace: Trace, site: int) -> np.ndarray:
    """int64 [documents] tokens of the documents of the site's stream, by document number."""
    return trace.documents_in(trace.layers[site].stream)["n_tokens"].to_numpy().astype(np.int64)


def label_balance(trace: Trace, site: int) -> pa.Table:
    """Balance per label: label, documents, then the columns of SCHEMA; text without a label comes last, its label null.

    Empty for a run without labels.
    """
    labels, loads = trace.stats.label_load(site)
    tokens = trace.stats.label_tokens(site)
    n: list[int] = [tokens[x] for x in labels]
    names: list[str | None] = [*labels]
    if labels and (rest := trace.stats.n_tokens(site) - sum(n)):
        n, names, loads = [*n, rest], [*labels, None], np.vstack([loads, trace.stats.load(site) - loads.sum(0)])
    stream = trace.documents_in(trace.layers[site].stream)["label"].to_pylist()
    table = _described(trace.layers[site], np.array(n, np.int64), loads)
    table = table.add_column(0, "documents", pa.array([stream.count(x) if stream else None for x in names], pa.int64()))
    return table.add_column(0, "label", pa.array(names, pa.string()))


def document_balance(trace: Trace, site: int) -> pa.Table:
    """Balance of every document, the most uneven for its length first: document, name, label, the columns of SCHEMA, excess.

    excess = max_over_mean / chance_max_over_mean of so many tokens: above 1 is more than chance. Documents without an
    assignment are left out.
    """
    rows = trace.documents_in(trace.layers[site].stream).select(["document", "name", "label"])
    sizes, counts = _documents(trace, site)
    ran = counts[:, : trace.layers[site].n_experts].sum(1) > 0
    table = _described(trace.layers[site], sizes[ran], counts[ran].astype(np.int64))
    for column in reversed(rows.column_names):
        table = table.add_column(0, column, rows[column].filter(pa.array(ran)))
    table = table.append_column("excess", pc.divide(table["max_over_mean"], table["chance_max_over_mean"]))
    return table.sort_by([("excess", "descending"), ("document", "ascending")])


def _described(layer: LayerInfo, n: np.ndarray, loads: np.ndarray) -> pa.Table:
    """``balance``'s figures of every row of ``loads``, to the bit, with what chance gives of ``n`` tokens."""
    chance = [of_each(n, f, layer.n_classes, layer.top_k) for f in (_chance_maxima, _chance_cvs)]
    loads = loads[:, : layer.n_experts]
    total = loads.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, share = loads * layer.n_experts / total, loads / total
        entropy = -(share * np.log(share)).sum(1) + 0.0
    for row in np.flatnonzero((loads == 0).any(1)):  # whose terms are fewer
        entropy[row] = balance.entropy(loads[row])
    even = entropy / np.log(layer.n_experts) if layer.n_experts > 1 else entropy + 1
    place, ran = 2 * np.arange(1, layer.n_experts + 1) - layer.n_experts - 1, total[:, 0] > 0
    gini = (place * np.sort(relative)).sum(1) / layer.n_experts**2
    cold, dead = (np.where(ran, x.sum(1), np.nan) for x in (relative < balance.COLD_SHARE, loads == 0))
    columns = n, relative.max(1), relative.std(1), even, gini, np.exp(entropy), cold, dead, *chance
    return pa.table([pa.array(c, t) for c, (_, t) in zip(columns, SCHEMA, strict=True)], schema=pa.schema(SCHEMA))


def read_ahead(trace: Trace) -> None:
    """Read of every site what the tables of batches will ask for, and keep it; nothing for a run whose documents are not kept."""
    for layer in trace.layers:
        if _kept(trace, layer.index):
            _documents(trace, layer.index)


def _kept(trace: Trace, site: int) -> bool:
    layer = trace.layers[site]
    return isinstance(trace.stats.document_rows, LongTable) and len(trace.documents_in(layer.stream)) * layer.n_classes * 2 <= KEPT_BYTES


def _documents(trace: Trace, site: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [documents] tokens, [documents, classes] assignments) of the site's stream, by document number; the latter not to be changed,
    and of whatever integers hold them: add them up as int64."""
    rows = trace.documents_in(trace.layers[site].stream)
    numbers, stats = rows["document"].to_numpy(), trace.stats
    sizes = rows["n_tokens"].to_numpy().astype(np.int64)
    if not _kept(trace, site):
        return sizes, stats.document_load(site, numbers)
    with _READING[site % KEPT_SITES]:  # two threads that ask for a site at once read it once
        return sizes, _kept_load(stats, site, numbers.tobytes(), numbers.dtype)


@lru_cache(maxsize=KEPT_SITES)
def _kept_load(stats: Statistics, site: int, documents: bytes, dtype: np.dtype) -> np.ndarray:
    """Statistics.document_load of a stored run, whose files do not change, in as narrow an integer as holds it: one page asks for every
    site four times and more."""
    found = stats.document_load(site, np.frombuffer(documents, dtype))
    narrow = found.astype(np.min_scalar_type(int(found.max(initial=0))))
    narrow.setflags(write=False)
    return narrow


def _together(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64: sums of the rows of each batch, from its start to the next one's."""
    if len(starts) == len(values):
        return values.astype(np.int64)
    return np.asarray(np.add.reduceat(values, starts, axis=0, dtype=np.int64))


def _batches(sizes: np.ndarray, batch_tokens: int) -> np.ndarray:
    """First document of each batch. Raises ValueError for a batch of no tokens."""
    if batch_tokens < 1:
        raise ValueError(f"a batch of {batch_tokens} tokens holds nothing: give at least 1")
    if len(sizes) and sizes.min() >= batch_tokens:
        return np.arange(len(sizes))
    return _cut(sizes.tobytes(), batch_tokens)


@lru_cache(maxsize=8)
def _cut(sizes: bytes, batch_tokens: int) -> np.ndarray:
    """``_batches`` of int64 sizes: kept, as every site of a stream is cut alike."""
    starts, filled = [0] if len(sizes) else [], 0
    for i, size in enumerate(np.frombuffer(sizes, np.int64).tolist()):
        if filled >= batch_tokens:
            starts.append(i)
            filled = 0
        filled += size
    if len(starts) > 1 and filled < batch_tokens:
        starts.pop()
    return np.array(starts, np.int64)
