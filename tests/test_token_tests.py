"""Token ids tested by document: against loops, planted ids are found, and a habit of one document is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import token_tests as module
from analysis.significance import benjamini_hochberg, shares_p
from analysis.specialization import blocks
from analysis.token_tests import token_tests
from analysis.token_use import document_use, leading_ids, top_tokens_of
from analysis.trace import SiteRouting, Trace
from analysis.vocabulary import VARIANTS, input_tokens
from tests.synthetic import PLAIN, SPECIAL, TWO_STREAMS, make_part, make_trace


@pytest.mark.parametrize("layers", [PLAIN, SPECIAL, TWO_STREAMS], ids=["plain", "special", "streams"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cells", [1 << 20, 1], ids=["whole", "cut"])
def test_shares_of_documents_by_loops(layers: tuple, variant: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "__defaults__", (1 << 16 if cells > 1 else 7,))
    monkeypatch.setattr(module, "CELLS", cells)
    trace = make_trace(layers, [make_part(layers, [60, 1, 30, 40], seed=3, n_ids=6)])
    counts = VARIANTS[variant](trace, 0)
    ids = counts.ids[::2]
    found = token_tests(trace, counts, ids, least=5)
    table, experts = trace.stream_tokens(layers[0].stream).to_pandas(), trace.experts(0)
    key = {"input": table.token_id, "next": table.token_id.shift(-1).where(table.document.eq(table.document.shift(-1))),
           "predicted": table.predicted}[variant]  # fmt: skip
    for row, token in enumerate(ids):
        holding = [d for d in range(4) if ((key == token) & (table.document == d)).any()]
        for expert in range(layers[0].n_classes):
            uses = pd.Series((experts == expert).any(1))
            share = sum(uses[(key == token) & (table.document == d)].mean() for d in holding)
            rate = sum(uses[key.notna() & (table.document == d)].mean() for d in holding)
            assert found.p[row, expert] == pytest.approx(float(shares_p(np.array(share), np.array(rate), np.array(len(holding)))))
    family = int((counts.tokens >= 5).sum()) * layers[0].n_classes
    assert found.family == family > found.p.size and np.array_equal(found.q, benjamini_hochberg(found.p, family))


def served(only: list[int]) -> Trace:
    """20 documents of 100 tokens; id 3 goes to expert 5, in the documents ``only``."""
    part = make_part(PLAIN, [100] * 20)
    experts, ids = part.routing[0].experts.copy(), part.tokens["token_id"].to_numpy()
    mine = (ids == 3) & np.isin(part.tokens["document"].to_numpy(), only)
    experts[mine] = [5, 1]
    return make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])


def test_what_all_documents_do_is_found_and_the_habit_of_two_is_not() -> None:
    for only, claimed in ((list(range(20)), True), ([0, 1], False)):
        trace = served(only)
        counts = input_tokens(trace, 0)
        use = document_use(trace, counts, leading_ids(counts, range(8)))
        assert use is not None
        told = {(t.token_id, e): t for e, uses in enumerate(top_tokens_of(trace, counts, range(8), use=use)) for t in uses}
        assert (told[3, 5].q <= 0.05) == claimed and (told[3, 5].p_documents, told[3, 5].q) == (
            use.tests.p[np.searchsorted(use.ids, 3), 5], use.tests.q[np.searchsorted(use.ids, 3), 5])  # fmt: skip
        assert {k for k, t in told.items() if t.q <= 0.05} <= {(3, 5), (3, 1)}
    assert top_tokens_of(trace, counts, [5])[0][0].q is None


def test_a_word_repeated_by_one_document_counts_once() -> None:
    part = make_part(PLAIN, [100] * 20)
    ids, experts = part.tokens["token_id"].to_numpy().copy(), part.routing[0].experts.copy()
    ids[ids == 3] = 4
    ids[:60], experts[:60] = 3, [5, 1]
    column = part.tokens.schema.get_field_index("token_id")
    tokens = part.tokens.set_column(column, part.tokens.schema.field(column), [ids.astype(np.int32)])
    trace = make_trace(
        PLAIN, [replace(part, tokens=tokens, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))]
    )
    found = top_tokens_of(trace, input_tokens(trace, 0), [5], use=document_use(trace, input_tokens(trace, 0)))[0]
    habit = next(t for t in found if t.token_id == 3)
    assert habit.p == 0.005 and habit.documents == 1 and habit.p_documents > 0.3 and habit.q == 1
