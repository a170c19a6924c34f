"""The tokens that an expert is used for most: by lift, with a test against assignments dealt at random and the documents that lean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .reading import Reading, block_owners, documents_of, end_of, one_pass
from .significance import CERTAIN, benjamini_hochberg, family_p, shares_p
from .trace import Trace
from .vocabulary import LEAST, TokenCounts, coded, on_cores, token_texts

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
class TokenTests:
    """Is an id sent to an expert more often than its documents' other tokens are? Of some ids at every expert, float64 [ids, classes], one-sided.

    p        each document that holds the id gives one number, the share of its occurrences there that use the expert, expected to be the
             document's own rate over all tokens that have an id of this kind (``shares_p``): a word that one document repeats counts once.
    q        Benjamini and Hochberg over ``family`` cells: every id seen ``least`` times x every expert of the site. Cells of ids that were not
             asked for count with p = 1, so that q errs high, and choosing the ids of highest lift is paid for.
    """

    p: np.ndarray
    q: np.ndarray
    family: int


@dataclass(frozen=True)
class DocumentUse:
    """Per id of ``ids``, int64 [I] ascending: ``documents`` int64 [I] that hold it; ``leaning`` int64 [I, classes], see TokenUse; ``tests`` of the same cells."""

    ids: np.ndarray
    documents: np.ndarray
    leaning: np.ndarray
    tests: TokenTests


def document_use(trace: Trace, counts: TokenCounts, ids: np.ndarray | None = None, least: int = LEAST,
                 progress: Callable[[int, int], None] | None = None) -> DocumentUse | None:  # fmt: skip
    """In how many documents ``ids`` (ascending, of counts.ids; default all) lean to experts: the fewer, the less memory.

    One pass over the site; None for a run without decisions or tokens. ``progress`` is told (tokens read, in all).
    """
    if trace.source is None or trace.load_tokens is None:
        return None
    return one_pass(trace, counts.site, use_reading(trace, counts, ids, least), progress=progress)[0]


def use_reading(trace: Trace, counts: TokenCounts, ids: np.ndarray | None = None, least: int = LEAST,
                known: tuple[np.ndarray, np.ndarray] | None = None) -> Reading[DocumentUse]:  # fmt: skip
    """``document_use`` of a run with tokens and decisions, for a pass that others share; ``known``: what ``coded`` gives, where at hand."""
    from .counting import check_ids
    from .shuffling import DocumentCells, count_leaning  # pay for numba

    layer = trace.layers[counts.site]
    every, code = known or coded(trace, layer.stream, counts.kind)
    ids = every if ids is None else ids
    place = np.full(len(every) + 1, len(ids))
    place[np.searchsorted(every, ids)] = np.arange(len(ids))
    place[-1] = -1  # tokens that have no id
    edges = np.cumsum([0, *documents_of(trace, layer.stream)[1].tolist()])
    cells, documents = DocumentCells(len(ids), layer.n_classes), np.zeros(len(ids), np.int64)
    leaning, share, rate = (np.zeros((len(ids), layer.n_classes), t) for t in (np.int64, np.float64, np.float64))
    while (block := (yield)) is not None:
        start, experts = block
        check_ids(experts, layer.n_classes)
        stop = start + len(experts)
        count_leaning(experts, block_owners(edges, start, stop), place[code[start:stop]], cells.arrays(), documents, leaning, share, rate)
    count_leaning(*end_of(layer), cells.arrays(), documents, leaning, share, rate)
    p, family = shares_p(share, rate, documents[:, None]), int((counts.tokens >= least).sum()) * layer.n_classes
    return DocumentUse(ids, documents, leaning, TokenTests(p, benjamini_hochberg(p, max(family, p.size)), family))


def leading_ids(counts: TokenCounts, experts: Sequence[int], least: int = LEAST, most: int = 20) -> np.ndarray:
    """int64, ascending: the ids that ``top_tokens`` may name for any of ``experts``: with all that tie with the last."""
    looked = _Looked.at(counts, least)
    found = [looked.ids[looked.highest(counts, expert, most)[0]] for expert in experts]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def top_tokens(trace: Trace, counts: TokenCounts, expert: int, least: int = LEAST, most: int = 20, draws: int = DRAWS,
               seed: int = 0, use: DocumentUse | None = None) -> tuple[TokenUse, ...]:  # fmt: skip
    """The expert's ids by falling lift, among those seen at least ``least`` times and used more often than elsewhere.

    Without ``draws`` each p is 1. Ties by falling number of documents (with ``use``), by falling count, then by id: an expert that takes every occurrence of many ids gives
    them all one lift. Empty where nothing is. ``use``: ``document_use`` of the same counts, of all ids or at least of ``leading_ids``.
    """
    return top_tokens_of(trace, counts, [expert], least, most, draws, seed, use)[0]


def top_tokens_of(trace: Trace, counts: TokenCounts, experts: Sequence[int], least: int = LEAST, most: int = 20, draws: int = DRAWS,
                  seed: int = 0, use: DocumentUse | None = None) -> tuple[tuple[TokenUse, ...], ...]:  # fmt: skip
    """``top_tokens`` of each of ``experts``, shared out among the cores."""
    one = partial(_top_uses, counts, _Looked.at(counts, least), most=most, draws=draws, seed=seed, use=use)
    found = on_cores(one, experts)
    ids = np.unique([use.token_id for uses in found for use in uses]).astype(np.int64)
    text = dict(zip(ids.tolist(), token_texts(trace, ids, trace.layers[counts.site].stream), strict=True))
    return tuple(tuple(replace(use, text=text[use.token_id]) for use in uses) for uses in found)


@dataclass(frozen=True)
class _Looked:
    """The ids that are looked at, I of them, all int64: ``ids``, ``tokens`` and ``dealt`` [I], tokens and assignments of each.

    all_dealt, all_tokens  of every id.  place [V + 1]: index into ids of those of the counts, I for the others.  cells: of each expert.
    sizes  (the values of ``dealt``, how many ids have each).
    """

    ids: np.ndarray
    tokens: np.ndarray
    dealt: np.ndarray
    all_dealt: int
    all_tokens: int
    place: np.ndarray
    cells: list[np.ndarray]
    sizes: tuple[np.ndarray, np.ndarray]

    @classmethod
    def at(cls, counts: TokenCounts, least: int) -> _Looked:
        dealt = np.bincount(counts.row, counts.count, len(counts.ids)).astype(np.int64)
        often = np.flatnonzero((counts.tokens >= least) & (dealt > 0))
        place = np.full(len(counts.ids), len(often))
        place[often] = np.arange(len(often))
        order = counts.expert.astype(np.uint16).argsort(kind="stable")
        cells = np.split(order, np.cumsum(np.bincount(counts.expert, minlength=counts.classes))[:-1])
        return cls(counts.ids[often], counts.tokens[often], dealt[often], int(dealt.sum()), int(counts.tokens.sum()), place, cells,
                   np.unique(dealt[often], return_counts=True))  # fmt: skip

    def highest(self, counts: TokenCounts, expert: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """(high, used, share, lift, total): the ``most`` ids of highest lift and what ties with the last of these, as indices into ids;
        figures of them all [I]; and the expert's assignments.
        """
        mine = self.cells[expert]
        used, total = np.zeros(len(self.ids) + 1, np.int64), int(counts.count[mine].sum())
        used[self.place[counts.row[mine]]] = counts.count[mine]
        used = used[:-1]
        share = used / self.tokens
        lift = share / (total / self.all_tokens) if total else np.zeros(len(used))
        high = np.flatnonzero(lift > 1)
        if len(high) > most:
            high = high[lift[high] >= -np.partition(-lift[high], most - 1)[most - 1]]
        return high, used, share, lift, total


def _top_uses(counts: TokenCounts, looked: _Looked, expert: int, *, most: int, draws: int, seed: int,
              use: DocumentUse | None) -> list[TokenUse]:  # fmt: skip
    """Without texts."""
    high, used, share, lift, total = looked.highest(counts, expert, most)
    if not len(high):
        return []
    found = looked.ids[high]
    spread_over = np.zeros(len(high)) if use is None else use.documents[np.searchsorted(use.ids, found)]
    order = high[np.lexsort((found, -used[high], -spread_over, -lift[high]))][:most]
    rate = total / looked.all_dealt
    expected, spread = looked.dealt * rate, np.sqrt(looked.dealt)  # binomial error but for a factor all ids share
    standing = (used - expected) / spread
    if not draws or draws * _reached(*looked.sizes, rate, float(standing[order].min())) < CERTAIN:
        maximum = np.full(draws, -np.inf)  # no draw comes near
    else:
        colours = np.append(looked.dealt, looked.all_dealt - looked.dealt.sum())  # rare ids together: none of them is looked at
        null = np.random.default_rng(seed).multivariate_hypergeometric(colours, total, draws, method="marginals")[:, :-1]
        maximum = ((null - expected) / spread).max(1)
    ids, tokens, p = looked.ids[order], looked.tokens[order], family_p(standing[order], maximum, False)
    row = None if use is None else np.searchsorted(use.ids, ids)
    told = [[None] * len(order)] * 4 if use is None else [x.tolist() for x in (
        use.documents[row], use.leaning[row, expert], use.tests.p[row, expert], use.tests.q[row, expert])]  # fmt: skip
    return [TokenUse(int(ids[i]), None, int(used[at]), int(tokens[i]), float(share[at]), float(lift[at]), float(p[i]),
                     *(x[i] for x in told)) for i, at in enumerate(order)]  # fmt: skip


def _reached(dealt: np.ndarray, times: np.ndarray, rate: float, standing: float) -> float:
    """Bound on P(an id's assignments, dealt at random, exceed what is expected by ``standing`` x sqrt(dealt)), summed over ids, ``times`` of each.

    Hoeffding 1963: draws without return keep the binomial's bound exp(-n KL(q || rate)).
    """
    q = rate + standing * (1 - 1e-6) / np.sqrt(dealt)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = q * np.log(q / rate) + (1 - q) * np.log((1 - q) / (1 - rate))
        bound = np.exp(-dealt * exponent)
    return float(times @ np.where(q >= 1, np.where(q > 1, 0.0, rate**dealt), np.where(q <= rate, 1.0, bound)))
