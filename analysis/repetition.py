"""Do neighbouring tokens of a document go to the same experts, and is it more than the document's tokens have in common anyhow?

Definition and published figures: Mixtral (arXiv 2401.04088) Table 5. ``repetition`` is from statistics alone, ``repetition_test`` reads a
site's decisions once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import comb
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from .reading import ROWS, documents_of
from .significance import MOST_UNITS, bootstrap_sums, interval
from .stats import first_choices
from .trace import LayerInfo, Trace, TraceError

DRAWS, BUDGET = (19, 199), 200_000_000  # shuffles of each document, as many as so many choices looked up allow
# text -> layers 0, 15, 31: (first choice repeated %, first or second in common %); Mixtral 8x7B, its Table 5
MIXTRAL: Mapping[str, tuple[tuple[float, float], ...]] = MappingProxyType({
    "ArXiv": ((14.0, 46.5), (27.9, 62.3), (22.7, 52.9)),
    "DM Mathematics": ((14.1, 44.9), (28.4, 67.0), (19.7, 44.5)),
    "Github": ((14.9, 49.9), (28.1, 66.9), (19.7, 49.2)),
    "Gutenberg": ((13.9, 49.5), (26.1, 63.1), (26.3, 52.2)),
    "PubMed abstracts": ((14.2, 48.6), (24.6, 61.6), (22.0, 51.8)),
    "Wikipedia (en)": ((14.4, 49.8), (23.6, 62.1), (25.3, 51.8)),
})  # fmt: skip


@dataclass(frozen=True)
class Repetition:
    """Neighbouring tokens of one document at one site; shares of ``pairs``, 0 to 1.

    first  the same first choice.  shared  any expert in common.
    chance_first = 1 / E and chance_shared = 1 - C(E - k, k) / C(E, k): uniform routing.
    chance_first_given_load: two tokens drawn independently at the recorded loads; uneven loads repeat by themselves.
    """

    site: int
    pairs: int
    first: float
    shared: float
    chance_first: float
    chance_shared: float
    chance_first_given_load: float


def repetition(trace: Trace, site: int) -> Repetition:
    """From statistics; NaN shares where no document has two tokens. Context: MIXTRAL."""
    pairs, first, shared = trace.stats.repetition(site)
    layer, load = trace.layers[site], trace.stats.first_choice_load(site)
    e, k = layer.n_classes, layer.top_k
    given = float(((load / load.sum()) ** 2).sum()) if load.sum() else float("nan")
    return Repetition(site, pairs, first / pairs if pairs else float("nan"), shared / pairs if pairs else float("nan"), 1 / e,
                      1 - comb(e - k, k) / comb(e, k), given)  # fmt: skip


def repetition_test(trace: Trace, site: int, progress: Callable[[int, int], None] | None = None, seed: int = 0) -> pa.Table:
    """One row: the fields of ``Repetition``, documents, units, draws, and for ``first`` and ``shared``, x in turn:

    x_low, x_high  95 % percentile interval over documents drawn again (at most MOST_UNITS runs of them); NaN with fewer than 2.
    x_shuffled     mean over ``draws`` orders of each document's tokens, dealt at random: what its tokens have in common anyhow.
    x_p            that an order reaches the value, 1 / (draws + 1) at least; NaN where no document has two tokens.

    ``progress`` is told (tokens read, tokens in all). Raises TraceError without decisions.
    """
    if trace.source is None:
        raise TraceError(f"run {trace.name!r} holds statistics only, no order of tokens: capture it again with tokens")
    layer, plain = trace.layers[site], repetition(trace, site)
    lengths = documents_of(trace, layer.stream)[1]
    ends, n = np.cumsum(lengths), int(lengths.sum())
    draws = int(np.clip(BUDGET // max(n * layer.top_k, 1), *DRAWS))
    found, shuffled = np.zeros((len(lengths), 3), np.int64), np.zeros((draws, 2), np.int64)
    rng = np.random.default_rng([seed, site])
    for some in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff((ends - 1) // ROWS)) + 1) if n else ():
        start, stop = int(ends[some[0]] - lengths[some[0]]), int(ends[some[-1]])
        found[some], more = _documents(trace, layer, start, stop, ends[some] - start, draws, rng)
        shuffled += more
        if progress is not None:
            progress(stop, n)
    told: dict[str, object] = {"site": site, "layer": layer.layer, **asdict(plain), "documents": len(lengths), "draws": draws}
    units = max(min(len(lengths), MOST_UNITS), 1)
    sums = np.stack([np.bincount(np.arange(len(lengths)) * units // max(len(lengths), 1), x, units) for x in found.T], 1)
    drawn = bootstrap_sums(sums, np.zeros(units, np.int64), seed=seed)[:, 0]
    for i, name in enumerate(("first", "shared"), 1):
        low, high = interval(drawn[:, i] / np.maximum(drawn[:, 0], 1)) if units > 1 and plain.pairs else (np.nan, np.nan)
        reached = int((shuffled[:, i - 1] >= found[:, i].sum()).sum())
        told |= {f"{name}_low": float(low), f"{name}_high": float(high),
                 f"{name}_shuffled": float(shuffled[:, i - 1].mean() / plain.pairs) if plain.pairs else np.nan,
                 f"{name}_p": (reached + 1) / (draws + 1) if plain.pairs else np.nan}  # fmt: skip
    return pa.Table.from_pylist([told | {"units": units}])


def _documents(trace: Trace, layer: LayerInfo, start: int, stop: int, ends: np.ndarray, draws: int,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Of the documents in these rows, which end at ``ends``: int64 [documents, 3] of neighbours, equal first choices, any in common; and the
    last two over all of them in each order dealt, int64 [draws, 2].
    """
    from .shuffling import neighbours_alike  # pays for numba

    routing = trace.routing(layer.index, start, stop)
    first, words = first_choices(routing), _words(routing.experts, layer.n_classes)
    alike = np.zeros((len(ends), 2), np.int64)
    order = np.arange(stop - start)
    neighbours_alike(words, first, ends, order, np.zeros(0), alike)
    lengths = np.diff(ends, prepend=0)
    dealt, one = np.zeros((draws, 2), np.int64), np.zeros_like(alike)
    for draw in range(draws):
        one[:] = 0
        neighbours_alike(words, first, ends, order, rng.random(stop - start), one)
        dealt[draw] = one.sum(0)
    return np.column_stack([lengths - 1, alike]), dealt


def _words(experts: np.ndarray, classes: int) -> np.ndarray:
    """uint64 [n, words]: the bits of each token's experts; none for -1."""
    words, rows = np.zeros((len(experts), -(-classes // 64)), np.uint64), np.arange(len(experts))
    for column in experts.T.astype(np.int64):
        used = column >= 0
        words[rows[used], column[used] >> 6] |= np.uint64(1) << (column[used] & 63).astype(np.uint64)
    return words
