"""How far do token ids explain where tokens are sent? By the token read, the next one, the one the model predicts.

Input ids come from the statistics; next ids, and those the model itself predicted next, need the recorded tokens and one
pass over a site's decisions. Definitions: OLMoE (arXiv 2409.02060) eq. 8 for vocabulary specialization, OpenMoE (arXiv
2402.01739) for context independence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import pyarrow as pa

from .information import DENSE, Information, ceiling, entropy, shuffled_tables, sparse_information
from .reading import ROWS, blocks
from .trace import LayerInfo, Trace, TraceError

LEAST = 10  # occurrences of a token id for a statement about it: a token seen once is always "specialised"
PREDICTED_NEXT = (
    "The predicted next token is not known here: the model has no language head, or the run was recorded before predictions were."
    " Use the next token, or record the run again."
)
_Found = TypeVar("_Found")
WORKERS = 4  # each holds the draws of one expert: some 50 MB for 10,000 token ids


def token_texts(trace: Trace, ids: np.ndarray, stream: str = "decoder") -> tuple[str | None, ...]:
    """Readable text of each token id as recorded in the run, where it occurs first; None for an id that does not occur, or without tokens.

    Reads no further than to where all of them have occurred.
    """
    texts: dict[int, str] = {}
    missing = set(ids.tolist()) if trace.load_tokens is not None else set()
    for start in range(0, trace.n_tokens(stream) if missing else 0, ROWS):
        rows = trace.stream_tokens(stream, start, min(start + ROWS, trace.n_tokens(stream)), ["token_id", "token"])
        recorded = rows["token_id"].to_numpy()
        new = np.flatnonzero(np.isin(recorded, np.fromiter(missing, np.int64)))
        found, first = np.unique(recorded[new], return_index=True)
        texts |= dict(zip(found.tolist(), rows["token"].take(pa.array(new[first])).to_pylist(), strict=True))
        missing -= texts.keys()
        if not missing:
            break
    return tuple(texts.get(x) for x in ids.tolist())


@dataclass(frozen=True)
class TokenCounts:
    """Who serves which token id at one site, sparse.

    ids     int64 [V], ascending.  tokens  int64 [V]: N_x, occurrences of the id.
    row, expert, count  int64 [cells]: index into ids, expert, assignments.
    classes  ids an expert can have.  kind  "input token", "next token" or "predicted next token".
    each  experts that every token counted has, all different; 1 where tokens differ in it.
    """

    site: int
    kind: str
    classes: int
    ids: np.ndarray
    tokens: np.ndarray
    row: np.ndarray
    expert: np.ndarray
    count: np.ndarray
    each: int = 1

    def dealt(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, count) of the cells after the assignments were dealt to the tokens again, ids' and experts' totals kept."""
        return self._first_deal if seed == 0 else self._deal(seed)

    @cached_property
    def _first_deal(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept: more than one figure is held against it."""
        return self._deal(0)

    def _deal(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        row, _, count = next(shuffled_tables(self.row, self.expert, self.count, self.classes, [seed]))
        return row, count


def input_tokens(trace: Trace, site: int) -> TokenCounts:
    """By the token the expert reads. From statistics alone, unless assignments were dropped or skipped natively."""
    ids, each, experts, counts = trace.stats.token_load_by_id(site)
    layer, place = trace.layers[site], np.arange(len(ids))
    if counts.sum() == trace.stats.n_tokens(site) * layer.top_k:
        starts = np.cumsum(each) - each
        tokens = (np.add.reduceat(counts, starts) if len(starts) else counts) // layer.top_k
    else:  # some tokens have fewer than k experts: their number is in the tokens table only
        recorded = trace.stream_tokens(layer.stream, columns=["token_id"])["token_id"].to_numpy().astype(np.int64)
        used, (ids, tokens) = ids, np.unique(recorded, return_counts=True)
        place = np.searchsorted(ids, used)
    row = np.repeat(place, each)
    return TokenCounts(site, "input token", layer.n_classes, ids, tokens, row, experts, counts, _each(layer, counts, tokens))


def next_tokens(trace: Trace, site: int) -> TokenCounts:
    """By the token that follows in the document; last tokens are left out. One pass; TraceError without decisions."""
    return _counted(trace, site, "next token")


def predicts(trace: Trace, stream: str = "decoder") -> bool:
    """Whether the run knows what the model predicted next for any token of the stream."""
    if trace.load_tokens is None:
        return False
    predicted = trace.stream_tokens(stream, columns=["predicted"])["predicted"]
    return bool(predicted.null_count < len(predicted))


def predicted_tokens(trace: Trace, site: int) -> TokenCounts:
    """By the token the model predicts next, the id of its largest logit; tokens without a prediction are left out.

    One pass. TraceError without decisions, or where nothing was predicted: PREDICTED_NEXT.
    """
    if not predicts(trace, trace.layers[site].stream):
        raise TraceError(PREDICTED_NEXT)
    return _counted(trace, site, "predicted next token")


VARIANTS: Mapping[str, Callable[[Trace, int], TokenCounts]] = MappingProxyType(
    {"input": input_tokens, "next": next_tokens, "predicted": predicted_tokens}
)  # OLMoE's three


def coded(trace: Trace, stream: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids ascending, int64 [tokens of the stream] into ids, -1 for a token that has none of this kind)."""
    table = trace.stream_tokens(stream, columns=["token_id", "document", *(["predicted"] if kind == "predicted next token" else [])])
    if kind == "predicted next token":
        predicted = table["predicted"]
        known = np.full(len(predicted), -1)
        ids, known[predicted.is_valid().to_numpy()] = coded_ids(predicted.drop_null().to_numpy().astype(np.int64))
        return ids, known
    ids, code = coded_ids(table["token_id"].to_numpy().astype(np.int64))
    if kind == "input token":
        return ids, code
    document = table["document"].to_numpy()
    follows = np.append(document[1:] == document[:-1], np.zeros(min(len(document), 1), bool))
    return ids, np.where(follows, np.append(code[1:], 0)[: len(code)], -1)


def coded_ids(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct values ascending, int64 index of each value into them)."""
    if not len(values) or values.min() < 0 or values.max() >= DENSE:
        ids, code = np.unique(values, return_inverse=True)
        return ids, code
    there = np.bincount(values) > 0
    return np.flatnonzero(there), (np.cumsum(there) - 1)[values]


def summed(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keys ascending, sum of their counts), int64; fast for keys that are sorted runs, as a merge sort is."""
    order = keys.argsort(kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    return keys[starts], np.add.reduceat(counts[order], starts) if len(starts) else counts


def on_cores(one: Callable[[int], _Found], items: Iterable[int]) -> list[_Found]:
    """``one`` of each item, on all cores: drawing, nearly all of the time, runs without Python's lock."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, WORKERS)) as pool:
        return list(pool.map(one, items))


def _counted(trace: Trace, site: int, kind: str) -> TokenCounts:
    """One pass over a site's decisions."""
    layer = trace.layers[site]
    ids, code = coded(trace, layer.stream, kind)
    size = len(ids) * layer.n_classes
    count_all = size <= 16 * ROWS * layer.top_k  # counting beats sorting where a block fills much of the table
    dense, cells, n = np.zeros(size if count_all else 0, np.int64), [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, experts in blocks(trace, layer):
        mine = code[start : start + len(experts), None]
        keys = (mine * layer.n_classes + experts)[(experts >= 0) & (mine >= 0)]
        if count_all:
            dense += np.bincount(keys, minlength=size)
        else:
            found = np.unique(keys, return_counts=True)
            cells, n = [*cells, found[0]], [*n, found[1]]
    cell = np.flatnonzero(dense)
    cell, count = (cell, dense[cell]) if count_all else summed(np.concatenate(cells), np.concatenate(n))
    tokens = np.bincount(code[code >= 0], minlength=len(ids))
    return TokenCounts(site, kind, layer.n_classes, ids, tokens, cell // layer.n_classes, cell % layer.n_classes, count,
                       _each(layer, count, tokens))  # fmt: skip


def _each(layer: LayerInfo, counts: np.ndarray, tokens: np.ndarray) -> int:
    return layer.top_k if counts.sum() == tokens.sum() * layer.top_k else 1


def context_independence(counts: TokenCounts, shuffles: int = 5, seed: int = 0) -> Information:
    """I(expert; token id) over assignments, bits; ``share`` is the part the id alone explains of what it could.

    Floor: assignments dealt again to the tokens, ids' and experts' totals kept. Rare ids make it large: it has to be taken
    off before two runs, or two layers, are compared. A router that follows the token has fewer cells, so less bias, than
    the shuffled table: ``above_floor`` errs low and ``corrected`` high, the truth lies between. OpenMoE's term.
    """
    bits, corrected, h_id, h_expert = sparse_information(counts.row, counts.expert, counts.count)
    seeds = range(seed, seed + shuffles if counts.count.sum() else seed)
    null = on_cores(lambda s: max(h_id + h_expert - entropy(counts.dealt(s)[1]), 0.0), seeds)  # whose margins are the same
    floor = float(np.mean(null)) if null else float("nan")
    p = (sum(x >= bits for x in null) + 1) / (len(null) + 1) if null else float("nan")
    return Information(bits, corrected, floor, p, h_id, h_expert, ceiling(h_id, h_expert, counts.each), int(counts.count.sum()),
                       f"assignments dealt again, {len(null)} times")  # fmt: skip


@dataclass(frozen=True)
class VocabularySpecialization:
    """Mean over token ids of the largest share any expert has of the id's tokens; 1/E... to 1. OLMoE eq. 8.

    every      over all ids: an id seen once scores 1 whatever the router does.
    frequent   over ids seen at least ``least`` times (``n_frequent`` of them).
    weighted   over tokens: each id counts as often as it occurs.
    chance_*   the same after assignments were dealt again to the tokens (shares capped at 1).
    """

    every: float
    frequent: float
    weighted: float
    chance_every: float
    chance_frequent: float
    chance_weighted: float
    n_ids: int
    n_frequent: int
    n_tokens: int
    least: int


def vocabulary_specialization(counts: TokenCounts, least: int = LEAST, seed: int = 0) -> VocabularySpecialization:
    """Eq. 8 three ways, each beside its shuffled value; NaN for no tokens. Seeded."""
    real = _top_shares(counts, counts.row, counts.count, least)
    row, count = counts.dealt(seed)
    seen = counts.tokens > 0
    return VocabularySpecialization(*real, *_top_shares(counts, row, count, least), int(seen.sum()), int((counts.tokens >= least).sum()),
                                    int(counts.tokens.sum()), least)  # fmt: skip


def _top_shares(counts: TokenCounts, row: np.ndarray, count: np.ndarray, least: int) -> tuple[float, float, float]:
    top = np.zeros(len(counts.ids))
    np.maximum.at(top, row, count.astype(np.float64))
    seen = counts.tokens > 0
    share, n = np.minimum(top[seen] / counts.tokens[seen], 1), counts.tokens[seen]
    often = n >= least
    nothing = float("nan")
    return (float(share.mean()) if len(n) else nothing, float(share[often].mean()) if often.any() else nothing,
            float((share * n).sum() / n.sum()) if len(n) else nothing)  # fmt: skip


def vocabulary_table(trace: Trace, least: int = LEAST, layers: Sequence[int] | None = None,
                     beside: Callable[[TokenCounts], Mapping[str, object]] | None = None) -> pa.Table:  # fmt: skip
    """One row per site of ``layers`` (default all) and variant the run can tell ("input", "next", "predicted"): site, layer, token (the variant), n (tokens), ids, then
    VocabularySpecialization's figures with their chance, and the columns that ``beside`` gives for each. One pass per site and variant;
    TraceError without tokens.
    """
    rows = []
    for layer in trace.layers if layers is None else [trace.layers[i] for i in layers]:
        for variant, count in VARIANTS.items():
            if variant == "predicted" and not predicts(trace, layer.stream):
                continue
            counts = count(trace, layer.index)
            found = asdict(vocabulary_specialization(counts, least)) | dict(beside(counts) if beside else {})
            key = {"site": layer.index, "layer": layer.layer, "token": variant}
            rows.append(key | {"n": found.pop("n_tokens"), "ids": found.pop("n_ids")} | found)
    return pa.Table.from_pylist(rows)
