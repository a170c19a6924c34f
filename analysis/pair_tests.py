"""Do experts meet beyond chance? Co-activation and flow of one site, tested and with intervals whose unit is the document.

The question is put within documents: a document's own loads say what its pairs would be by chance, so documents that differ in the
experts they use make no partners. One pass over the decisions; what stays in memory is one table of pairs per unit, int32, at most
TABLE_BYTES in all. Effects are those of ``paths``; knows nothing of screens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil, log2

import numpy as np
import pyarrow as pa

from .paths import PairCounts, coactivation, flow, partner_odds
from .reading import ROWS, documents_of, in_turn
from .significance import ALPHA, INTERVAL_DRAWS, MOST_UNITS, benjamini_hochberg, count_p, draws_for, interval, sign_flip_test
from .trace import LayerInfo, Trace

TABLE_BYTES = 110_000_000  # 400 units of 256 x 256 experts
LEAST_UNITS = 1 + ceil(log2(1 / ALPHA))  # the smallest p of sign flips is 2 of 2^units
CELLS = 4_096, 128  # cells tested at a time, and drawn again: 1 MB of draws stays in the cache
NO_DECISIONS = "Not tested: the run holds statistics only. Record the decisions themselves."
ONE_DOCUMENT = "Not tested: one document says nothing about others. Record more."
NO_PAIRS = "Not tested: the layer sends each token to one expert, so that no pair occurs."
TOO_MANY = "Not tested: tables of so many experts do not fit in memory for enough documents."
LAST_SITE = "Not tested: no layer follows in this stream."
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PairTest:
    """What ``counts`` found, cell by cell [rows, columns]; NaN where nothing could be told: the diagonal, experts without a token.

    low, high    95 % percentile bootstrap interval of counts.lift over units; NaN where more than 2.5 % of the draws hold none of the
                 experts.
    p, q         see ``coactivation_test``, ``flow_test``; q corrects for all cells of this site and kind (Benjamini and Hochberg).
    significant  q <= ALPHA, and the units lean the way that lift does.  tested  cells with a p, each pair once.
    units        documents, or runs of them, that signs and draws are taken over; ``documents`` in all.
    missing      why nothing is significant whatever the documents hold, and what to do; empty where something could be.
    """

    site: int
    kind: str
    counts: PairCounts
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    q: np.ndarray
    significant: np.ndarray
    tested: int
    units: int
    documents: int
    method: str
    missing: str = ""

    @property
    def claimed(self) -> int:
        """Pairs that are ``significant``, each once."""
        return int(self.significant.sum()) // (2 if self.kind == "pairs" else 1)

    def table(self) -> pa.Table:
        """One row per cell: site, expert, other, units, then counts and tests; log2_lift is -inf of a pair that never met."""
        rows, columns = self.p.shape
        e, f = np.divmod(np.arange(rows * columns, dtype=np.int32), max(columns, 1))
        with np.errstate(divide="ignore"):
            effect = {"observed": self.counts.observed, "expected": self.counts.expected, "lift": self.counts.lift}
            effect["log2_lift"] = np.log2(self.counts.lift)
        cells = effect | {n: getattr(self, n) for n in ("low", "high", "p", "q", "significant")}
        keys: dict[str, object] = {
            "site": np.full(len(e), self.site, np.int16),
            "expert": e,
            "other": f,
            "units": np.full(len(e), self.units),
        }
        return pa.table({**keys, **{n: x.ravel() for n, x in cells.items()}})


def coactivation_test(trace: Trace, site: int, progress: Progress | None = None, seed: int = 0) -> PairTest:
    """Which experts does a token use together more, or less, often than the loads alone give?

    Null: within each document experts are drawn at fixed odds without return, as many as each token has, at odds that give the document's
    loads (the most even law with these loads; for two experts per token the quasi-independent one). Statistic: signs of whole units
    flipped on observed - expected; p is at least that of independent tokens. ``progress`` is told (tokens read, tokens in all).
    """
    return pair_tests(trace, [("pairs", site)], progress, seed)[0]


def flow_test(trace: Trace, site: int, progress: Progress | None = None, seed: int = 0) -> PairTest:
    """From which expert here do tokens go on to which at the next site of the stream more, or less, often than the loads alone give?

    As ``coactivation_test``, with row total x column total / n within each document expected.
    """
    return pair_tests(trace, [("flow", site)], progress, seed)[0]


def pair_tests(trace: Trace, asked: Sequence[tuple[str, int]], progress: Progress | None = None, seed: int = 0) -> list[PairTest]:
    """``coactivation_test`` of each ("pairs", site) and ``flow_test`` of each ("flow", site): one pass for all, where their tables fit in memory."""
    found = {(kind, site): _untested(trace, kind, site) for kind, site in asked}
    todo = [x for x, test in found.items() if not test.missing]
    streams = {trace.layers[site].stream for _, site in todo}
    room = sum(8 * MOST_UNITS * found[x].counts.observed.size for x in todo)
    passes = [todo] if len(streams) == 1 and room <= 2 * TABLE_BYTES else [[x] for x in todo]
    for done, some in enumerate(passes):
        after = [(site, site if kind == "pairs" else trace.stats.following[site]) for kind, site in some]
        lengths = documents_of(trace, trace.layers[some[0][1]].stream)[1]
        tell = progress and partial(_of_passes, progress, done, len(passes))
        counted = count_units(trace, [(a, b) for a, b in after if b is not None], lengths, tell)
        found |= {x: _tested(found[x], units, seed) for x, units in zip(some, counted, strict=True)}
    return [found[x] for x in asked]


def _of_passes(progress: Progress, passed: int, passes: int, done: int, total: int) -> None:
    progress(passed * total + done, passes * total)


def _untested(trace: Trace, kind: str, site: int) -> PairTest:
    """What is known without decisions, and ``missing``, why they would tell nothing; empty where they may."""
    counts, layer = coactivation(trace, site) if kind == "pairs" else flow(trace, site), trace.layers[site]
    missing, documents = "", 0
    if kind == "pairs" and layer.top_k < 2:
        missing = NO_PAIRS
    elif kind == "flow" and trace.stats.following[site] is None:
        missing = LAST_SITE
    elif trace.source is None:
        missing = NO_DECISIONS
    else:
        documents = len(documents_of(trace, layer.stream)[1])
        if documents < 2:
            missing = ONE_DOCUMENT
        elif _fitting(counts.observed.size) < LEAST_UNITS <= documents:
            missing = TOO_MANY
    unknown = np.full(counts.observed.shape, np.nan)
    return PairTest(site, kind, counts, unknown, unknown, unknown, unknown, np.zeros(unknown.shape, bool), 0, documents, documents,
                    "no test", missing)  # fmt: skip


def _tested(known: PairTest, counted: UnitPairs, seed: int) -> PairTest:
    counts, kind, every = known.counts, known.kind, known.documents
    one, two = np.triu_indices(len(counts.observed), 1) if kind == "pairs" else (x.ravel() for x in np.indices(counts.observed.shape))
    one, two = (x[counts.expected[one, two] > 0] for x in (one, two))
    excess = counted.excess[:, one, two]
    p, draws, least = _p_values(excess, counted.expected[one, two], counted.spread[one, two], seed)
    low, high = _intervals(counted.tables, one, two, kind, seed)
    q = benjamini_hochberg(p)
    claimed = (q <= ALPHA) & (np.sign(excess.sum(0, dtype=np.float64)) == np.sign(counts.lift[one, two] - 1))
    placed = [_placed(x, counts.observed.shape, one, two, kind) for x in (low, high, p, q, claimed.astype(np.float64))]
    units = len(counted.tables)
    of = f"{every:,} documents" if units == every else f"{units:,} groups of whole documents ({every:,} in all)"
    few = (f"Too few documents to tell: with {every} the smallest possible p is {least:.2f} before correction. Record at least"
           f" {LEAST_UNITS}, better many more.") if least > ALPHA else ""  # fmt: skip
    return replace(known, low=placed[0], high=placed[1], p=placed[2], q=placed[3], significant=placed[4] == 1, missing=few,
                   tested=int(np.isfinite(p).sum()), units=units, method=f"signs of {of} flipped: {draws}")  # fmt: skip


def _placed(values: np.ndarray, shape: tuple[int, ...], one: np.ndarray, two: np.ndarray, kind: str) -> np.ndarray:
    out = np.full(shape, np.nan)
    out[one, two] = values
    if kind == "pairs":
        out[two, one] = values
    return out


@dataclass(frozen=True)
class UnitPairs:
    """Units are documents, or at most MOST_UNITS and TABLE_BYTES of runs of them; cells are [classes here, classes after].

    tables    int32 [units, *cells]: tokens with both; of a site with itself the diagonal holds the loads.
    excess    float32 [units, *cells]: these less what the loads of each single document give; of a site with itself above the diagonal.
    expected  float64 [*cells]: the latter summed.  spread  its variance: that of tokens dealt at random within documents, loads given.
    """

    tables: np.ndarray
    excess: np.ndarray
    expected: np.ndarray
    spread: np.ndarray


def count_units(trace: Trace, pairs: Sequence[tuple[int, int]], lengths: np.ndarray, progress: Progress | None = None) -> list[UnitPairs]:
    """Pairs of experts at each (site, after) of one stream, in documents of these lengths; every site's decisions are decoded once for all, and pairs are counted side by side."""
    layers, n = [trace.layers[i] for i in sorted({site for pair in pairs for site in pair})], int(lengths.sum())
    counts = [_Counting(trace.layers[a], trace.layers[b], lengths) for a, b in pairs]

    def read(start: int) -> tuple[int, int, dict[int, _Rows]]:
        return start, min(start + ROWS, n), _rows(trace, layers, start, min(start + ROWS, n))

    with (
        closing(in_turn(read, range(0, n, ROWS))) as blocks,
        ThreadPoolExecutor(len(counts)) as pool,
    ):  # the next ones are read while one is counted
        for start, stop, rows in blocks:
            list(pool.map(partial(_Counting.add, start=start, stop=stop, rows=rows), counts))
            if progress is not None:
                progress(stop, n)
    return [x.found() for x in counts]


