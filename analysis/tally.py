"""Counts one part: decisions in, blocks of rows of the statistics out. Knows their names, not their tables.

Every site is visited once, its arrays still in the processor's cache while all of its statistics are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from . import bittables, counting
from .corecounts import Block
from .keycounts import SiteCounts
from .trace import LayerInfo, Part, SiteRouting, SiteScores


@dataclass(frozen=True)
class StreamRows:
    """What the sites of one stream share.

    A run is a longest stretch of rows with one document, label and bucket of positions: run r is the rows runs[r] to runs[r + 1], and
    ``label`` (-1 for none) and ``bucket`` are those of each run, ``documents`` what there is, sorted, and the place of each run's in it.
    ``label_tokens`` are the rows of each label. ``order`` int32 [n] sorts the rows by token id; those of ``token_ids[g]`` lie at order[starts[g]:starts[g + 1]].
    """

    runs: np.ndarray
    same_document: np.ndarray
    documents: tuple[np.ndarray, np.ndarray]
    label: np.ndarray
    bucket: np.ndarray
    labels: tuple[str, ...]
    label_tokens: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    token_ids: np.ndarray

    @cached_property
    def most(self) -> int:
        """Rows of the token id that has the most."""
        return int(np.diff(self.starts).max(initial=0))


@dataclass(frozen=True)
class SiteRows:
    """A site's decisions, ready for the kernels: ids [n, k], first choices as slots [n], words [n] and bits where they help."""

    site: int
    experts: np.ndarray
    first: np.ndarray
    words: np.ndarray
    bits: np.ndarray | None

    @cached_property
    def slots(self) -> np.ndarray:
        """uint16 [n, k]: ids plus one."""
        return counting.slots_of(self.experts)

    @property
    def slots_without_words(self) -> np.ndarray:
        """Slots, or none [0, k] where there are words, which say the same in less."""
        return np.zeros((0, self.experts.shape[1]), np.uint16) if len(self.words) else self.slots


def part_counts(part: Part, layers: Sequence[LayerInfo], bins: int) -> tuple[list[Block], list[SiteCounts], list[SiteCounts]]:
    """(blocks, counts per token id, counts per document) of a part; the latter two are in the order of sites."""
    rows = {s: stream_rows(part.stream_tokens(s)) for s in {x.stream for x in layers}}
    blocks, tokens, documents = list(_loss_blocks(part.tokens)), [], []
    before: dict[str, SiteRows] = {}
    most = max((r.experts.size + x.n_classes + 1 for r, x in zip(part.routing, layers, strict=True)), default=0)
    ids = np.uint8 if max(x.n_classes for x in layers) <= 256 else np.uint16
    room = np.empty(most, ids), np.empty(most, np.int32)  # the same for every site: memory that was touched before costs less
    for i, layer in enumerate(layers):
        mine = rows[layer.stream]
        site, found, by_run = _site_blocks(i, layer.n_classes, part.routing[i], mine)
        blocks += found
        blocks.append(Block("probability", i, np.zeros(layer.n_classes, np.uint8), part.probability_sums[i], every=True))
        blocks += _score_blocks(i, layer.n_classes, part.scores[i], bins)
        if layer.stream in before:
            earlier = before[layer.stream]
            blocks += _flow_blocks(earlier, site, layers[earlier.site].n_classes, layer.n_classes)
        before[layer.stream] = site
        tokens.append(_by_token(site, layer.n_classes, mine, room))
        documents.append(_by_document(by_run, *mine.documents))
    return blocks, tokens, documents


