"""What kinds of text does each expert of a site serve, and is it more than chance?

A *group* is a kind of tokens: those of one label, one token class, one stretch of positions. For every group and
expert: how many of the group's tokens use the expert, against all others, with an interval over documents and a test
whose unit is the document. Definitions: OLMoE (arXiv 2409.02060) eq. 7 for the share; ESFT (arXiv 2407.01906) eq. 4-5.
Knows nothing of screens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count as count_from

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .information import Information, ceiling, plug_in, table_information
from .reading import Reading, coded_tokens, one_pass
from .significance import (
    ALPHA,
    INTERVAL_DRAWS,
    MOST_UNITS,
    PSEUDO,
    Verdict,
    benjamini_hochberg,
    bootstrap_sums,
    count_p,
    enrichment,
    interval,
    least_deal,
    least_flips,
    permutation_test,
    rearranged_labels,
    sign_flip_test,
)  # fmt: skip
from .trace import Trace
from .within import kind_reading

_FLOOR = ", p at least that of independent tokens"
_BUNCHED = ", p at least that of tokens dealt at random within documents in such bunches as are seen"
_ONE_LABEL = "Nothing to compare: effects of a label need documents of another. Record some."
_NO_DOCUMENTS = "The run holds counts without documents: effects are shown, none can be tested. Record the documents themselves."


@dataclass(frozen=True)
class Preferences:
    """How G groups of tokens use the E classes of one site. Arrays are [G, E] unless said otherwise.

    tokens       int64 [G]: n, tokens of the group.  documents  int64 [G]: documents they come from.
    count        int64: of these, tokens that use the expert.
    share        count / tokens, 0 to 1; by chance (uniform routing) k / E. OLMoE eq. 7.
    elsewhere    the same over the tokens of all other groups.
    lift         share / share over all groups; 1 = as often as anywhere.
    enrichment   log2 of share over elsewhere, half a token added to each side; 0 = no difference.
    within       the same comparison made inside each document and summed up: log2 of Mantel and Haenszel's ratio (1959; for shares Greenland and
                 Robins 1985), half a token added to each side. Documents of one group alone say nothing; NaN where all are, as of labels.
    low, high    95 % percentile bootstrap interval of enrichment over documents; NaN with fewer than 2 of them.
    p, q         of the test that ``method`` describes; q corrects for all G x E cells of this site and kind (Benjamini and Hochberg).
    family_p     P(the largest statistic of all these cells is at least this one), see significance.Verdict.
    significant  q <= ALPHA. False where nothing could be tested.
    missing      why no cell could be significant whatever its documents do, and what to do; empty where one could.
    """

    site: int
    kind: str
    groups: tuple[str, ...]
    tokens: np.ndarray
    documents: np.ndarray
    count: np.ndarray
    share: np.ndarray
    elsewhere: np.ndarray
    lift: np.ndarray
    enrichment: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    q: np.ndarray
    family_p: np.ndarray
    significant: np.ndarray
    method: str
    within: np.ndarray
    missing: str = ""

    def table(self) -> pa.Table:
        """One row per cell: site, the kind ("label", ...), expert, n, documents, then every column above."""
        g, e = self.count.shape
        columns: dict[str, object] = {"site": np.full(g * e, self.site, np.int16), self.kind: np.repeat(np.array(self.groups, object), e)}
        columns |= {"expert": np.tile(np.arange(e, dtype=np.int32), g), "n": np.repeat(self.tokens, e)}
        columns["documents"] = np.repeat(self.documents, e)
        names = ("count", "share", "elsewhere", "lift", "enrichment", "low", "high", "within", "p", "q", "family_p", "significant")
        return pa.table({**columns, **{n: getattr(self, n).ravel() for n in names}})


@dataclass(frozen=True)
class DocumentCounts:
    """Labelled units of one site: usually documents; where there are many, runs of documents of one label.

    labels  sorted names.  codes  int64 [units] into labels.  tokens  int64 [units].  counts  int64 [units, classes].
    documents  int64 [units]: documents in each unit.
    """

    labels: tuple[str, ...]
    codes: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    documents: np.ndarray


def labelled_documents(trace: Trace, site: int, most: int = MOST_UNITS) -> DocumentCounts:
    """Counts per labelled document of a site's stream. More than ``most`` are joined, in order, within their label."""
    rows = trace.documents_in(trace.layers[site].stream)
    rows = rows.filter(pc.and_(pc.is_valid(rows["label"]), pc.greater(rows["n_tokens"], 0)))
    coded = rows["label"].combine_chunks().dictionary_encode()
    names = coded.dictionary.to_pylist()
    labels = tuple(sorted(names))
    codes = np.array([labels.index(x) for x in names], np.int64)[coded.indices.to_numpy()]
    numbers, tokens = rows["document"].to_numpy(), rows["n_tokens"].to_numpy().astype(np.int64)
    if len(codes) <= most:
        return DocumentCounts(labels, codes, tokens, trace.stats.document_load(site, numbers), np.ones(len(codes), np.int64))
    unit = _units(codes, most)
    first = np.unique(unit, return_index=True)[1]
    sizes = np.bincount(unit, tokens).astype(np.int64)  # floats are exact below 2^53
    return DocumentCounts(labels, codes[first], sizes, trace.stats.document_load(site, numbers, unit), np.bincount(unit))


