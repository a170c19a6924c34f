"""Mergeable sufficient statistics of a trace.

Three long tables of counts and sums. Statistics of two parts add up to the statistics of both together: counts are
int64 and merge to the same bytes in any order; sums are float64 and agree to about 1e-12 relative.

    statistic      a              b        count                          sum
    tokens                                 tokens seen by the site
    load           expert                  assignments executed           gate weight
    first          expert                  tokens whose largest weight it has
    chosen         expert                  assignments before native capacity
    label          expert                  assignments on tokens of ``label``
    label_tokens                           tokens of ``label``
    position       bucket         expert   assignments; bucket = floor(log2(position + 1))
    coactivation   expert         expert   tokens sent to both, a < b
    flow           expert here    next     pairs of choices at this and the next site of the stream
    first_flow     expert here    next     the same for first choices
    repetition     0 / 1 / 2               neighbours in a document / same first choice / any expert in common
    entropy        bin                     tokens; BINS bins over [0, ln classes]     nats
    margin         bin                     tokens; BINS bins over [0, 1]              selection score
    probability    class                                                  router probability
    z                                      tokens                         squared logsumexp of the router logits
    dropped                                assignments dropped natively
    loss                                   tokens of ``label`` with a next one        nats (site -1)

A stored run has rows of 0 as well, for pairs of experts that never occur (``Block.stored``): a reader then needs no column but the counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .corecounts import PAIRS, CoreCounts, pair_cells
from .keycounts import KeyCounts, PartCounts
from .longtables import LongTable, where, whole
from .trace import LayerInfo, Part, SiteRouting

BINS = 64
NAMES = frozenset(
    ("tokens", "load", "first", "chosen", "label", "label_tokens", "position", "coactivation", "flow", "first_flow", "repetition",
     "entropy", "margin", "probability", "z", "dropped", "loss")
)  # fmt: skip
CORE = pa.schema(
    [
        ("statistic", pa.string()),
        ("site", pa.int16()),
        ("label", pa.string()),
        ("a", pa.int32()),
        ("b", pa.int32()),
        ("count", pa.int64()),
        ("sum", pa.float64()),
    ]
)
BY_TOKEN = pa.schema([("site", pa.int16()), ("token_id", pa.int32()), ("expert", pa.int32()), ("count", pa.int64())])
BY_DOCUMENT = pa.schema([("document", pa.int32()), ("site", pa.int16()), ("expert", pa.int32()), ("count", pa.int64())])


@dataclass(frozen=True)
class Statistics:
    """Counts and sums of a trace; ``classes[site]`` is the number of ids at a site, ``following[site]`` its successor.

    The rows are in memory, or on disk and read when asked for; those by token and by document are sorted by site, key and expert. Core
    rows of parts and their sums, and those by token and by document of one part, are as they were counted.
    """

    core_rows: pa.Table | LongTable | CoreCounts
    token_rows: pa.Table | LongTable | PartCounts
    document_rows: pa.Table | LongTable | PartCounts
    classes: tuple[int, ...]
    following: tuple[int | None, ...]

    @property
    def core(self) -> pa.Table:
        """All counts and sums but those by token id and by document (schema CORE), without pairs of experts that never occur."""
        return occurring(whole(self.core_rows))

    @property
    def by_token(self) -> pa.Table:
        """Assignments by token id (schema BY_TOKEN), read whole: ``token_load_by_id`` reads one site."""
        return whole(self.token_rows)

    @property
    def by_document(self) -> pa.Table:
        """Assignments by document (schema BY_DOCUMENT), read whole: ``document_load`` reads one site."""
        return whole(self.document_rows)

    def n_tokens(self, site: int) -> int:
        """Tokens that passed the site."""
        return int(pc.sum(self._rows("tokens", site)["count"]).as_py() or 0)

    def load(self, site: int) -> np.ndarray:
        """int64 [classes]: assignments executed per expert."""
        return self._vector("load", site)

    def chosen_load(self, site: int) -> np.ndarray:
        """int64 [classes]: assignments before native capacity."""
        return self._vector("chosen", site)

    def first_choice_load(self, site: int) -> np.ndarray:
        """int64 [classes]: tokens whose largest gate weight is the expert's."""
        return self._vector("first", site)

    def gate_mass(self, site: int) -> np.ndarray:
        """float64 [classes]: sum of gate weights per expert."""
        return self._vector("load", site, "sum")

    def probability_sum(self, site: int) -> np.ndarray:
        """float64 [classes]: sum over tokens of the router's probabilities; zeros where the router's scores are unknown."""
        return self._vector("probability", site, "sum")

    def dropped(self, site: int) -> int:
        """Assignments dropped natively, by the model itself."""
        return int(pc.sum(self._rows("dropped", site)["count"]).as_py() or 0)

    def label_load(self, site: int) -> tuple[tuple[str, ...], np.ndarray]:
        """(labels sorted, int64 [labels, classes]): assignments per expert on tokens of each label."""
        rows = self._rows("label", site)
        label = rows["label"].combine_chunks().dictionary_encode()
        texts = label.dictionary.to_pylist()
        labels, out = tuple(sorted(texts)), np.zeros((len(texts), self.classes[site]), np.int64)
        at = {text: i for i, text in enumerate(labels)}
        place = np.array([at[x] for x in texts], int)
        np.add.at(out, (place[label.indices.to_numpy()], rows["a"].to_numpy()), rows["count"].to_numpy())
        return labels, out

    def position_load(self, site: int) -> np.ndarray:
        """int64 [buckets, classes]; bucket b holds positions 2^b - 1 to 2^(b+1) - 2."""
        rows = self._rows("position", site)
        buckets = int(pc.max(rows["a"]).as_py() or 0) + 1
        return self._matrix(rows, (buckets, self.classes[site]))

    def coactivation(self, site: int) -> np.ndarray:
        """int64 [classes, classes], symmetric, zero diagonal: tokens sent to both experts."""
        found, n = self._pairs("coactivation", site), self.classes[site]
        if found.ndim == 2:
            return found + found.T
        return np.append(found, 0).take(self._mirrored(n)).reshape(n, n)

    def flow(self, site: int, first: bool = False) -> np.ndarray:
        """int64 [classes here, classes next]: choice pairs between a site and the next one of its stream.

        ``first`` counts first choices only. Empty [classes, 0] after the last site.
        """
        return self._pairs("first_flow" if first else "flow", site).reshape(self._shape(site, False))

    def _shape(self, site: int, own: bool) -> tuple[int, int]:
        after = site if own else self.following[site]
        return self.classes[site], 0 if after is None else self.classes[after]

    def _pairs(self, statistic: str, site: int) -> np.ndarray:
        """int64 [cells]: the counts of every pair, in order; or of co-activation [classes, classes], above the diagonal."""
        own = statistic == "coactivation"
        rows = self.core_rows.cells(statistic, site, self._cells[own]) if isinstance(self.core_rows, LongTable) else None
        if isinstance(rows, np.ndarray):
            return rows
        found = self._matrix(self._rows(statistic, site) if rows is None else rows, self._shape(site, own))
        return found if own else found.ravel()

    @cached_property
    def _cells(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many pairs there are at each site: from it to the next, and within it."""
        sites = range(len(self.classes))
        here, within = (tuple(pair_cells(s, *self._shape(i, s == "coactivation")) for i in sites) for s in ("flow", "coactivation"))
        return here, within

    def _mirrored(self, n: int) -> np.ndarray:
        """int [n * n]: of each cell of a symmetric table the place of its count among those above the diagonal, on it that after the last."""
        if n not in self._places:
            place = np.full((n, n), n * (n - 1) // 2)
            upper = np.triu_indices(n, 1)
            place[upper] = place[upper[::-1]] = np.arange(len(upper[0]))
            self._places[n] = place.ravel()
        return self._places[n]

    @cached_property
    def _places(self) -> dict[int, np.ndarray]:
        return {}

    def repetition(self, site: int) -> tuple[int, int, int]:
        """(neighbouring pairs, pairs with the same first choice, pairs sharing any expert), within documents."""
        counts = self._vector("repetition", site, size=3)
        return int(counts[0]), int(counts[1]), int(counts[2])

    def histogram(self, statistic: str, site: int) -> np.ndarray:
        """int64 [BINS] of "entropy" or "margin"; edges as the module says."""
        return self._vector(statistic, site, size=BINS)

    def mean(self, statistic: str, site: int) -> float:
        """Mean of "entropy" (nats), "margin" or "z"; NaN where nothing was counted."""
        rows = self._rows(statistic, site)
        count = pc.sum(rows["count"]).as_py() or 0
        return float(pc.sum(rows["sum"]).as_py() / count) if count else float("nan")

    def losses(self) -> dict[str | None, tuple[int, float]]:
        """label -> (tokens with a next one, mean next-token loss in nats)."""
        rows = self._rows("loss", -1).to_pylist()
        return {r["label"]: (r["count"], r["sum"] / r["count"]) for r in rows if r["count"]}

    def _rows(self, statistic: str, site: int) -> pa.Table:
        # Pairs of experts are nearly all of a large model's rows: they are passed over once, not at every question.
        if statistic not in self._kept:
            found = where(self.core_rows, "statistic", statistic)
            sites = found["site"].to_numpy()
            self._kept[statistic] = found, sites if (sites[1:] >= sites[:-1]).all() else None
        rows, sites = self._kept[statistic]
        if sites is None:
            return where(rows, "site", site)
        start, stop = np.searchsorted(sites, np.array([site, site + 1], sites.dtype))
        return rows.slice(start, stop - start)

    @cached_property
    def _kept(self) -> dict[str, tuple[pa.Table, np.ndarray | None]]:
        """Rows of a statistic, and their sites where these ascend."""
        return {}

    def _vector(self, statistic: str, site: int, column: str = "count", size: int | None = None) -> np.ndarray:
        rows = self._rows(statistic, site)
        out = np.zeros(self.classes[site] if size is None else size, np.int64 if column == "count" else np.float64)
        np.add.at(out, rows["a"].to_numpy(), rows[column].to_numpy())
        return out

    @staticmethod
    def _matrix(rows: pa.Table, shape: tuple[int, int]) -> np.ndarray:
        out = np.zeros(shape, np.int64)
        np.add.at(out, (rows["a"].to_numpy(), rows["b"].to_numpy()), rows["count"].to_numpy())
        return out

    def label_tokens(self, site: int) -> dict[str, int]:
        """label -> tokens of the label seen by the site; unlabelled tokens are left out."""
        rows = self._rows("label_tokens", site)
        return dict(zip(rows["label"].to_pylist(), rows["count"].to_pylist(), strict=True))

    def document_load(self, site: int, documents: np.ndarray, unit: np.ndarray | None = None) -> np.ndarray:
        """int64 [documents, classes]: assignments per expert in each of ``documents`` (distinct numbers, ascending); or [units, classes] in
        each unit of them, where ``unit`` int64 [documents] says of which each is, from 0 on."""
        rows = self._of_site(self.document_rows, site)
        document, expert, counts = (rows[n].to_numpy() for n in ("document", "expert", "count"))
        starts = np.flatnonzero(
            np.append(True, document[1:] != document[:-1])[: len(document)]
        )  # a document's rows lie together: it is sought once
        numbers = document[starts]
        at = np.searchsorted(documents, numbers)
        known = (at < len(documents)) & (documents[np.minimum(at, len(documents) - 1)] == numbers) if len(documents) else at < 0
        each, classes = np.diff(np.append(starts, len(document))), self.classes[site]
        n = len(documents) if unit is None else int(unit.max(initial=-1)) + 1
        row = at if unit is None or not len(unit) else unit[np.minimum(at, len(unit) - 1)]
        cell = np.repeat(row * classes, each) + expert
        if not known.all():
            mine = np.repeat(known, each)
            cell, counts = cell[mine], counts[mine]
        found = np.bincount(cell, counts, n * classes)
        return found.astype(np.int64).reshape(n, classes)  # floats are exact below 2^53

    def token_load_by_id(self, site: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(token ids [ids], ascending; how many cells each has [ids]; experts [cells], counts [cells]), int64: the
        assignments of every token id that occur, sorted by id and expert."""
        rows = self._of_site(self.token_rows, site)
        ids = rows["token_id"].to_numpy()
        starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
        experts, counts = (rows[n].to_numpy().astype(np.int64, copy=False) for n in ("expert", "count"))
        return ids[starts].astype(np.int64), np.diff(np.append(starts, len(ids))), experts, counts

    def _of_site(self, rows: pa.Table | LongTable | PartCounts, site: int) -> pa.Table:
        """Every assignment has a token id and a document, so that their counts add up to the load."""
        return where(rows, "site", site, int(self.load(site).sum()))


def occurring(rows: pa.Table) -> pa.Table:
    """Rows of schema CORE without pairs of experts that never occur, which a stored run has rows of and another has not."""
    never = pc.and_(pc.equal(rows["count"], 0), pc.is_in(rows["statistic"], pa.array(PAIRS)))
    return rows.filter(pc.invert(never)) if pc.any(never).as_py() else rows


def following_sites(layers: Sequence[LayerInfo]) -> tuple[int | None, ...]:
    """For each site, the next site of the same stream, or None."""
    streams = [x.stream for x in layers]
    return tuple(streams.index(s, i + 1) if s in streams[i + 1 :] else None for i, s in enumerate(streams))


def part_statistics(part: Part, layers: Sequence[LayerInfo]) -> Statistics:
    """Statistics of one part, counted in one pass over its decisions; gate mass is 0 where it has no weights.

    Raises ValueError for an expert id out of range.
    """
    from .tally import part_counts  # pays for numba, which opening a stored run must not

    blocks, tokens, documents = part_counts(part, layers, BINS)
    by_document = KeyCounts(BY_DOCUMENT, tuple(documents))
    classes = tuple(x.n_classes for x in layers)
    return Statistics(CoreCounts.of(CORE, blocks), KeyCounts(BY_TOKEN, tuple(tokens)), by_document, classes, following_sites(layers))


def merge_statistics(parts: Iterable[Statistics], folder: Path | None = None) -> Statistics:
    """Sum of statistics of the same model, taken one by one: memory holds the sum, not the parts.

    With a ``folder``, the counts by token id and by document, which grow with the text, are added up in files, and the sum reads them
    there. Raises ValueError for no parts, or for models that differ.
    """
    from .merging import LongSum, ShortSum

    core, tokens, documents = ShortSum(CORE), LongSum(BY_TOKEN, folder), LongSum(BY_DOCUMENT, folder)
    sites = set()
    for part in parts:
        sites.add((part.classes, part.following))
        if len(sites) > 1:
            break
        core.add(part.core_rows)
        tokens.add(part.token_rows)
        documents.add(part.document_rows)
        del part  # before the next is made
    if len(sites) != 1:
        raise ValueError("statistics of no parts, or of models with other sites, cannot be merged")
    return Statistics(core.total(), tokens.total(), documents.total(), *sites.pop())


def first_choices(routing: SiteRouting) -> np.ndarray:
    """int [n]: the expert with each token's largest gate weight, -1 where none was executed."""
    best = np.where(routing.experts >= 0, 0 if routing.weights is None else routing.weights, -np.inf).argmax(1)  # the earliest of equals
    return routing.experts[np.arange(len(best)), best].astype(np.int64)
