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
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .trace import LayerInfo, Part, SiteRouting, SiteScores

BINS = 64
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
    """Counts and sums of a trace; ``classes[site]`` is the number of ids at a site, ``following[site]`` its successor."""

    core: pa.Table
    by_token: pa.Table
    by_document: pa.Table
    classes: tuple[int, ...]
    following: tuple[int | None, ...]

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
        labels = tuple(sorted(set(rows["label"].to_pylist())))
        out = np.zeros((len(labels), self.classes[site]), np.int64)
        at = {label: i for i, label in enumerate(labels)}
        index = np.array([at[x] for x in rows["label"].to_pylist()], int)
        np.add.at(out, (index, rows["a"].to_numpy()), rows["count"].to_numpy())
        return labels, out

    def position_load(self, site: int) -> np.ndarray:
        """int64 [buckets, classes]; bucket b holds positions 2^b - 1 to 2^(b+1) - 2."""
        rows = self._rows("position", site)
        buckets = int(pc.max(rows["a"]).as_py() or 0) + 1
        return self._matrix(rows, (buckets, self.classes[site]))

    def coactivation(self, site: int) -> np.ndarray:
        """int64 [classes, classes], symmetric, zero diagonal: tokens sent to both experts."""
        upper = self._matrix(self._rows("coactivation", site), (self.classes[site],) * 2)
        return upper + upper.T

    def flow(self, site: int, first: bool = False) -> np.ndarray:
        """int64 [classes here, classes next]: choice pairs between a site and the next one of its stream.

        ``first`` counts first choices only. Empty [classes, 0] after the last site.
        """
        after = self.following[site]
        shape = (self.classes[site], 0 if after is None else self.classes[after])
        return self._matrix(self._rows("first_flow" if first else "flow", site), shape)

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
        mask = pc.and_(pc.equal(self.core["statistic"], statistic), pc.equal(self.core["site"], site))
        return self.core.filter(mask)

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

    def document_load(self, site: int, documents: np.ndarray) -> np.ndarray:
        """int64 [documents, classes]: assignments per expert in each of ``documents`` (distinct numbers, ascending)."""
        return self._by_key(self.by_document, "document", site, documents)

    def token_load(self, site: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token ids, experts, counts), int64 [cells]: assignments of every token id that occur, sorted by id and expert."""
        first, last = np.searchsorted(self.by_token["site"].to_numpy(), [site, site + 1])  # merged tables are sorted by site
        rows = self.by_token.slice(first, last - first)
        ids, experts, counts = (rows[n].to_numpy().astype(np.int64) for n in ("token_id", "expert", "count"))
        return ids, experts, counts

    def _by_key(self, table: pa.Table, key: str, site: int, keys: np.ndarray) -> np.ndarray:
        rows = table.filter(table["site"].to_numpy() == site)
        at = np.searchsorted(keys, rows[key].to_numpy())
        known = (at < len(keys)) & (keys[np.minimum(at, len(keys) - 1)] == rows[key].to_numpy()) if len(keys) else at < 0
        out = np.zeros((len(keys), self.classes[site]), np.int64)
        np.add.at(out, (at[known], rows["expert"].to_numpy()[known]), rows["count"].to_numpy()[known])
        return out


def following_sites(layers: Sequence[LayerInfo]) -> tuple[int | None, ...]:
    """For each site, the next site of the same stream, or None."""
    streams = [x.stream for x in layers]
    return tuple(streams.index(s, i + 1) if s in streams[i + 1 :] else None for i, s in enumerate(streams))


def part_statistics(part: Part, layers: Sequence[LayerInfo]) -> Statistics:
    """Statistics of one part. O(tokens x sites x k^2) in time."""
    following = following_sites(layers)
    core, tokens, documents = [], [], []
    for i, layer in enumerate(layers):
        rows = part.stream_tokens(layer.stream)
        after = following[i]
        core += _site_rows(i, layer, part.routing[i], part.scores[i], rows, part.probability_sums[i])
        if after is not None:
            core += _flow_rows(i, part.routing[i], part.routing[after], layer.n_classes, layers[after].n_classes)
        tokens.append(_keyed(rows["token_id"].to_numpy(), part.routing[i].experts, layer.n_classes, i, "token_id"))
        documents.append(_keyed(rows["document"].to_numpy(), part.routing[i].experts, layer.n_classes, i, "document"))
    core += list(_loss_rows(part.tokens))
    classes = tuple(x.n_classes for x in layers)
    by_token = pa.concat_tables(tokens).select(BY_TOKEN.names).cast(BY_TOKEN)
    by_document = pa.concat_tables(documents).select(BY_DOCUMENT.names).cast(BY_DOCUMENT)
    return merge_statistics([Statistics(pa.concat_tables(core), by_token, by_document, classes, following)])


def merge_statistics(parts: Iterable[Statistics]) -> Statistics:
    """Sum of statistics of the same model. Raises ValueError for none, or for models that differ."""
    whole = list(parts)
    if not whole or any(p.classes != whole[0].classes or p.following != whole[0].following for p in whole):
        raise ValueError("statistics of no parts, or of models with other sites, cannot be merged")
    core = _summed([p.core for p in whole], CORE, ("count", "sum"))
    by_token = _summed([p.by_token for p in whole], BY_TOKEN, ("count",))
    by_document = _summed([p.by_document for p in whole], BY_DOCUMENT, ("count",))
    return Statistics(core, by_token, by_document, whole[0].classes, whole[0].following)


def _summed(tables: Sequence[pa.Table], schema: pa.Schema, values: tuple[str, ...]) -> pa.Table:
    keys = [n for n in schema.names if n not in values]
    table = pa.concat_tables(tables).group_by(keys, use_threads=False).aggregate([(v, "sum") for v in values])
    table = table.rename_columns([n.removesuffix("_sum") for n in table.column_names]).select(schema.names)
    return table.sort_by([(k, "ascending") for k in keys]).cast(schema).combine_chunks()


def _rows(statistic: str, site: int, count: np.ndarray, total: np.ndarray | None = None, a: np.ndarray | None = None,
          b: np.ndarray | None = None, label: str | None = None) -> pa.Table:  # fmt: skip
    n = len(count)
    nothing = pa.nulls(n, pa.int32())
    columns = [
        pa.array([statistic] * n, pa.string()),
        pa.array(np.full(n, site, np.int16)),
        pa.array([label] * n, pa.string()),
        nothing if a is None else pa.array(a.astype(np.int32)),
        nothing if b is None else pa.array(b.astype(np.int32)),
        pa.array(count.astype(np.int64)),
        pa.array(np.zeros(n) if total is None else total.astype(np.float64)),
    ]
    return pa.table(columns, schema=CORE)


def _counted(statistic: str, site: int, values: np.ndarray, size: int, label: str | None = None) -> pa.Table:
    counts = np.bincount(values, minlength=size)
    at = np.flatnonzero(counts)
    return _rows(statistic, site, counts[at], a=at, label=label)


def _pairs(statistic: str, site: int, a: np.ndarray, b: np.ndarray, width: int) -> pa.Table:
    counts = np.bincount(a.astype(np.int64) * width + b)
    at = np.flatnonzero(counts)
    return _rows(statistic, site, counts[at], a=at // width, b=at % width)


def first_choices(routing: SiteRouting) -> np.ndarray:
    """int [n]: the expert with each token's largest gate weight, -1 where none was executed."""
    best = np.where(routing.experts >= 0, routing.weights, -np.inf).argmax(1)
    return routing.experts[np.arange(len(best)), best].astype(np.int64)


