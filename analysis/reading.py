"""A site's decisions read once, in blocks, however many questions are asked of them, and which document each token is of.

Memory is that of a block. Knows nothing of what is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .trace import LayerInfo, Trace, id_dtype

ROWS = 65_536  # tokens read at a time
SPAN = 16 * ROWS  # of a column of the tokens' table, whose row groups are whole parts: at most one in 16 is read twice
READERS = 2  # threads: unpacking and checksums need no lock of Python's
_Key = TypeVar("_Key")
_Found = TypeVar("_Found")
Reading = Generator[None, tuple[int, np.ndarray] | None, _Found]  # see ``one_pass``


def blocks(trace: Trace, layer: LayerInfo, rows: int = ROWS) -> Generator[tuple[int, np.ndarray], None, None]:
    """(first row, executed experts [up to ``rows``, k], of ``id_dtype``) over a site's stream, in order; bounded memory: the next READERS are
    read while one is worked on."""
    ids, n = id_dtype(layer.n_classes), trace.n_tokens(layer.stream)  # one type whatever the source: kernels are compiled for it once

    def read(start: int) -> tuple[int, np.ndarray]:
        return start, np.ascontiguousarray(trace.experts(layer.index, start, min(start + rows, n)), ids)

    yield from in_turn(read, range(0, n, rows))


def in_turn(make: Callable[[_Key], _Found], keys: Iterable[_Key]) -> Generator[_Found, None, None]:
    """``make`` of every key, in order, by READERS threads that are as many keys ahead."""
    made: deque[Future[_Found]] = deque()
    with ThreadPoolExecutor(READERS) as readers:
        for key in keys:
            made.append(readers.submit(make, key))
            if len(made) > READERS:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


def coded_tokens(trace: Trace, stream: str, column: str, code: Callable[[pa.Array], np.ndarray],
                 progress: Callable[[int, int], None] | None = None) -> np.ndarray:  # fmt: skip
    """int8 [tokens of the stream]: what ``code`` makes of ``column``, chunk by chunk as it is stored. ``progress`` is as for ``one_pass``."""
    n = trace.n_tokens(stream)
    codes = np.empty(n, np.int8)

    def fill(start: int) -> int:
        for chunk in trace.token_column(stream, column, start, min(start + SPAN, n)).chunks:
            codes[start : start + len(chunk)] = code(chunk)
            start += len(chunk)
        return start

    with closing(in_turn(fill, range(0, n, SPAN))) as filled:
        for done in filled:
            if progress is not None:
                progress(done, n)
    return codes


def one_pass(trace: Trace, site: int, *readings: Reading[Any], progress: Callable[[int, int], None] | None = None) -> list[Any]:
    """What each of ``readings`` finds in a site's decisions, which are decoded once for all of them.

    A reading is a generator that is sent every (first row, executed experts) of ``blocks``, then None, and returns what it found. All of
    them work side by side. ``progress`` is told (tokens read, in all) by the caller's thread; what it raises ends the pass.
    """
    n = trace.n_tokens(trace.layers[site].stream)
    with closing(blocks(trace, trace.layers[site])) as read, ThreadPoolExecutor() as pool:
        list(pool.map(next, readings))
        for start, experts in read:
            list(pool.map(partial(_sent, (start, experts)), readings))
            if progress is not None:
                progress(start + len(experts), n)
        return list(pool.map(_finished, readings))


def _sent(block: tuple[int, np.ndarray], reading: Reading[Any]) -> None:
    reading.send(block)


def end_of(layer: LayerInfo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts, document, row) of one token of no document: tells kernels that add up a document when it ends that the last one has."""
    return np.full((1, layer.top_k), -1, id_dtype(layer.n_classes)), np.array([-1]), np.array([-1])


def _finished(reading: Reading[_Found]) -> _Found:
    """What a reading found, at the end of its pass."""
    try:
        reading.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a reading goes on after the last block")


def assignments_reading(layer: LayerInfo, group: np.ndarray, n_groups: int) -> Reading[np.ndarray]:
    """int64 [groups, classes]: assignments of the tokens of each group; ``group`` int [tokens], -1 for none."""
    from .counting import check_ids
    from .shuffling import count_groups  # pay for numba

    counts = np.zeros((1, n_groups + 1, layer.n_classes + 1), np.int64)  # places more for no group and no expert
    if len(group) and not -1 <= group.min() <= group.max() < n_groups:  # a kernel would count it out of bounds
        raise ValueError(f"groups {group.min()} to {group.max()} of {n_groups}")
    while (block := (yield)) is not None:
        start, experts = block
        check_ids(experts, layer.n_classes)
        count_groups(experts, np.array([0, len(experts)]), group[start : start + len(experts)], counts)
    return counts[0, 1:, 1:]


def documents_of(trace: Trace, stream: str) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [D] numbers, int64 [D] tokens) of the documents that have any in the stream, in the order of their rows, which lie side by side."""
    rows = trace.documents.filter(pc.and_(pc.equal(trace.documents["stack"], stream), pc.greater(trace.documents["n_tokens"], 0)))
    rows = rows.sort_by("first_row")
    return rows["document"].to_numpy().astype(np.int64), rows["n_tokens"].to_numpy().astype(np.int64)


def block_owners(edges: np.ndarray, start: int, stop: int) -> np.ndarray:
    """int64 [stop - start]: which of ``documents_of`` rows ``start`` to ``stop`` are of, where document d is the rows edges[d] to edges[d + 1]."""
    first, last = np.searchsorted(edges, (start, stop - 1), "right") - 1
    return np.repeat(np.arange(first, last + 1), np.diff(np.clip(edges[first : last + 2], start, stop)))