def stream_rows(tokens: pa.Table) -> StreamRows:
    """Runs, and the order by token id, of a stream's token rows."""
    document, ids = tokens["document"].to_numpy(), tokens["token_id"].to_numpy()
    bucket = np.floor(np.log2(tokens["position"].to_numpy() + 1)).astype(np.int32)
    label, labels = _coded(tokens["label"])
    n = len(ids)
    same = np.zeros(n, bool)
    same[1:] = document[1:] == document[:-1]
    starting = ~same
    starting[1:] |= (label[1:] != label[:-1]) | (bucket[1:] != bucket[:-1])
    at = np.flatnonzero(starting)
    order = np.argsort(ids).astype(np.int32)
    ordered = ids[order]
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if n else np.zeros(0, np.int64)
    runs = np.append(at, n)
    tokens = np.bincount(label[label >= 0], minlength=len(labels))
    documents = np.unique(document[at], return_inverse=True)
    return StreamRows(runs, same, documents, label[at], bucket[at], labels, tokens, order, np.append(first, n), ordered[first])


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(int32 [n], the place of each row's text among those that occur, or -1 for null; these texts)."""
    coded = column.unify_dictionaries().combine_chunks()
    codes = coded.indices.fill_null(-1).to_numpy()
    occurs = np.bincount(codes[codes >= 0], minlength=len(coded.dictionary)) > 0  # a dictionary may be that of other rows too
    places = np.append(np.cumsum(occurs) - 1, -1).astype(np.int32)  # -1 is the last
    return places[codes], tuple(coded.dictionary.filter(pa.array(occurs)).cast(pa.string()).to_pylist())


def _site_blocks(site: int, width: int, routing: SiteRouting, rows: StreamRows) -> tuple[SiteRows, list[Block], np.ndarray]:
    """The site made ready, the statistics of its decisions, and int32 [runs, width]: its load by run."""
    experts, n_slots = np.ascontiguousarray(routing.experts), width + 1
    counting.check_ids(experts, width)
    by_run = np.zeros((len(rows.bucket), n_slots), np.int32)
    # without weights the earliest slot is the first choice, as among equal ones, and the mass is 0
    weights = np.zeros(experts.shape, np.float32) if routing.weights is None else np.ascontiguousarray(routing.weights, np.float32)
    first, words, mass = counting.take_rows(experts, weights, n_slots)
    mine = SiteRows(site, experts, first, words, bittables.bits_of(words, n_slots, experts.shape[1]))
    if mine.bits is None:
        counting.count_runs(mine.slots, rows.runs, by_run)
    else:
        bittables.count_runs_by_bits(mine.bits, rows.runs, by_run)
    position = np.zeros((int(rows.bucket.max(initial=-1)) + 1, n_slots), np.int64)
    counting.add_rows(by_run, rows.bucket, position)
    load = position.sum(0)
    chosen, dropped = _chosen(routing, width, load)
    repeats = counting.count_repeats(mine.slots_without_words, words, first, rows.same_document, n_slots)
    blocks = [
        Block("tokens", site, np.array(len(experts))),
        Block("load", site, load[1:], mass[1:], every=True),
        Block("first", site, np.bincount(first, minlength=n_slots)[1:]),
        Block("chosen", site, chosen),
        Block("position", site, position[:, 1:]),
        Block("dropped", site, np.array(dropped)),
        Block("coactivation", site, _pairs(mine, mine, width, width)).narrow(),
        Block("repetition", site, np.array(repeats), every=True),
        *_label_blocks(site, by_run, rows),
    ]
    return mine, blocks, by_run[:, 1:]


def _chosen(routing: SiteRouting, width: int, load: np.ndarray) -> tuple[np.ndarray, int]:
    """(int64 [width], assignments before native capacity; how many of them were dropped)."""
    if routing.chosen is routing.experts:
        return load[1:], 0
    counting.check_ids(routing.chosen, width)
    wanted = counting.slots_of(routing.chosen)
    return np.bincount(wanted.ravel(), minlength=width + 1)[1:], int(((wanted != 0) & (routing.experts < 0)).sum())


def _label_blocks(site: int, by_run: np.ndarray, rows: StreamRows) -> Iterator[Block]:
    counts = np.zeros((len(rows.labels), by_run.shape[1]), np.int64)
    counting.add_rows(by_run, rows.label, counts)
    for i, label in enumerate(rows.labels):
        yield Block("label_tokens", site, rows.label_tokens[i], label=label)
        yield Block("label", site, counts[i, 1:], label=label)


def _score_blocks(site: int, width: int, scores: SiteScores, bins: int) -> Iterator[Block]:
    top = float(np.log(width)) if width > 1 else 1.0
    entropy, margin, logsumexp = (np.ascontiguousarray(x) for x in (scores.entropy, scores.margin, scores.logsumexp))
    if not len(entropy) == len(margin) == len(logsumexp):  # a kernel would read beyond the shortest
        raise ValueError(f"site {site}: {len(entropy)} entropies, {len(margin)} margins, {len(logsumexp)} logsumexps")
    counts, sums = np.zeros((2, bins), np.int64), np.zeros((2, bins))
    count, total = counting.count_scores(entropy, top, margin, logsumexp, counts, sums)
    for i, name in enumerate(("entropy", "margin")):
        yield Block(name, site, counts[i], sums[i], every=True)
    yield Block("z", site, np.array(count), np.array(total))


def _flow_blocks(here: SiteRows, after: SiteRows, width: int, next_width: int) -> Iterator[Block]:
    yield Block("flow", here.site, _pairs(here, after, width, next_width)).narrow()
    yield Block("first_flow", here.site, bittables.pairs_of(here.first[:, None], after.first[:, None], width + 1, next_width + 1)).narrow()


def _pairs(here: SiteRows, after: SiteRows, width: int, next_width: int) -> np.ndarray:
    """[width, next width]: in how many rows both were chosen; of a site with itself above the diagonal."""
    if here.bits is None or after.bits is None:
        return (
            bittables.own_pairs(here.slots, width + 1)
            if here is after
            else bittables.pairs_of(here.slots, after.slots, width + 1, next_width + 1)
        )
    table = np.zeros((width + 1, next_width + 1), np.int64)
    bittables.count_pairs_by_bits(here.bits, after.bits, table)
    return np.triu(table[1:, 1:], 1) if here is after else table[1:, 1:]


def _by_token(site: SiteRows, width: int, rows: StreamRows, room: tuple[np.ndarray, np.ndarray]) -> SiteCounts:
    ends = np.empty(len(rows.token_ids), np.int32)
    n = counting.count_keys(rows.order, rows.starts, site.slots_without_words, site.words, width + 1, *room, ends)
    counts = room[1][:n].astype(np.uint16 if rows.most * site.experts.shape[1] < 2**16 else np.uint32)
    return SiteCounts(rows.token_ids, ends, room[0][:n].copy(), counts)


def _by_document(by_run: np.ndarray, documents: np.ndarray, index: np.ndarray) -> SiteCounts:
    counts = np.zeros((len(documents), by_run.shape[1]), np.int32)
    counting.add_rows(by_run, index, counts)
    return SiteCounts(documents, *counting.nonzero(counts))


def _loss_blocks(tokens: pa.Table) -> Iterator[Block]:
    codes, labels = _coded(tokens["label"])
    known, losses = tokens["loss"].is_valid().to_numpy(), tokens["loss"].fill_null(0).to_numpy()
    for i in np.unique(codes):
        loss = losses[known & (codes == i)].astype(np.float64)
        yield Block("loss", -1, np.array(len(loss)), np.array(loss.sum()), label=None if i < 0 else labels[i])