class _Counting:
    """UnitPairs of two sites, or of one with itself, in the making."""

    def __init__(self, here: LayerInfo, there: LayerInfo, lengths: np.ndarray) -> None:
        self.here, self.there, shape = here, there, (here.n_classes + 1, there.n_classes + 1)
        units = max(2, min(len(lengths), MOST_UNITS, _fitting(here.n_classes * there.n_classes)))
        owner, self.ends = np.arange(len(lengths)) * units // len(lengths), np.cumsum(lengths)
        self.last = self.ends[np.append(np.flatnonzero(np.diff(owner)), -1)]  # where each unit ends
        self.tables, self.excess = np.zeros((units, *shape), np.int32), np.zeros((units, *shape), np.float32)
        self.chance, self.expected, self.spread = (np.zeros(shape) for _ in range(3))
        sizes = (shape[0], here.top_k + 1) if here == there else (shape[0], shape[0], shape[1], shape[1], 1)
        self.held = tuple(np.zeros(n, np.int64) for n in sizes)

    def add(self, start: int, stop: int, rows: Mapping[int, _Rows]) -> None:
        """Count rows ``start`` to ``stop``, the next ones; ``rows`` by site."""
        last, ends, chance = self.last, self.ends, self.chance
        here, after = rows[self.here.index], rows[self.there.index]
        count = self._count_bits if len(here.words) and len(after.words) else self._count_slots
        for unit in range(int(np.searchsorted(last, start, "right")), int(np.searchsorted(last, stop - 1, "right")) + 1):
            first, end = max(int(last[unit - 1]) if unit else 0, start), min(int(last[unit]), stop)
            whole = ends[np.searchsorted(ends, first, "right") : np.searchsorted(ends, end, "right")] - first
            count(here, after, slice(first - start, end - start), whole, self.tables[unit])
            if end == last[unit]:
                lean = self.tables[unit] - chance
                self.excess[unit] = np.where(np.abs(lean) > 1e-6 * (1 + chance), lean, 0)  # what only the fit left is no lean
                self.expected += chance
                chance[:] = 0

    def _count_slots(self, here: _Rows, after: _Rows, at: slice, whole: np.ndarray, table: np.ndarray) -> None:
        """Rows ``at`` of both, in which documents end at ``whole``, added to ``table`` and to what is by chance."""
        from .bittables import count_pairs  # pays for numba
        from .chance_pairs import add_chance_flow, add_chance_pairs

        mine, later = here.slots[at], after.slots[at]
        count_pairs(mine, later, table)
        if self.here == self.there:
            add_chance_pairs(mine, whole, self.held, self.chance, self.spread)
        else:
            add_chance_flow(mine, later, whole, self.held, self.chance, self.spread)

    def _count_bits(self, here: _Rows, after: _Rows, at: slice, whole: np.ndarray, table: np.ndarray) -> None:
        """The same of rows that all have k different experts, of which a document's loads are all that chance asks for."""
        from .bittables import count_pairs_by_bits  # pays for numba
        from .chance_pairs import add_chance_flow_of, add_chance_pairs_of

        starts = np.concatenate([[0], whole, [at.stop - at.start]])
        bits, loads = here.counted(at, starts)
        if self.here == self.there:
            count_pairs_by_bits(bits, bits.view(), table)  # both halves
            add_chance_pairs_of(loads, starts, self.held, self.chance, self.spread)
        else:
            later, loads_after = after.counted(at, starts)
            count_pairs_by_bits(bits, later, table)
            each = self.here.top_k, self.there.top_k
            add_chance_flow_of(loads, loads_after, each, starts, self.held, self.chance, self.spread)

    def found(self) -> UnitPairs:
        """What was counted of all rows."""
        return UnitPairs(self.tables[:, 1:, 1:], self.excess[:, 1:, 1:], self.expected[1:, 1:], self.spread[1:, 1:])


