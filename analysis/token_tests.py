"""Is a token id sent to an expert more often than its documents' other tokens are? A test whose unit is the document.

Each document that holds the id gives one number, the share of the id's occurrences there that use the expert; where the id says nothing it
is expected to be the document's own rate. So a word that one document repeats counts once. Knows nothing of texts or screens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .significance import benjamini_hochberg, shares_p
from .specialization import CELLS, Reading, one_pass, owners
from .trace import Trace
from .vocabulary import LEAST, TokenCounts, coded


@dataclass(frozen=True)
class TokenTests:
    """Of some ids at every expert, float64 [ids, classes]; one-sided: the id uses the expert more often than its documents' tokens do.

    p        ``shares_p`` of the documents' shares against their own rates, over all tokens of the documents that have an id of this kind.
    q        Benjamini and Hochberg over ``family`` cells: every id seen ``least`` times x every expert of the site. Cells of ids that were not
             asked for count with p = 1, so that q errs high, and choosing the ids of highest lift is paid for.
    """

    p: np.ndarray
    q: np.ndarray
    family: int


def token_tests(trace: Trace, counts: TokenCounts, ids: np.ndarray, least: int = LEAST) -> TokenTests:
    """Of ``ids`` (ascending, of counts.ids). One pass over the site; nothing is drawn. Memory: int32 [documents, classes], and two
    float64 [ids, classes].
    """
    found: TokenTests = one_pass(trace, counts.site, tests_reading(trace, counts, ids, least))[0]
    return found


def tests_reading(trace: Trace, counts: TokenCounts, ids: np.ndarray, least: int = LEAST) -> Reading[TokenTests]:
    """``token_tests`` for a pass that others share."""
    layer = trace.layers[counts.site]
    every, code = coded(trace, layer.stream, counts.kind)
    place = np.full(len(every) + 1, -1)  # the last for tokens that have no id
    place[np.searchsorted(every, ids)] = np.arange(len(ids))
    row, owner = place[code], owners(trace.stream_tokens(layer.stream, columns=["document"])["document"].to_numpy())
    size, asked = np.bincount(owner[code >= 0]), row >= 0
    pairs, pair, occurs = np.unique(row[asked] * len(size) + owner[asked], return_inverse=True, return_counts=True)
    weight, width = np.zeros(len(row)), layer.n_classes + 1  # a column more for places without an expert
    weight[asked] = 1 / occurs[pair]
    load, share = np.zeros(len(size) * width, np.int32), np.zeros(len(ids) * width)
    while (block := (yield)) is not None:
        start, experts = block
        here = slice(start, start + len(experts))
        known, mine = code[here] >= 0, asked[here]
        np.add.at(load, (owner[here][known, None] * width + experts[known] + 1).ravel(), 1)
        np.add.at(share, (row[here][mine, None] * width + experts[mine] + 1).ravel(), np.repeat(weight[here][mine], layer.top_k))
    at, document = np.divmod(pairs, max(len(size), 1))
    rate, step = np.zeros((len(ids), layer.n_classes)), max(CELLS // width, 1)
    for first in range(0, len(pairs), step):
        of = document[first : first + step]
        starts = np.flatnonzero(np.diff(at[first : first + step], prepend=-1))
        rate[at[first + starts]] += np.add.reduceat(load.reshape(-1, width)[of, 1:] / size[of, None], starts)
    p = shares_p(share.reshape(-1, width)[:, 1:], rate, np.bincount(at, minlength=len(ids))[:, None])
    family = int((counts.tokens >= least).sum()) * layer.n_classes
    return TokenTests(p, benjamini_hochberg(p, max(family, p.size)), family)
