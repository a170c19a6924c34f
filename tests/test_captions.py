"""The sentences that a page and the report share: they name what was planted, and claim nothing that was not tested."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.information import Information
from analysis.jackknife import DocumentInterval
from analysis.pair_tests import coactivation_test
from analysis.specialization import Preferences, by_label, effects
from app import captions, charts
from tests.synthetic import site
from tests.test_pair_tests import planted as planted_pairs
from tests.test_specialization import planted_trace, random_trace

LAYER = site(5, 3, 1)


def planted(kind: str = "label") -> Preferences:
    """Groups of 100 tokens: a leads by 55 points to expert 0, b by 35 to 1, c by 20 to expert 2, though its cell is not significant."""
    count = np.array([[70, 20, 10], [10, 60, 30], [20, 30, 50], [20, 30, 50]])
    found = effects(5, kind, ("a", "b", "c", "d"), np.full(4, 100), count)
    return replace(found, significant=np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]], bool), method="coins")


def test_the_headline_names_the_clearest_cells_of_different_groups() -> None:
    told = captions.preferences_headline(planted(), LAYER)
    assert (
        told == "At layer 5, a goes above all to expert 0, b to expert 1; 2 of 3 experts prefer some label beyond chance."
    )  # d's lift is 1.43
    assert "tokens at a go above all to expert 0, b to" in captions.preferences_headline(planted("position"), LAYER)
    assert "a go above all to expert 0, b to expert 1; 2 of 3 experts prefer some kind of token" in captions.preferences_headline(
        planted("class"), LAYER
    )
    none = replace(planted(), significant=np.zeros((4, 3), bool))
    assert captions.preferences_headline(none, LAYER) == "At layer 5, no expert can be said to prefer a label."
    clear = captions.preferences_headline(by_label(planted_trace(), 1), planted_trace().layers[1])
    assert clear == "At layer 1, b goes above all to expert 5; 1 of 8 experts prefers some label beyond chance."


def test_the_tests_units_and_what_was_corrected_for_are_said() -> None:
    assert "corrected for the 12 cells of this layer and this look only" in captions.preferences_how(planted(), LAYER)
    within = "the cross tests within documents"
    assert [within in captions.preferences_how(planted(k), LAYER) for k in captions.KIND] == [False, True, True]


def test_what_cannot_be_tested_has_no_crosses_and_no_verdict() -> None:
    trace = random_trace(0, [60] * 6, labels=("a", "b"))
    few, layer = by_label(trace, 0), trace.layers[0]
    assert captions.preferences_headline(few, layer) == few.missing != ""
    assert captions.CROSS not in captions.enrichment_definition(few, layer) and "Test:" not in captions.preferences_how(few, layer)
    assert captions.CROSS in captions.enrichment_definition(planted(), LAYER)
    told = [charts.enrichment_map(f, ["x"] * len(f.groups), np.arange(len(f.groups)), np.arange(f.count.shape[1]), "light").data[1].x
            for f in (few, planted())]  # fmt: skip
    assert [len(x) for x in told] == [0, 9]


@pytest.mark.parametrize(
    ("p", "said"), [((0.005, 0.005), "p = 0.005."), ((0.005, 0.4), "p = 0.005 to 0.400."), ((np.nan, np.nan), "too few labelled")]
)
def test_information_is_told_with_its_p(p: tuple[float, float], said: str) -> None:
    found = [Information(1, 1, 0.1, x, 2, 3, 2, n, "deals") for x, n in zip(p, (10, 20), strict=True)]
    told, not_told = DocumentInterval(0.5, 0.4, 0.6, 9, 7), DocumentInterval(np.nan, np.nan, np.nan, 9, 0, "too few")
    definition, n, how = captions.information_caption(found, [told, not_told])
    assert said in definition and n == "10 to 20 assignments per layer" and "deals" in how
    assert "each of 7 documents" in how and "Not told of 1 of 2 layers: too few." in how
    assert "is not told: too few." in captions.information_caption(found, [not_told] * 2)[2]


def test_the_headline_of_pairs_names_the_strongest_that_is_tested() -> None:
    """Pair (1, 2) is planted; others may have a larger lift without being significant."""
    found = coactivation_test(planted_pairs(), 0)
    lift, low, high = found.counts.lift[1, 2], found.low[1, 2], found.high[1, 2]
    only = np.zeros((6, 6), bool)
    only[1, 2] = only[2, 1] = True
    told = captions.pairs_headline(replace(found, significant=only), "layer 0")
    assert told == (f"At layer 0, experts 1 and 2 are chosen together {lift:.1f} times as often as their loads alone give (95% {low:.1f} to {high:.1f});"
                    " 1 of 15 pairs differs beyond chance.")  # fmt: skip
    none = replace(found, significant=np.zeros((6, 6), bool))
    assert captions.pairs_headline(none, "layer 0") == "At layer 0, none of 15 pairs of experts can be told from chance."
    assert captions.pairs_headline(replace(none, missing="Why not."), "layer 0") == "Why not."
    assert "signs of 40 documents flipped" in captions.pairs_how(found) and "Test:" not in captions.pairs_how(
        replace(none, missing="Why not.")
    )
