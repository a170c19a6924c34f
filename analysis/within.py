"""How kinds of token use experts within documents, beside what each document's own rates give: a document is its own control.

Mantel and Haenszel 1959; for shares Greenland and Robins 1985. Knows nothing of tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .reading import Reading, documents_of
from .significance import MOST_UNITS
from .trace import Trace

CELLS = 1 << 20  # documents x groups x classes counted at a time: 8 MB
_LEAST = 1e-12  # keeps 0 / 0 at 0


@dataclass(frozen=True)
class KindCounts:
    """How kinds of token use experts, within documents; [G] kinds, [E] classes, units of whole documents.

    counts    int64 [units, G, E] assignments.  sizes  int64 [units, G] tokens.  documents  int64 [G] that hold the kind.  held  int64
    [units] documents of a unit.
    expected  float64 [units, G, E]: what each document's own rates give, summed over the unit's documents.  variance  float64 [G, E]: of the
    count over all documents, if the kinds were dealt at random to each document's tokens.
    inside, outside  float64 [G, E]: uses by tokens of the kind and by the other tokens of the same documents, each document weighted by
    (its other tokens, its tokens of the kind) / its tokens: what Mantel and Haenszel compare.  shared  float64 [units, G]: tokens of the kind, so weighted.
    """

    counts: np.ndarray
    sizes: np.ndarray
    documents: np.ndarray
    held: np.ndarray
    expected: np.ndarray
    variance: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    shared: np.ndarray

    @property
    def dispersion(self) -> np.ndarray:
        """float64 [G], 1 or more: how much more the documents' counts vary than if the kind were dealt to their tokens one by one.

        Pearson's: squares of what a kind's mean lean leaves of each unit's excess, over ``variance``, both summed over experts. Like
        tokens that stand side by side in a text are dealt in bunches.
        """
        excess, shared = self.counts - self.expected, self.shared[..., None]
        total, units = shared.sum(0), (self.shared > 0).sum(0)
        rest = excess - shared * (excess.sum(0) / np.maximum(total, _LEAST))
        freedom = self.variance.sum(1) * (1 - 1 / np.maximum(units, 2))
        return np.asarray(np.maximum((rest**2).sum((0, 2)) / np.maximum(freedom, _LEAST), 1))


def kind_reading(trace: Trace, site: int, n_groups: int, codes: np.ndarray) -> Reading[KindCounts]:
    """``codes`` int [tokens of the stream] into the kinds, -1 for none. Rates are those of single documents, also where documents are joined
    into at most MOST_UNITS units: a unit's documents may differ."""
    from .counting import check_ids  # pays for numba

    layer = trace.layers[site]
    edges = np.append(0, np.cumsum(documents_of(trace, layer.stream)[1]))
    n, width = len(edges) - 1, layer.n_classes
    units, tokens = min(n, MOST_UNITS), _group_tokens(codes, edges, n_groups)
    total = np.maximum(tokens.sum(1), 1)
    part = tokens / total[:, None]
    load, counts, weighted = np.zeros((n, width), np.int64), np.zeros((units, n_groups, width), np.int64), np.zeros((n_groups, width))
    unit = np.arange(n) * units // max(n, 1)
    while (block := (yield)) is not None:
        check_ids(block[1], width)
        for first, table in _document_tables(*block, edges, codes, n_groups, width):
            mine = slice(first, first + len(table))
            load[mine] += table.sum(1)
            starts = np.flatnonzero(np.diff(unit[mine], prepend=-1))
            counts[unit[mine][starts]] += np.add.reduceat(table, starts)
            weighted += np.einsum("dg,dge->ge", part[mine], table)
    rate = load / total[:, None]
    bounds = np.searchsorted(unit, np.arange(units + 1))
    expected = np.array([tokens[a:b].T @ rate[a:b] for a, b in pairwise(bounds.tolist())]).reshape(counts.shape)
    shared = tokens * (1 - part)
    return KindCounts(counts, np.add.reduceat(tokens, bounds[:-1]) if n else tokens, (tokens > 0).sum(0), np.diff(bounds), expected,
                       shared.T @ (rate * (1 - rate)), counts.sum(0) - weighted, expected.sum(0) - weighted, np.add.reduceat(shared, bounds[:-1]) if n else shared)  # fmt: skip


def _group_tokens(codes: np.ndarray, edges: np.ndarray, n_groups: int) -> np.ndarray:
    """int64 [documents, groups]: tokens of each group in the rows edges[d] to edges[d + 1]. ValueError for a code of no group."""
    from .counting import count_runs

    if len(codes) != edges[-1] or (len(codes) and not -1 <= codes.min() <= codes.max() < n_groups):  # a kernel would count it out of bounds
        raise ValueError(f"{len(codes):,} codes for {edges[-1]:,} tokens of {n_groups} kinds, or a code of no kind")
    found = np.zeros((len(edges) - 1, n_groups + 1), np.int32)
    count_runs((codes + 1)[:, None], edges, found)
    return found[:, 1:].astype(np.int64)


def _document_tables(start: int, experts: np.ndarray, edges: np.ndarray, codes: np.ndarray, n_groups: int,
                     classes: int) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """(first document, int64 [documents, groups, classes] assignments) of a block, in pieces; what the block has of a document cut by its ends.
    Document d is the rows edges[d] to edges[d + 1]; the block has those from ``start`` on."""
    from .shuffling import count_groups

    most = max(CELLS // ((n_groups + 1) * (classes + 1)), 1)
    stop = start + len(experts)
    last = int(np.searchsorted(edges, stop))
    for first in range(int(np.searchsorted(edges, start, "right")) - 1, last, most):
        mine = np.clip(edges[first : min(first + most, last) + 1], start, stop) - start
        table = np.zeros((len(mine) - 1, n_groups + 1, classes + 1), np.int64)  # places more for no group and no expert
        count_groups(experts, mine, codes[start:stop], table)
        yield first, table[:, 1:, 1:]
