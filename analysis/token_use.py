"""The tokens that an expert is used for most: by lift, with a test against assignments dealt at random and the documents that lean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .significance import family_p
from .specialization import Reading, documents_of, finished, one_pass
from .token_tests import TokenTests, tests_reading
from .trace import Trace
from .vocabulary import LEAST, TokenCounts, coded, on_cores, summed, token_texts

CERTAIN = 1e-6  # chance, below which it is not drawn whether it happens
DRAWS = 199  # shuffles of a token's test: no p below 1 / (DRAWS + 1) can show


@dataclass(frozen=True)
class TokenUse:
    """One token id at one expert. share = count / tokens; lift = share over the expert's share of all tokens.

    ``p``: probability that any id seen at least ``least`` times stands out as much when the expert's assignments are
    dealt at random to the tokens. Its unit is the token: repeats within one document count as independent, so it is
    certain of a word that one document repeats. Documents tell: the id occurs in ``documents``, and in ``leaning`` of them
    it uses the expert more often than that document's tokens do (by chance in at most about half, more at an expert that most tokens use).
    ``p_documents`` and ``q`` are of that, with the document as unit: see TokenTests. All four None where unknown.
    """

    token_id: int
    text: str | None
    count: int
    tokens: int
    share: float
    lift: float
    p: float
    documents: int | None
    leaning: int | None
    p_documents: float | None
    q: float | None


@dataclass(frozen=True)
class DocumentUse:
    """Per id of ``ids``, int64 [I] ascending: ``documents`` int64 [I] that hold it; ``leaning`` int64 [I, classes], see TokenUse; ``tests`` of the same cells."""

    ids: np.ndarray
    documents: np.ndarray
    leaning: np.ndarray
    tests: TokenTests


def document_use(trace: Trace, counts: TokenCounts, ids: np.ndarray | None = None) -> DocumentUse | None:
    """In how many documents ``ids`` (ascending, of counts.ids; default all) lean to experts: the fewer, the faster.

    One pass over the site; None for a run without decisions or tokens.
    """
    if trace.source is None or trace.load_tokens is None:
        return None
    return one_pass(trace, counts.site, use_reading(trace, counts, ids))[0]


def use_reading(trace: Trace, counts: TokenCounts, ids: np.ndarray | None = None) -> Reading[DocumentUse]:
    """``document_use`` of a run with tokens and decisions, for a pass that others share."""
    layer = trace.layers[counts.site]
    every, code = coded(trace, layer.stream, counts.kind)
    ids = every if ids is None else ids
    row = np.full(len(every) + 1, -1)  # the last for tokens that have no id
    row[np.searchsorted(every, ids)] = np.arange(len(ids))
    owner = documents_of(trace, layer.stream)[1]
    known, asked, height, width = code >= 0, row[code] >= 0, max(len(ids), 1), layer.n_classes
    place = owner * height + row[code]  # by document first: pieces of the run then follow one another, but where one cuts a document
    pairs, occurs = np.unique(place[asked], return_counts=True)
    size = np.bincount(owner[known])
    load = np.zeros((int(owner.max(initial=-1)) + 1, width), np.int64)
    cells, n = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    tests = tests_reading(trace, counts, ids)
    next(tests)
    while (block := (yield)) is not None:
        tests.send(block)
        start, experts = block
        here = slice(start, start + len(experts))
        first, last = int(owner[here].min()), int(owner[here].max())
        base = np.where(known[here], owner[here] - first + 1, 0) * (width + 1) + 1  # a row and a column more, for what does not count
        met = np.bincount((base[:, None] + experts).ravel(), minlength=(last - first + 2) * (width + 1))
        load[first : last + 1] += met.reshape(-1, width + 1)[1:, 1:]
        mine = experts[asked[here]]
        found = np.unique((place[here][asked[here], None] * width + mine)[mine >= 0], return_counts=True)
        cells, n = [*cells, found[0]], [*n, found[1]]
    cell, count = summed(np.concatenate(cells), np.concatenate(n))
    pair, expert = np.divmod(cell, width)
    document, at = np.divmod(pair, height)
    leans = count * size[document] > load[document, expert] * occurs[np.searchsorted(pairs, pair)]
    leaning = np.bincount((at * width + expert)[leans], minlength=len(ids) * width)
    return DocumentUse(ids, np.bincount(pairs % height, minlength=len(ids)), leaning.reshape(len(ids), width), finished(tests))


def leading_ids(counts: TokenCounts, experts: Sequence[int], least: int = LEAST, most: int = 20) -> np.ndarray:
    """int64, ascending: the ids that ``top_tokens`` may name for any of ``experts``: with all that tie with the last."""
    often = _dealt(counts, least)[1]
    cells = _cells_of_experts(counts)
    found = [counts.ids[often][_highest(counts, cells[expert], often, most)[0]] for expert in experts]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def top_tokens(trace: Trace, counts: TokenCounts, expert: int, least: int = LEAST, most: int = 20, draws: int = DRAWS,
               seed: int = 0, use: DocumentUse | None = None) -> tuple[TokenUse, ...]:  # fmt: skip
    """The expert's ids by falling lift, among those seen at least ``least`` times and used more often than elsewhere.

    Ties by falling number of documents (with ``use``), by falling count, then by id: an expert that takes every occurrence of many ids gives
    them all one lift. Empty where nothing is. ``use``: ``document_use`` of the same counts, of all ids or at least of ``leading_ids``.
    """
    return top_tokens_of(trace, counts, [expert], least, most, draws, seed, use)[0]


def top_tokens_of(trace: Trace, counts: TokenCounts, experts: Sequence[int], least: int = LEAST, most: int = 20, draws: int = DRAWS,
                  seed: int = 0, use: DocumentUse | None = None) -> tuple[tuple[TokenUse, ...], ...]:  # fmt: skip
    """``top_tokens`` of each of ``experts``, shared out among the cores."""
    dealt, often = _dealt(counts, least)
    one = partial(_top_uses, counts, _cells_of_experts(counts), dealt, often, most=most, draws=draws, seed=seed, use=use)
    found = on_cores(one, experts)
    ids = np.unique([use.token_id for uses in found for use in uses]).astype(np.int64)
    text = dict(zip(ids.tolist(), token_texts(trace, ids, trace.layers[counts.site].stream), strict=True))
    return tuple(tuple(replace(use, text=text[use.token_id]) for use in uses) for uses in found)


def _cells_of_experts(counts: TokenCounts) -> list[np.ndarray]:
    """int64 [cells of the expert] of each: its places in ``counts``."""
    order = counts.expert.astype(np.uint16).argsort(kind="stable")
    return np.split(order, np.cumsum(np.bincount(counts.expert, minlength=counts.classes))[:-1])


def _dealt(counts: TokenCounts, least: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [V] assignments of each id, bool [V] ids that are looked at)."""
    dealt = np.bincount(counts.row, counts.count, len(counts.ids)).astype(np.int64)
    return dealt, (counts.tokens >= least) & (dealt > 0)