@dataclass(frozen=True)
class _Rows:
    """Checked ids [n, k] of a site, and uint64 [n] the experts of each row as bits: none unless pairs are counted faster by them."""

    layer: LayerInfo
    experts: np.ndarray
    words: np.ndarray

    @cached_property
    def slots(self) -> np.ndarray:
        """For those who look at every row."""
        from .counting import slots_of  # pays for numba

        return slots_of(self.experts)

    def counted(self, at: slice, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(table of bits, int32 [runs, slots] assignments) of rows ``at``, in which runs begin at ``starts``, and the end of the last."""
        from .bittables import bits_of, count_runs_by_bits  # pay for numba

        bits, loads = bits_of(self.words[at], n := self.layer.n_classes + 1, self.layer.top_k), np.zeros((len(starts) - 1, n), np.int32)
        if bits is None:
            raise ValueError(f"no words of {self.layer.title}")
        count_runs_by_bits(bits, starts, loads)
        return bits, loads


def _rows(trace: Trace, layers: Sequence[LayerInfo], start: int, stop: int) -> dict[int, _Rows]:
    """Rows ``start`` to ``stop`` of a stream, by site."""
    from .bittables import words_of, worth_bits  # pay for numba
    from .counting import check_ids

    rows = {}
    for layer in layers:
        experts = trace.experts(layer.index, start, stop)
        check_ids(experts, layer.n_classes)
        worth = worth_bits(layer.n_classes + 1, layer.top_k)
        rows[layer.index] = _Rows(layer, experts, words_of(experts) if worth else np.zeros(0, np.uint64))
    return rows


def _fitting(cells: int) -> int:
    return TABLE_BYTES // (4 * max(cells, 1))


def _p_values(excess: np.ndarray, mean: np.ndarray, spread: np.ndarray, seed: int) -> tuple[np.ndarray, str, float]:
    """(p [cells], the test in words, the smallest p possible).

    Where no drawn sign pattern reaches the statistic t, p is at most 2 exp(-t^2 / 2) of Hoeffding's inequality, which binds all
    patterns; so cells stay apart that sampling alone could not. Signs know nothing of counts too small to lean either way (a pair
    expected 0.01 times in each of 100 units and never seen leans one way in all): p is at least that of independent tokens.
    """
    p, least, said = np.full(len(mean), np.nan), 1.0, ""
    draws = draws_for(len(excess), 1, len(mean))
    for start in range(0, len(mean), CELLS[0]):
        at = slice(start, start + CELLS[0])
        test = sign_flip_test(excess[:, at].astype(np.float64), draws, seed, family=False)
        with np.errstate(invalid="ignore"):
            far = (test.p <= 1 / (test.draws + 1)) & (not test.exact)
            p[at] = np.where(far, np.minimum(test.p, 2 * np.exp(-(test.statistic**2) / 2)), test.p)
        said = test.method
        least = min(least, 2.0 ** (1 - int((excess[:, at] != 0).sum(0).max(initial=1))))
    return np.maximum(p, count_p(mean + excess.sum(0, dtype=np.float64), mean, spread)), said, least


def _intervals(tables: np.ndarray, one: np.ndarray, two: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of lift [cells]: units drawn again, expected counts from the loads of each draw."""
    low, high = np.full(len(one), np.nan), np.full(len(one), np.nan)
    weights = np.random.default_rng(seed).multinomial(len(tables), np.full(len(tables), 1 / len(tables)), INTERVAL_DRAWS).T
    most, single, double = weights.max(), weights.astype(np.float32), weights.astype(np.float64)

    def drawn(counts: np.ndarray) -> np.ndarray:  # [units, cells] -> float64 [cells, draws]
        exact = counts.sum(0).max(initial=0) * most < 2**24  # then single precision rounds no sum of whole numbers
        return (counts.T.astype(np.float32) @ single).astype(np.float64) if exact else counts.T.astype(np.float64) @ double

    if kind == "pairs":
        left = right = partner_odds(drawn(tables.sum(2) - tables.diagonal(axis1=1, axis2=2)).T, 1_000, 1e-6).T.copy()
    else:
        left, right = drawn(tables.sum(2)), drawn(tables.sum(1))
        left /= np.maximum(left.sum(0), 1)
    for start in range(0, len(one), CELLS[1]):
        at = slice(start, start + CELLS[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            by_chance = left[one[at]]
            by_chance *= right[two[at]]
            lift = drawn(tables[:, one[at], two[at]])
            lift /= by_chance
        low[at], high[at] = interval(lift.T)
        known = np.isfinite(lift)
        for cell in np.flatnonzero(~known.all(1)):
            some = known[cell].mean() >= 0.975
            low[at][cell], high[at][cell] = interval(lift[cell, known[cell]]) if some else (np.nan, np.nan)
    return low, high