def _site_rows(site: int, layer: LayerInfo, routing: SiteRouting, scores: SiteScores, tokens: pa.Table,
               probability: np.ndarray) -> list[pa.Table]:  # fmt: skip
    n, k = routing.experts.shape
    width = layer.n_classes
    kept = routing.experts >= 0
    ids = routing.experts[kept].astype(np.int64)
    first = first_choices(routing)
    load = np.bincount(ids, minlength=width)
    mass = np.bincount(ids, weights=routing.weights[kept], minlength=width)
    bucket = np.floor(np.log2(tokens["position"].to_numpy() + 1)).astype(np.int64)
    rows = [
        _rows("tokens", site, np.array([n])),
        _rows("load", site, load, mass, np.arange(width)),
        _counted("first", site, first[first >= 0], width),
        _counted("chosen", site, routing.chosen[routing.chosen >= 0].astype(np.int64), width),
        _pairs("position", site, np.repeat(bucket, k)[kept.ravel()], ids, width),
        _rows("dropped", site, np.array([int(((routing.chosen >= 0) & ~kept).sum())])),
        _rows("probability", site, np.zeros(width), probability, np.arange(width)),
        *_coactivation_rows(site, routing.experts, width),
        *_label_rows(site, routing.experts, tokens["label"], width),
        _repetition_rows(site, routing.experts, first, tokens["document"].to_numpy()),
    ]
    top = np.log(width) if width > 1 else 1.0
    for name, values, high in (("entropy", scores.entropy, top), ("margin", scores.margin, 1.0)):
        rows.append(_histogram_rows(name, site, values, high))
    z = scores.logsumexp.astype(np.float64) ** 2
    rows.append(_rows("z", site, np.array([np.isfinite(z).sum()]), np.array([np.nansum(z)])))
    return rows


