"""The binomial distribution against its formula in whole numbers, and its moments where that is out of reach."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from analysis.binomial import binomial


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("share", [Fraction(1, 64), Fraction(1, 4), Fraction(7, 8)])
def test_by_formula(tokens: int, share: Fraction) -> None:
    low, mass = binomial(tokens, float(share))
    exact = [float(comb(tokens, x) * share**x * (1 - share) ** (tokens - x)) for x in range(tokens + 1)]
    np.testing.assert_allclose(mass, exact[low : low + len(mass)], rtol=1e-10)
    assert sum(exact[:low]) + sum(exact[low + len(mass) :]) < 1e-15


def test_of_many_tokens_in_memory_of_their_root() -> None:
    low, mass = binomial(10**8, 1 / 8)
    x = low + np.arange(len(mass))
    assert len(mass) < 100_000 and mass.sum() == pytest.approx(1) and (mass * x).sum() == pytest.approx(10**8 / 8, rel=1e-9)
    assert (mass * (x - 10**8 / 8) ** 2).sum() == pytest.approx(10**8 * 7 / 64, rel=1e-6)
