"""Load imbalance: published vectors, properties that hold for every load, and the chance values against simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import balance

VECTOR = np.array([4, 2, 1, 1])
LOADS = st.lists(st.integers(0, 10**12), min_size=1, max_size=64).filter(any).map(lambda x: np.array(x, np.int64))
# name -> (value on the vector, even, collapsed onto one of E), as functions of E
PUBLISHED: dict[str, tuple[float, Callable[[int], float], Callable[[int], float]]] = {
    "max_over_mean": (2.0, lambda e: 1, lambda e: e),
    "maxvio": (1.0, lambda e: 0, lambda e: e - 1),
    "cv": (0.6123724, lambda e: 0, lambda e: math.sqrt(e - 1)),
    "gini": (0.3125, lambda e: 0, lambda e: 1 - 1 / e),
    "entropy": (1.2130076, lambda e: math.log(e), lambda e: 0),
    "normalised_entropy": (0.875, lambda e: 1, lambda e: 0),
    "effective_experts": (3.3635857, lambda e: e, lambda e: 1),
    "balancedness": (0.5, lambda e: 1, lambda e: 1 / e),
    "dead": (0, lambda e: 0, lambda e: e - 1),
    "cold": (0, lambda e: 0, lambda e: e - 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_vector(name: str) -> None:
    assert getattr(balance, name)(VECTOR) == pytest.approx(PUBLISHED[name][0], abs=1e-7)


@pytest.mark.parametrize("n_experts", [2, 16, 300])
@pytest.mark.parametrize("name", PUBLISHED)
def test_even_and_collapsed_loads_meet_the_ends_of_the_range(name: str, n_experts: int) -> None:
    _, even, collapsed = PUBLISHED[name]
    one = np.zeros(n_experts, np.int64)
    one[n_experts // 2] = 1_000
    assert getattr(balance, name)(np.full(n_experts, 7)) == pytest.approx(even(n_experts), abs=1e-9)
    assert getattr(balance, name)(one) == pytest.approx(collapsed(n_experts), abs=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
@given(load=LOADS, seed=st.integers(0, 2**32 - 1))
def test_between_its_ends_and_blind_to_names_and_scale(name: str, load: np.ndarray, seed: int) -> None:
    _, even, collapsed = PUBLISHED[name]
    function, n = getattr(balance, name), len(load)
    value = function(load)
    if n > 1:  # a layer of one expert is even and collapsed at once
        low, high = sorted((even(n), collapsed(n)))
        assert low - 1e-7 <= value <= high + 1e-7
    assert function(np.random.default_rng(seed).permutation(load)) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert function(load * 3) == pytest.approx(value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_assignments_give_nan(name: str) -> None:
    assert math.isnan(getattr(balance, name)(np.zeros(4, np.int64)))


@given(load=LOADS)
def test_gini_is_the_mean_absolute_difference(load: np.ndarray) -> None:
    x = load.astype(float)
    direct = np.abs(x[:, None] - x[None]).sum() / (2 * len(x) ** 2 * x.mean())
    assert balance.gini(load) == pytest.approx(direct, abs=1e-9)


def test_dead_and_cold_are_told_apart() -> None:
    load = np.array([0, 9, 10, 81, 900])  # mean 200: below 20 is cold
    assert (balance.dead(load), balance.cold(load)) == (1, 3)


def test_relative_load() -> None:
    assert balance.relative_load(VECTOR).tolist() == [2, 1, 0.5, 0.5]


def test_switch_auxiliary_loss() -> None:
    even = np.ones(4)
    assert balance.switch_auxiliary_loss(VECTOR, VECTOR / 8) == pytest.approx(1.375)
    assert balance.switch_auxiliary_loss(VECTOR, even) == pytest.approx(1)  # even probabilities: 1 whatever the load
    assert balance.switch_auxiliary_loss(np.array([8, 0, 0, 0]), np.array([5.0, 0, 0, 0])) == pytest.approx(4)
    assert math.isnan(balance.switch_auxiliary_loss(VECTOR, np.zeros(4)))
    assert math.isnan(balance.switch_auxiliary_loss(np.zeros(4, np.int64), even))


def simulated(tokens: int, n_experts: int, top_k: int, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """(max / mean, CV^2) of ``runs`` runs in which every token picks top_k different experts uniformly."""
    rng = np.random.default_rng([tokens, n_experts, top_k])
    peaks, squares = np.empty(runs), np.empty(runs)
    for i in range(runs):
        ids = rng.random((tokens, n_experts)).argpartition(top_k - 1, axis=1)[:, :top_k]
        load = np.bincount(ids.ravel(), minlength=n_experts)
        peaks[i], squares[i] = balance.max_over_mean(load), balance.cv(load) ** 2
    return peaks, squares


@pytest.mark.parametrize(
    ("tokens", "n_experts", "top_k"),
    [(1, 8, 2), (5, 64, 1), (20, 64, 8), (100, 16, 2), (512, 8, 1), (400, 2, 1), (500, 64, 8), (512, 128, 1)],
)
def test_chance_against_simulation(tokens: int, n_experts: int, top_k: int) -> None:
    peaks, squares = simulated(tokens, n_experts, top_k, 400)
    peak_error, square_error = (3.5 * x.std() / np.sqrt(len(x)) + 1e-9 for x in (peaks, squares))
    assert abs(balance.chance_cv(tokens, n_experts, top_k) ** 2 - squares.mean()) <= square_error
    bound = balance.chance_max_over_mean(tokens, n_experts, top_k)
    assert peaks.mean() - peak_error <= bound <= 1.05 * (peaks.mean() + peak_error)


def test_the_busiest_of_many_layers_is_rarely_beyond_what_is_unlikely() -> None:
    """Picked from 12 layers, it exceeds what one layer's busiest is expected to have in nearly every run of random routing."""
    peaks = simulated(600, 32, 2, 12 * 300)[0].reshape(300, 12).max(1)
    bar = balance.unlikely_max_over_mean(600, 32, 2, 12)
    assert 0.005 < (peaks > bar * (1 + 1e-12)).mean() <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
    assert (peaks > balance.chance_max_over_mean(600, 32, 2)).mean() > 0.9
    assert balance.unlikely_max_over_mean(600, 32, 2) < bar and balance.unlikely_max_over_mean(10, 4, 4, 3) == 1
    assert balance.unlikely_max_over_mean(1, 8, 2) == 4 and math.isnan(balance.unlikely_max_over_mean(0, 8, 2))