def _histogram_rows(name: str, site: int, values: np.ndarray, high: float) -> pa.Table:
    known = values[np.isfinite(values)].astype(np.float64)
    bins = np.clip((known / high * BINS).astype(np.int64), 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = np.bincount(bins, weights=known, minlength=BINS)
    return _rows(name, site, counts, sums, np.arange(BINS))


def _coactivation_rows(site: int, experts: np.ndarray, width: int) -> Iterator[pa.Table]:
    for i in range(experts.shape[1]):
        for j in range(i + 1, experts.shape[1]):
            low, high = np.minimum(experts[:, i], experts[:, j]), np.maximum(experts[:, i], experts[:, j])
            both = low >= 0
            yield _pairs("coactivation", site, low[both], high[both].astype(np.int64), width)


def _label_rows(site: int, experts: np.ndarray, labels: pa.ChunkedArray, width: int) -> Iterator[pa.Table]:
    coded = labels.combine_chunks().cast(pa.string()).dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy()
    for code, label in enumerate(coded.dictionary.to_pylist()):
        mine = experts[codes == code]
        yield _rows("label_tokens", site, np.array([len(mine)]), label=label)
        yield _counted("label", site, mine[mine >= 0].astype(np.int64), width, label)


def _repetition_rows(site: int, experts: np.ndarray, first: np.ndarray, documents: np.ndarray) -> pa.Table:
    together = documents[1:] == documents[:-1]
    same_first = together & (first[1:] == first[:-1]) & (first[1:] >= 0)
    shared = np.zeros(len(together), bool)
    for i in range(experts.shape[1]):
        for j in range(experts.shape[1]):
            shared |= (experts[1:, i] == experts[:-1, j]) & (experts[1:, i] >= 0)
    counts = np.array([together.sum(), same_first.sum(), (together & shared).sum()])
    return _rows("repetition", site, counts, a=np.arange(3))


def _flow_rows(site: int, here: SiteRouting, after: SiteRouting, width: int, next_width: int) -> Iterator[pa.Table]:
    a, b = first_choices(here), first_choices(after)
    both = (a >= 0) & (b >= 0)
    yield _pairs("first_flow", site, a[both], b[both], next_width)
    for i in range(here.experts.shape[1]):
        for j in range(after.experts.shape[1]):
            a, b = here.experts[:, i], after.experts[:, j].astype(np.int64)
            both = (a >= 0) & (b >= 0)
            yield _pairs("flow", site, a[both], b[both], next_width)


def _keyed(keys: np.ndarray, experts: np.ndarray, width: int, site: int, name: str) -> pa.Table:
    """Counts per (key, expert) that occur."""
    kept = experts >= 0
    cells, counts = np.unique(np.repeat(keys.astype(np.int64), experts.shape[1])[kept.ravel()] * width + experts[kept], return_counts=True)
    sites = np.full(len(cells), site, np.int16)
    return pa.table({name: cells // width, "site": sites, "expert": cells % width, "count": counts})


def _loss_rows(tokens: pa.Table) -> Iterator[pa.Table]:
    labels = tokens["label"].cast(pa.string())
    for label in pc.unique(labels).to_pylist():
        mine = pc.is_null(labels) if label is None else pc.equal(labels, label)
        loss = tokens["loss"].filter(mine).drop_null().to_numpy().astype(np.float64)
        yield _rows("loss", -1, np.array([len(loss)]), np.array([loss.sum()]), label=label)