def _units(codes: np.ndarray, most: int) -> np.ndarray:
    """int64 [documents], from 0 on: at most about ``most`` units of whole documents, each of one label, as many per label as its documents' share."""
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    units = np.maximum(np.minimum(sizes, 2), sizes * most // len(codes))
    rank = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found = np.empty(len(codes), np.int64)
    found[order] = np.repeat(np.cumsum(units) - units, sizes) + rank * units[codes[order]] // sizes[codes[order]]
    return found


def by_label(trace: Trace, site: int, draws: int | None = None, seed: int = 0) -> Preferences:
    """Preferences of labels. Null: labels dealt at random to whole documents; p is no smaller than if tokens were independent, which
    keeps counts of a few tokens from being claimed where labels differ in their documents' lengths. NaN p without two labels of documents.

    From statistics alone; no decision is read. A run of counts without documents gives shares and effects, no test.
    """
    plain = label_effects(trace, site)
    labels = plain.groups
    units = labelled_documents(trace, site)
    if units.labels != labels or len(labels) < 2:
        return replace(
            plain,
            method="no test: labels of at least two kinds of documents are needed",
            missing=_ONE_LABEL if len(labels) < 2 else _NO_DOCUMENTS,
        )
    rate = units.counts.sum(0) / units.tokens.sum()
    expected = plain.tokens[:, None] * rate
    floor = count_p(plain.count, expected, expected * (1 - rate) * (1 - plain.tokens / units.tokens.sum())[:, None])
    test = permutation_test(units.counts, units.tokens, units.codes, draws, seed).at_least(floor)
    drawn = bootstrap_sums(np.column_stack([units.counts, units.tokens]), units.codes, INTERVAL_DRAWS, seed)
    documents = np.bincount(units.codes, units.documents, len(labels)).astype(np.int64)
    low, high = _interval(drawn[..., :-1], drawn[..., -1:], np.bincount(units.codes, minlength=len(labels)))
    found = _tested(plain, documents, low, high, test, f"labels moved between {_named(units.documents)}{_FLOOR}")
    return replace(found, missing="" if test.decisive else _too_few_labelled(np.bincount(units.codes), test.least))


def _named(documents: np.ndarray) -> str:
    """Units of so many documents [units] each, for captions."""
    whole, every = len(documents), int(documents.sum())
    return "whole documents" if whole == every else f"{whole:,} groups of whole documents ({every:,} in all)"


def _too_few_labelled(sizes: np.ndarray, least: np.ndarray) -> str:
    """Why labels of so many documents [labels] cannot be told apart, and how many could."""
    per = " and ".join(map(str, sizes)) if len(sizes) <= 4 else f"{sizes.min()} to {sizes.max()} documents per label"
    enough = next(n for n in count_from(1) if least_deal(np.full(len(sizes), n)).max() <= ALPHA)
    return _too_few(per, least, f"{enough} per label")


def _too_few(documents: str, least: np.ndarray, enough: str) -> str:
    smallest = float(np.nanmin(least, initial=1))
    after = f", too much after correction for {least.size:,} cells" if smallest <= ALPHA else ""
    return (f"Too few documents to tell: with {documents} the smallest possible p is {smallest:.2f}{after}. Effects are shown, none can be"
            f" tested; record at least {enough}.")  # fmt: skip


def label_effects(trace: Trace, site: int) -> Preferences:
    """Sizes and effects of labels without any test, from counts alone. Labels are those with an assignment at the site."""
    labels, count = trace.stats.label_load(site)
    sizes = trace.stats.label_tokens(site)
    return effects(site, "label", labels, np.array([sizes[x] for x in labels], np.int64), count)


def by_group(trace: Trace, site: int, kind: str, groups: Sequence[str], codes: np.ndarray, draws: int | None = None,
             seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Preferences:  # fmt: skip
    """Preferences of any kind of token: ``codes`` int [tokens of the site's stream] into ``groups``, -1 for none.

    Null: within each document the kind has nothing to do with the expert, so documents lean to either side alike
    (signs of whole documents flipped), and no surer than if the kind were dealt at random to each document's tokens, in bunches as large as
    ``KindCounts.dispersion`` says: signs know nothing of counts too small to lean either way. ``significant`` also asks that
    shares over all documents lean the same way as those within them. One streaming pass over the site's decisions, which ``progress`` is told
    of as by ``one_pass``. Raises TraceError without them.
    """
    return one_pass(trace, site, group_reading(trace, site, kind, groups, codes, draws, seed), progress=progress)[0]


def group_reading(trace: Trace, site: int, kind: str, groups: Sequence[str], codes: np.ndarray, draws: int | None = None,
                  seed: int = 0) -> Reading[Preferences]:  # fmt: skip
    """``by_group`` for a pass that others share."""
    found = yield from kind_reading(trace, site, len(groups), codes)
    counts, sizes, expected = found.counts, found.sizes, found.expected.sum(0)
    plain = effects(site, kind, tuple(groups), sizes.sum(0), counts.sum(0))
    flipped = sign_flip_test(counts - found.expected, draws, seed)
    bunch = found.dispersion[:, None]
    test = flipped.at_least(count_p(counts.sum(0) / bunch, expected / bunch, found.variance / bunch))
    columns = np.concatenate([counts, sizes[..., None]], 2).reshape(len(counts), -1)
    drawn = bootstrap_sums(columns, np.zeros(len(columns), np.int64), INTERVAL_DRAWS, seed)
    drawn = drawn.reshape(INTERVAL_DRAWS, len(groups), -1)
    low, high = _interval(drawn[..., :-1], drawn[..., -1:], (sizes > 0).sum(0))
    result = _tested(plain, found.documents, low, high, test, f"signs of {_named(found.held)} flipped{_BUNCHED}")
    within = np.where(found.shared.sum(0)[:, None] > 0, np.log2((found.inside + PSEUDO) / (found.outside + PSEUDO)), np.nan)
    agree = np.sign(within) == np.sign(plain.enrichment)  # else documents differ, not their tokens: Simpson's paradox
    of = "1 document" if found.held.sum() == 1 else f"{found.held.sum():,} documents"
    few = "" if test.decisive else _too_few(of, test.least, f"{least_flips()} in which it occurs")
    return replace(result, within=within, significant=result.significant & agree, missing=few)


def by_position(trace: Trace, site: int, progress: Callable[[int, int], None] | None = None) -> Preferences:
    """Preferences of stretches of positions, 0, 1-2, 3-6, 7-14, ...: doubling, as the statistics count them. ``progress`` as for ``by_group``.

    A run of statistics alone gives shares and effects without test; its ``tokens`` leave out natively dropped assignments.
    """
    load = trace.stats.position_load(site)
    names = tuple("0" if b == 0 else f"{2**b - 1}-{2 ** (b + 1) - 2}" for b in range(len(load)))
    if trace.source is None or trace.load_tokens is None:
        plain = effects(site, "position", names, -(-load.sum(1) // trace.layers[site].top_k), load)
        return replace(plain, method="no test: the run holds statistics only, no decisions of single documents", missing=_NO_DOCUMENTS)
    place = np.where(np.arange(32) < len(names), np.arange(32), -1).astype(np.int8)  # of a bucket: positions are int32
    codes = coded_tokens(trace, trace.layers[site].stream, "position", lambda x: place.take(np.frexp(x.to_numpy() + 1.0)[1] - 1))
    return by_group(trace, site, "position", names, codes, progress=progress)


def effects(site: int, kind: str, groups: tuple[str, ...], tokens: np.ndarray, count: np.ndarray) -> Preferences:
    """Preferences with sizes and effects only: tokens int64 [G], count int64 [G, E]; intervals and p are NaN."""
    n, total = tokens[:, None], tokens.sum()
    others, rest = count.sum(0) - count, total - n
    with np.errstate(divide="ignore", invalid="ignore"):
        share, elsewhere = count / n, others / rest
        lift = share / (count.sum(0) / total)
        log2 = np.where((n > 0) & (rest > 0), enrichment(count, n, others, rest), np.nan)
    unknown = np.full(count.shape, np.nan)
    return Preferences(site, kind, groups, tokens, np.zeros(len(groups), np.int64), count, share, elsewhere, lift, log2, unknown, unknown,
                       unknown, unknown, unknown, np.zeros(count.shape, bool), "no test", unknown)  # fmt: skip


def _tested(plain: Preferences, documents: np.ndarray, low: np.ndarray, high: np.ndarray, test: Verdict, what: str) -> Preferences:
    q = benjamini_hochberg(test.p)
    return replace(plain, documents=documents, low=low, high=high, p=test.p, q=q, family_p=test.family, significant=q <= ALPHA,
                   method=f"{what}: {test.method}")  # fmt: skip


def _interval(count: np.ndarray, tokens: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of enrichment, [G, E] each, from drawn counts [draws, G, E] and tokens [draws, G, 1]; NaN for groups in fewer than 2 units."""
    low, high = np.full(count.shape[1:], np.nan), np.full(count.shape[1:], np.nan)
    total, size = count.sum(1), tokens.sum(1)
    for group in np.flatnonzero(units >= 2):
        here, n = count[:, group], tokens[:, group]
        low[group], high[group] = interval(enrichment(here, n, total - here, size - n))
    return low, high


def label_information(trace: Trace, site: int, draws: int = 199, seed: int = 0, units: DocumentCounts | None = None) -> Information:
    """I(expert; label) over assignments, bits; floor and p from labels dealt at random to whole documents, ``labelled_documents`` where these
    are at hand.

    A random, untrained router shows some too: texts of different labels have different tokens.
    """
    table, layer = trace.stats.label_load(site)[1], trace.layers[site]
    bits, corrected, h_label, h_expert = table_information(table)
    units = units or labelled_documents(trace, site)
    n = int(table.sum())
    most = ceiling(h_label, h_expert, layer.top_k if n == sum(trace.stats.label_tokens(site).values()) * layer.top_k else 1)
    if len(units.labels) < 2 or len(units.labels) != len(table) or not n:
        return Information(bits, corrected, np.nan, np.nan, h_label, h_expert, most, n, "no null: labelled documents are needed")
    member, exact = _dealt_labels(units.codes.tobytes(), len(table), draws, seed)
    null = plug_in(member @ units.counts.astype(np.float64))
    own = 0 if exact else 1
    p = ((null >= bits * (1 - 1e-9)).sum() + own) / (len(null) + own)
    low, high = interval(null)
    return Information(bits, corrected, float(null.mean()), float(p), h_label, h_expert, most, n,
                       f"labels moved between {_named(units.documents)}, {len(null)} times", float(low), float(high))  # fmt: skip


@lru_cache(maxsize=2)
def _dealt_labels(codes: bytes, labels: int, draws: int, seed: int) -> tuple[np.ndarray, bool]:
    """(float64 [deals, labels, units]: 1 where a unit is dealt a label, whether these are all deals); kept, as every site of a stream asks."""
    deals, exact = rearranged_labels(np.frombuffer(codes, np.int64), draws, seed)
    member = (deals[:, None, :] == np.arange(labels)[None, :, None]).astype(np.float64)
    member.setflags(write=False)
    return member, exact


def token_score(load: np.ndarray, tokens: int, top_k: int) -> np.ndarray:
    """float64 [E]: ESFT's token selection ratio, mean over tokens of [expert chosen] / k. Sums to 1 without drops."""
    return load / (tokens * top_k) if tokens else np.full(len(load), np.nan)


def gate_score(gate_mass: np.ndarray, tokens: int) -> np.ndarray:
    """float64 [E]: ESFT's average gate score, mean over tokens of the gate weight (0 where not chosen)."""
    return gate_mass / tokens if tokens else np.full(len(gate_mass), np.nan)


def esft_experts(score: np.ndarray, top_p: float) -> tuple[int, ...]:
    """The fewest experts, by falling score, whose scores add up to ``top_p`` or more; ties by expert number. ESFT eq. 6.

    Raises ValueError for a ``top_p`` outside (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it must lie above 0 and at most 1")
    order = np.argsort(-score, kind="stable")
    enough = int(np.searchsorted(np.cumsum(score[order]), top_p * (1 - 1e-12))) + 1
    return tuple(order[: min(enough, len(order))].tolist())


def seriation(enriched: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(order of groups, order of experts) that puts a heatmap [G, E] of log2 enrichment near its diagonal.

    Experts follow the group they prefer most, the strongest first; groups follow the number and strength of their
    experts, or stay in the order ``groups``. Ties by number. A reordering only: it shows structure, it proves none, and
    random tables look ordered too.
    """
    value = np.nan_to_num(enriched, nan=-np.inf)
    if not value.size:
        return np.arange(value.shape[0]), np.arange(value.shape[1])
    best, strength = value.argmax(0), value.max(0)
    owned = np.bincount(best, minlength=len(value))
    groups = np.lexsort((np.arange(len(value)), -value.max(1), -owned)) if groups is None else groups
    place = np.argsort(groups)
    return groups, np.lexsort((np.arange(len(best)), -strength, place[best]))