def test_chance_of_dead_experts_against_simulation() -> None:
    rng = np.random.default_rng(0)
    dead = [16 - len(np.unique(rng.random((12, 16)).argpartition(1, axis=1)[:, :2])) for _ in range(2_000)]
    assert np.mean(dead) == pytest.approx(balance.chance_dead(12, 16, 2), abs=3.5 * np.std(dead) / 2_000**0.5)
    assert balance.chance_dead(1, 8, 2) == 6 and balance.chance_dead(5, 4, 4) == 0 and math.isnan(balance.chance_dead(0, 8, 2))


def test_chance_of_cold_experts_against_simulation() -> None:
    rng = np.random.default_rng(0)
    for tokens in (12, 60, 200):  # a tenth of the mean is 0.15, 0.75, 2.5
        chosen = (rng.random((1_000, tokens, 16)).argpartition(1, axis=2)[:, :, :2] + 16 * np.arange(1_000)[:, None, None]).ravel()
        cold = (np.bincount(chosen, minlength=16_000).reshape(1_000, 16) < 0.1 * tokens / 8).sum(1)
        assert np.mean(cold) == pytest.approx(balance.chance_cold(tokens, 16, 2), abs=4 * max(np.std(cold), 0.002) / 1_000**0.5)
    assert balance.chance_cold(12, 16, 2) == pytest.approx(balance.chance_dead(12, 16, 2))
    assert balance.chance_cold(10**9, 64, 8) == 0 == balance.chance_cold(5, 4, 4) and math.isnan(balance.chance_cold(0, 8, 2))


def test_chance_at_the_edges() -> None:
    assert balance.chance_max_over_mean(1, 8, 2) == pytest.approx(4)  # one token: two experts at 1, mean 1/4
    assert balance.chance_cv(10, 4, 4) == 0 and balance.chance_max_over_mean(10, 4, 4) == 1  # every expert, always
    assert math.isnan(balance.chance_cv(0, 8, 2)) and math.isnan(balance.chance_max_over_mean(0, 8, 2))
    assert 1 < balance.chance_max_over_mean(10**9, 64, 8) < 1.001


@pytest.mark.parametrize(
    ("function", "value"),
    [(balance.max_over_mean, 2.0), (balance.maxvio, 1.0), (balance.cv, 0.61237), (balance.gini, 0.3125), (balance.entropy, 1.21301),
     (balance.effective_experts, 3.3636), (balance.balancedness, 0.5), (balance.dead, 0), (balance.cold, 0)],
)  # fmt: skip
def test_published_vector(function: object, value: float) -> None:
    assert function(VECTOR) == pytest.approx(value, abs=5e-5)


def test_auxiliary_loss_vector() -> None:
    assert balance.switch_auxiliary_loss(VECTOR, VECTOR / 8) == pytest.approx(1.375)
    assert balance.switch_auxiliary_loss(np.ones(4), np.ones(4)) == pytest.approx(1)


def test_dead_and_cold_experts() -> None:
    load = np.array([0, 0, 3, 97])
    assert (balance.dead(load), balance.cold(load)) == (2, 2)
    assert balance.relative_load(load).tolist() == [0, 0, 0.12, 3.88]


def test_chance_values_against_simulated_routing() -> None:
    rng = np.random.default_rng(0)
    cvs, peaks = [], []
    for _ in range(300):
        chosen = rng.random((500, 16)).argsort(1)[:, :2]
        load = np.bincount(chosen.ravel(), minlength=16)
        cvs.append(balance.cv(load) ** 2)
        peaks.append(balance.max_over_mean(load))
    assert np.sqrt(np.mean(cvs)) == pytest.approx(balance.chance_cv(500, 16, 2), rel=0.05)
    bound = balance.chance_max_over_mean(500, 16, 2)
    assert np.mean(peaks) - 1 < bound - 1 < 1.5 * (np.mean(peaks) - 1)


def test_a_layer_without_assignments_is_nan() -> None:
    empty = np.zeros(4, np.int64)
    for function in (balance.max_over_mean, balance.cv, balance.gini, balance.entropy, balance.balancedness, balance.dead, balance.cold):
        assert np.isnan(function(empty)), function
    assert np.isnan(balance.switch_auxiliary_loss(empty, empty))


loads = st.lists(st.integers(0, 10_000), min_size=2, max_size=40).filter(any).map(np.array)


@given(loads, st.randoms())
def test_relabelling_experts_changes_nothing(load: np.ndarray, rng: object) -> None:
    shuffled = load.copy()
    rng.shuffle(shuffled)
    for function in (balance.maxvio, balance.cv, balance.gini, balance.entropy, balance.dead, balance.cold):
        assert function(load) == pytest.approx(function(shuffled), abs=1e-9)
