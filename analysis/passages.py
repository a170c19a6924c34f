"""Passages of a run that show an expert at work: stretches of text where it carries the most gate weight."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.compute as pc

from .reading import ROWS
from .trace import Trace, gate_weights


@dataclass(frozen=True)
class Passage:
    """A stretch of one document, rows ``start`` to ``stop`` of the site's stream, from ``position`` of the document on.

    texts    readable token texts.  raw  bytes of tokens that are not whole characters, else None.
    weights  gate weight of the expert per token as executed; 0 where it was not used.
    used     tokens that use it.  mass  sum of weights, by which passages are ranked.
    """

    document: int
    name: str
    label: str | None
    position: int
    start: int
    stop: int
    texts: tuple[str | None, ...]
    raw: tuple[bytes | None, ...]
    weights: tuple[float, ...]
    used: int
    mass: float


def passages(trace: Trace, site: int, expert: int, most: int = 5, width: int = 24, label: str | None = None) -> tuple[Passage, ...]:
    """The stretches of ``width`` tokens with most gate weight on the expert, at most one per document; ties by position.

    Chosen to show the expert at its strongest, not at its usual: read them beside its statistics. Documents are cut into
    stretches from their first token. One pass over the site, ``ROWS`` tokens at a time. TraceError without decisions or gate weights.
    """
    mine = pc.and_(pc.equal(trace.documents["stack"], trace.layers[site].stream), pc.greater(trace.documents["n_tokens"], 0))
    rows = trace.documents.filter(mine if label is None else pc.and_(mine, pc.equal(trace.documents["label"], label))).sort_by("first_row")
    first, size = rows["first_row"].to_numpy(), rows["n_tokens"].to_numpy()

    def best(some: slice) -> list[tuple[float, int, int]]:
        """(- mass, first row, index into ``rows``) of the heaviest stretches of documents that lie close to each other."""
        from .counting import weight_on  # pays for numba

        row, n = first[some], size[some]
        routing = trace.routing(site, int(row[0]), int(row[-1] + n[-1]))
        weight = weight_on(routing.experts, gate_weights(routing, f"run {trace.name!r}"), expert)[_counting_on(row - row[0], n)]
        each = -(-n // width)
        ahead, nth = np.cumsum(each) - each, _counting_on(np.zeros(len(each), np.int64), each)
        masses = np.add.reduceat(weight, np.repeat(np.cumsum(n) - n, each) + width * nth)
        top = np.maximum.reduceat(masses, ahead)
        heavy = np.flatnonzero(masses == np.repeat(top, each))
        heavy = heavy[np.searchsorted(heavy, ahead)]  # the first of equals in each document
        found = zip((-top).tolist(), (row + width * nth[heavy]).tolist(), range(some.start, some.stop), strict=True)
        return sorted(x for x in found if x[0] < 0)[:most]

    with ThreadPoolExecutor(2) as pool:  # reading runs without Python's lock
        found = sorted(chain.from_iterable(pool.map(best, _runs(first, size))))[:most]
    return tuple(_passage(trace, site, expert, at, width, rows.slice(i, 1).to_pylist()[0]) for _, at, i in found)


def _counting_on(start: np.ndarray, n: np.ndarray) -> np.ndarray:
    """int64 [sum of n]: ``n`` numbers from each ``start`` on."""
    return np.repeat(start - (np.cumsum(n) - n), n) + np.arange(n.sum())


def _runs(first: np.ndarray, size: np.ndarray) -> list[slice]:
    """Documents in groups that span about ROWS tokens, without gaps that would be read in vain."""
    out, begin = list[slice](), 0
    for i in range(1, len(first)):
        end = first[i - 1] + size[i - 1]
        if first[i] + size[i] - first[begin] > ROWS or first[i] - end > ROWS // 4:
            out.append(slice(begin, i))
            begin = i
    return [*out, slice(begin, len(first))] if len(first) else out


def _passage(trace: Trace, site: int, expert: int, start: int, width: int, row: dict[str, Any]) -> Passage:
    stop = min(start + width, row["first_row"] + row["n_tokens"])
    routing = trace.routing(site, start, stop)
    here = routing.experts == expert
    weights = np.where(here, gate_weights(routing, f"run {trace.name!r}"), 0).sum(1)
    tokens = trace.stream_tokens(trace.layers[site].stream, start, stop, ["token", "token_bytes"])
    return Passage(row["document"], row["name"], row["label"], start - row["first_row"], start, stop, tuple(tokens["token"].to_pylist()),
                   tuple(tokens["token_bytes"].to_pylist()), tuple(weights.tolist()), int(here.any(1).sum()), float(weights.sum(dtype=np.float64)))  # fmt: skip
