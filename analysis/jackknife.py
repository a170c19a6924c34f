"""How far vocabulary specialization depends on which documents were recorded: documents are left out one by one.

Documents drawn again with replacement, as for other figures, mislead here. Eq. 8 takes the largest of an id's shares, which is the
higher the fewer documents hold the id, and a document drawn twice adds none. In five simulated worlds (tests/test_jackknife.py), how often
95 % intervals held the figure's mean over new collections of documents: percentile bootstrap 0 to 82 % of the time, basic 0 to 68, percentile
moved to be centred at the figure 86 to 100; leaving out documents (Tukey 1958) 95 to 100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .specialization import MOST_UNITS, blocks, owners
from .trace import Trace
from .vocabulary import LEAST, TokenCounts, coded, summed

FEWEST = 4  # documents for an interval: with fewer, how much they differ is not known
PAIRS = 1 << 21  # (document, id) x expert looked at at a time: 16 MiB, and three copies of it
COVERAGE = 0.95


@dataclass(frozen=True)
class DocumentInterval:
    """``value`` and a 95 % interval for its mean over other collections of as many documents like these.

    value      mean over the ids seen at least ``least`` times of the largest share any expert has of the id's tokens, 0 to 1.
    low, high  95 % interval, within 0 to 1; NaN where ``missing`` says why there is none.
    documents  recorded at the site.  left_out  parts of them left out in turn: single documents, or ``MOST_UNITS`` runs of documents.

    Not for the shares that endless text would give: what rare ids add to the figure is in its interval, as it is in the figure by chance
    beside it. Errs on the wide side (in the simulations 1.5 to 2.1 times what is needed) because ids that
    fall below ``least`` when a document is left out are left out too.
    """

    value: float
    low: float
    high: float
    documents: int
    left_out: int
    missing: str = ""


def vocabulary_interval(trace: Trace, counts: TokenCounts, least: int = LEAST,
                        progress: Callable[[int, int], None] | None = None) -> DocumentInterval:  # fmt: skip
    """Of VocabularySpecialization.frequent. One pass over the site; ``progress`` is told (tokens read, tokens in all).

    Nothing is drawn: the same run gives the same interval. Memory: the cells of one block of tokens and of one part of the documents,
    ``PAIRS``, and five int64 per token of the stream (140 MB for 10^6 tokens of 64 experts, top-8). ``missing`` where the run holds statistics only, has too few documents, or one of them holds all frequent ids.
    """
    often = np.flatnonzero(counts.tokens >= least)
    kept = _Kept.of(counts, often)
    value = float(kept.share.mean()) if len(often) else float("nan")
    if trace.source is None or trace.load_tokens is None:
        return DocumentInterval(value, np.nan, np.nan, 0, 0, "the run holds statistics only, no decisions of single documents")
    owner = owners(trace.stream_tokens(trace.layers[counts.site].stream, columns=["document"])["document"].to_numpy())
    documents = int(owner[-1]) + 1 if len(owner) else 0
    parts = min(documents, MOST_UNITS)
    if documents < FEWEST:
        return DocumentInterval(value, np.nan, np.nan, documents, 0, f"fewer than {FEWEST} documents")
    total, number = np.full(parts, kept.share.sum()), np.full(parts, len(often))
    for part, index, used in _pairs(trace, counts, often, owner * parts // documents, progress):
        share = kept.without(index, used, least)
        there = np.isfinite(share)
        total += np.bincount(part, np.where(there, share, 0) - kept.share[index], parts)
        number -= np.bincount(part[~there], minlength=parts)
    if not number.all():
        return DocumentInterval(
            value, np.nan, np.nan, documents, parts, "no token id is seen so often when one of the documents is left out"
        )
    low, high = jackknife_interval(value, total / number)
    return DocumentInterval(value, max(low, 0.0), min(high, 1.0), documents, parts)


def jackknife_interval(value: float, without: np.ndarray, coverage: float = COVERAGE) -> tuple[float, float]:
    """(low, high) around ``value`` from the figure without each of ``FEWEST`` or more parts [g]; Student's t with g - 1 degrees of freedom.

    Variance (g - 1) / g x sum of squared differences from their mean. Efron and Tibshirani 1993, chapter 11.
    """
    g = len(without)
    error = float(np.sqrt((g - 1) / g * ((without - without.mean()) ** 2).sum()))
    wide = _student(NormalDist().inv_cdf((1 + coverage) / 2), g - 1) * error
    return value - wide, value + wide


def _student(z: float, freedom: int) -> float:
    """Quantile of Student's t where the normal's is z; off by 0.1 % at 3 degrees of freedom, less above. Abramowitz and Stegun 26.7.5."""
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)  # fmt: skip
    return sum(term / freedom**i for i, term in enumerate(terms))


@dataclass(frozen=True)
class _Kept:
    """Counts of the ids looked at, I of them: their cells lie side by side from ``start`` [I], ``length`` [I] each, in expert and count.

    tokens  int64 [I].  share  float64 [I]: the largest share any expert has.
    """

    classes: int
    tokens: np.ndarray
    start: np.ndarray
    length: np.ndarray
    expert: np.ndarray
    count: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, counts: TokenCounts, often: np.ndarray) -> _Kept:
        start, stop = np.searchsorted(counts.row, often), np.searchsorted(counts.row, often, "right")
        top = np.zeros(len(counts.ids), np.int64)
        np.maximum.at(top, counts.row, counts.count)
        return cls(
            counts.classes, counts.tokens[often], start, stop - start, counts.expert, counts.count, top[often] / counts.tokens[often]
        )

    def without(self, index: np.ndarray, used: np.ndarray, least: int) -> np.ndarray:
        """float64 [P]: largest share of the ids ``index`` [P] less ``used`` int64 [P, classes + 1], per expert and, last, tokens.

        NaN for an id then seen fewer than ``least`` times.
        """
        length = self.length[index]
        at = np.repeat(self.start[index] - np.cumsum(length) + length, length) + np.arange(length.sum())
        left = -used[:, :-1]
        left[np.repeat(np.arange(len(index)), length), self.expert[at]] += self.count[at]
        tokens = self.tokens[index] - used[:, -1]
        return np.where(tokens >= least, left.max(1) / np.maximum(tokens, 1), np.nan)


def _pairs(trace: Trace, counts: TokenCounts, often: np.ndarray, part: np.ndarray,
           progress: Callable[[int, int], None] | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
    """(part [P], index into ``often`` [P], int64 [P, classes + 1] assignments per expert and, last, tokens) of every pair, once.

    ``part`` int64 [tokens] rises: what a block has of its last part waits for the next block.
    """
    layer = trace.layers[counts.site]
    every, code = coded(trace, layer.stream, counts.kind)
    place = np.full(len(every) + 1, -1)  # the last for tokens that have no id
    place[np.searchsorted(every, counts.ids[often])] = np.arange(len(often))
    place, width, step = place[code], layer.n_classes + 1, max(PAIRS // (layer.n_classes + 1), 1)
    cells, n = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start, experts in blocks(trace, layer):
        stop = start + len(experts)
        asked = np.flatnonzero(place[start:stop] >= 0)
        pair = part[start:stop][asked] * len(often) + place[start:stop][asked]
        mine = experts[asked]
        keys = np.concatenate([(pair[:, None] * width + mine)[mine >= 0], pair * width + width - 1])
        found = np.unique(keys, return_counts=True)
        cells, n = summed(np.concatenate([cells, found[0]]), np.concatenate([n, found[1]]))
        ready = len(cells) if stop == len(part) else int(np.searchsorted(cells, part[stop - 1] * len(often) * width))
        yield from _tables(cells[:ready], n[:ready], len(often), width, step)
        cells, n = cells[ready:], n[ready:]
        if progress is not None:
            progress(stop, len(part))


def _tables(cells: np.ndarray, n: np.ndarray, ids: int, width: int, step: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``_pairs`` of sorted cells (part x ids + id) x width + class, ``step`` pairs at a time."""
    pair, place = np.divmod(cells, width)
    first = np.append(np.flatnonzero(np.append(True, pair[1:] != pair[:-1])[: len(pair)]), len(pair))
    for begin in range(0, len(first) - 1, step):
        bounds = first[begin : begin + step + 1]
        mine = slice(bounds[0], bounds[-1])
        used = np.zeros((len(bounds) - 1, width), np.int64)
        used[np.repeat(np.arange(len(used)), np.diff(bounds)), place[mine]] = n[mine]
        part, index = np.divmod(pair[bounds[:-1]], ids)
        yield part, index, used
