"""Kinds of token within documents: counts and what is claimed of them, by loops over documents."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import reading, within
from analysis.reading import one_pass
from analysis.significance import count_p, sign_flip_test
from analysis.specialization import by_group, by_label
from analysis.within import kind_reading
from tests.test_specialization import random_trace


@pytest.mark.parametrize(("rows", "cells", "units"), [(65_536, 1 << 20, 400), (7, 60, 400), (11, 1, 4)], ids=["whole", "cut", "joined"])
def test_within_documents_by_hand(rows: int, cells: int, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What documents' own rates give, and Mantel and Haenszel's ratio, by loops over documents; some tokens are of no kind."""
    monkeypatch.setattr(reading.blocks, "__defaults__", (rows,))
    monkeypatch.setattr(within, "CELLS", cells)
    monkeypatch.setattr(within, "MOST_UNITS", units)
    trace = random_trace(2, [9, 30, 1, 14, 22, 5, 17])
    kind = np.random.default_rng(0).integers(-1, 3, 98)
    document = trace.stream_tokens("decoder")["document"].to_numpy()
    kind[document == 3] = 1  # a document of one kind says nothing
    found, counted = (
        by_group(trace, 0, "kind", "xyz", kind),
        one_pass(trace, 0, kind_reading(trace, 0, 3, kind))[0],
    )
    inside, outside, expected, variance = (np.zeros((3, 8)) for _ in range(4))
    excess, shared = np.zeros((7, 3, 8)), np.zeros((7, 3))
    for d in range(7):
        uses = np.stack([(trace.experts(0) == e).any(1) for e in range(8)], 1)[(document == d) & (kind >= 0)]
        of = kind[(document == d) & (kind >= 0)]
        for g in range(3):
            mine, share = uses[of == g], uses.mean(0) if len(uses) else np.zeros(8)
            expected[g] += len(mine) * share
            variance[g] += len(mine) * share * (1 - share) * (1 - len(mine) / max(len(of), 1))
            excess[d, g], shared[d, g] = mine.sum(0) - len(mine) * share, len(mine) * (1 - len(mine) / max(len(of), 1))
            inside[g] += mine.sum(0) * (of != g).sum() / max(len(of), 1)
            outside[g] += uses[of != g].sum(0) * len(mine) / max(len(of), 1)
    np.testing.assert_allclose(counted.expected.sum(0), expected)
    np.testing.assert_allclose(counted.variance, variance)
    np.testing.assert_allclose(found.within, np.log2((inside + 0.5) / (outside + 0.5)))
    assert len(counted.counts) == min(units, 7) and np.array_equal(counted.counts.sum(0), found.count)
    np.testing.assert_allclose(inside - outside, found.count - expected, atol=1e-9)  # what is tested leans the way the effect does
    assert np.isnan(by_label(trace, 0).within).all()
    if units == 400:
        rest = excess - shared[:, :, None] * excess.sum(0) / shared.sum(0)[:, None]
        bunch = (rest**2).sum((0, 2)) / (variance.sum(1) * (1 - 1 / (shared > 0).sum(0)))
        np.testing.assert_allclose(counted.dispersion, np.maximum(bunch, 1))
        assert (bunch > 1).any()
        counts = [x / counted.dispersion[:, None] for x in (found.count, expected, variance)]
        p = [sign_flip_test(counted.counts - counted.expected).p, count_p(*counts)]
        np.testing.assert_allclose(found.p, np.maximum(*p))
        assert (p[0] > p[1]).any() and (p[0] < p[1]).any() and (found.family_p >= found.p).all()


def test_a_code_of_no_kind_is_an_error() -> None:
    """A kernel would count it out of bounds."""
    trace = random_trace(2, [9, 30])
    for codes in (np.full(39, 3), np.full(39, -2), np.zeros(38, int)):
        with pytest.raises(ValueError, match="codes for 39 tokens of 3 kinds"):
            by_group(trace, 0, "kind", "xyz", codes)