def _highest(counts: TokenCounts, cells: np.ndarray, often: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(high, used, share, lift): of the ids ``often`` the ``most`` of highest lift and what ties with the last of these, as indices into
    those; and figures of them all. ``cells`` are the expert's.
    """
    whole = np.zeros(len(counts.ids), np.int64)
    whole[counts.row[cells]] = counts.count[cells]
    used, total = whole[often], int(whole.sum())
    share = used / counts.tokens[often]
    lift = share / (total / int(counts.tokens.sum())) if total else np.zeros(len(used))
    high = np.flatnonzero(lift > 1)
    if len(high) > most:
        high = high[lift[high] >= -np.partition(-lift[high], most - 1)[most - 1]]
    return high, used, share, lift


def _top_uses(counts: TokenCounts, cells: Sequence[np.ndarray], dealt: np.ndarray, often: np.ndarray, expert: int, *, most: int, draws: int,
              seed: int, use: DocumentUse | None) -> list[TokenUse]:  # fmt: skip
    """Without texts. ``cells`` of every expert, ``dealt`` and ``often`` of ``_dealt``."""
    high, used, share, lift = _highest(counts, cells[expert], often, most)
    if not len(high):
        return []
    found = counts.ids[often][high]
    spread_over = np.zeros(len(high)) if use is None else use.documents[np.searchsorted(use.ids, found)]
    order = high[np.lexsort((found, -used[high], -spread_over, -lift[high]))][:most]
    total = int(counts.count[cells[expert]].sum())
    rate = total / dealt.sum()
    expected, spread = dealt[often] * rate, np.sqrt(dealt[often])  # binomial error but for a factor all ids share
    standing = (used - expected) / spread
    if draws * _reached(dealt[often], rate, float(standing[order].min())) < CERTAIN:
        maximum = np.full(draws, -np.inf)  # no draw comes near
    else:
        colours = np.append(dealt[often], dealt.sum() - dealt[often].sum())  # rare ids together: none of them is looked at
        null = np.random.default_rng(seed).multivariate_hypergeometric(colours, total, draws, method="marginals")[:, :-1]
        maximum = ((null - expected) / spread).max(1)
    ids, tokens, p = counts.ids[often][order], counts.tokens[often][order], family_p(standing[order], maximum, False)
    row = None if use is None else np.searchsorted(use.ids, ids)
    told = [[None] * len(order)] * 4 if use is None else [x.tolist() for x in (
        use.documents[row], use.leaning[row, expert], use.tests.p[row, expert], use.tests.q[row, expert])]  # fmt: skip
    return [TokenUse(int(ids[i]), None, int(used[at]), int(tokens[i]), float(share[at]), float(lift[at]), float(p[i]),
                     *(x[i] for x in told)) for i, at in enumerate(order)]  # fmt: skip


def _reached(dealt: np.ndarray, rate: float, standing: float) -> float:
    """Bound on P(an id's assignments, dealt at random, exceed what is expected by ``standing`` x sqrt(dealt)), summed over ids.

    Hoeffding 1963: draws without return keep the binomial's bound exp(-n KL(q || rate)).
    """
    q = rate + standing * (1 - 1e-6) / np.sqrt(dealt)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = q * np.log(q / rate) + (1 - q) * np.log((1 - q) / (1 - rate))
        bound = np.exp(-dealt * exponent)
    return float(np.where(q >= 1, np.where(q > 1, 0.0, rate**dealt), np.where(q <= rate, 1.0, bound)).sum())
