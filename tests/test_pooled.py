"""The pooled diagnostic on built and on random layers, and transformers' pooled loss."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.metrics import METRICS
from analysis.pooled import pooled_balance, transformers_auxiliary_loss
from analysis.trace import SiteRouting, Trace
from tests.synthetic import make_part, make_trace, site


def layered(loads: np.ndarray) -> Trace:
    """Top-1 layers with exactly these loads [layers, experts], equal sums."""
    layers = tuple(site(i, loads.shape[1], 1) for i in range(len(loads)))
    part = make_part(layers, [int(loads[0].sum())])
    routing = []
    for row, old in zip(loads, part.routing, strict=True):
        experts = np.repeat(np.arange(len(row)), row)[:, None].astype(np.int16)
        routing.append(SiteRouting(experts, old.weights, experts))
    sums = tuple(np.asarray(row, float) for row in loads)
    return make_trace(layers, [replace(part, routing=tuple(routing), probability_sums=sums)])


def test_collapsed_layers_that_hide_each_other_are_named() -> None:
    collapsed = np.full((8, 8), 10) + 330 * np.eye(8, dtype=int)
    hidden = layered(collapsed)
    found = pooled_balance(hidden)
    assert found is not None and found.hidden and found.pooled == 1 and found.worst == pytest.approx(340 * 8 / 410)
    assert found.p < 0.01 and found.chance > 1.5 and found.dead == 0 and found.layers == 8
    assert METRICS["auxiliary_loss"](hidden)["value"].to_numpy().min() > 5  # each layer is far from 1 ...
    assert transformers_auxiliary_loss(hidden) == pytest.approx(1)  # ... the pooled variant sees nothing


def test_even_and_openly_collapsed_layers_are_not_hidden() -> None:
    even = pooled_balance(layered(np.full((4, 8), 20)))
    assert even is not None and not even.hidden and even.pooled == even.worst == 1 and even.p == 1
    open_ = np.full((4, 8), 10)
    open_[:, 2] = 340
    found = pooled_balance(layered(open_))
    assert found is not None and not found.hidden and found.pooled == found.worst and found.p > 0.9 and found.worst_site == 0
    dead = np.full((4, 8), 20)
    dead[[0, 1, 2, 3], [0, 1, 2, 3]] = 0
    dead[[0, 1, 2, 3], [4, 5, 6, 7]] = 40
    quiet = pooled_balance(layered(dead))
    assert quiet is not None and quiet.dead == 4 and quiet.hidden and quiet.worst == 2


def test_layers_numbered_at_random_look_pooled_as_chance_says() -> None:
    small = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = pooled_balance(layered(np.array([rng.permutation([1, 2, 4, 8, 16, 32, 64, 128]) for _ in range(6)])), draws=199)
        assert found is not None
        small += found.p <= 0.05
    assert small < 8


def test_what_cannot_be_pooled() -> None:
    assert pooled_balance(make_trace((site(0),), [make_part((site(0),), [5])])) is None
    layers = (site(0, 8), site(1, 4))
    mixed = make_trace(layers, [make_part(layers, [5])])
    assert pooled_balance(mixed) is None and math.isnan(transformers_auxiliary_loss(mixed))


def test_transformers_variant_is_k_when_even() -> None:
    layers = (site(0, 8, 2), site(1, 8, 2))
    part = make_part(layers, [400] * 10)
    trace = make_trace(layers, [replace(part, probability_sums=(np.full(8, 500.0),) * 2)])
    assert transformers_auxiliary_loss(trace) == pytest.approx(2)
    unknown = make_trace(layers, [replace(part, probability_sums=(np.zeros(8),) * 2)])
    assert math.isnan(transformers_auxiliary_loss(unknown))
