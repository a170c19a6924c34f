"""What the capacity lab groups a stream's tokens by: batches, documents, labels, positions, token ids.

Keys are (int32 [tokens], which value each token has; the values).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .slots import Batches, CapacityError, make_batches
from .trace import Trace, by_document

Keys = tuple[np.ndarray, pa.Array]


def batches_of(trace: Trace, stream: str, scope: str, size: int | None = None, mixed: int | None = None) -> Batches:
    """``slots.make_batches`` over the documents of a stream."""
    return make_batches(document_lengths(trace, stream), scope, size, mixed)


def document_lengths(trace: Trace, stream: str) -> np.ndarray:
    """int64 [documents]: tokens of each of a stream. Raises CapacityError unless their rows follow one another from row 0."""
    here = pc.equal(trace.documents["stack"], stream)
    mine = trace.documents if pc.all(here).as_py() else trace.documents.filter(here)
    lengths, first = (mine[c].to_numpy().astype(np.int64) for c in ("n_tokens", "first_row"))
    if not np.array_equal(first, np.cumsum(lengths) - lengths):
        raise CapacityError(f"the documents of stream {stream!r} do not follow one another: batches cannot be told")
    return lengths


def documents(trace: Trace, stream: str) -> Keys:
    """Of which document each token is."""
    lengths = document_lengths(trace, stream)
    numbers = [document for document, *_ in by_document(trace.documents, stream)]
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), pa.array(numbers, pa.int32())


def labels(trace: Trace, stream: str) -> Keys:
    """The label of each token's document, null where it has none."""
    lengths = document_lengths(trace, stream)
    of_document = [label for *_, label in by_document(trace.documents, stream)]
    labels = sorted({x for x in of_document if x is not None}) + [None] * (None in of_document)
    code = {label: i for i, label in enumerate(labels)}
    return np.repeat(np.array([code[x] for x in of_document], np.int32), lengths), pa.array(labels, pa.string())


def positions(trace: Trace, stream: str, width: int | None) -> Keys:
    """Bins by first position; doubling bins start at 0, 1, 3, 7, ... as in stats.py."""
    lengths = document_lengths(trace, stream)
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    code = np.frexp(position + 1.0)[1] - 1 if width is None else position // width
    bins = np.arange(code.max(initial=-1) + 1)
    return code.astype(np.int32), pa.array(2**bins - 1 if width is None else bins * width, pa.int64())


def token_ids(trace: Trace, stream: str) -> Keys:
    """Each token's id."""
    ids = trace.stream_tokens(stream, columns=["token_id"])["token_id"].to_numpy()
    there = np.flatnonzero(np.bincount(ids))  # ids are 0 and above
    code = np.empty(ids.max(initial=-1) + 1, np.int32)
    code[there] = np.arange(len(there))
    return code[ids], pa.array(there.astype(ids.dtype))
