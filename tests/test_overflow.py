"""What overflows at a site, against counting one at a time: tables, curves, and what chance and loads alone tell of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.overflow import chance_curve, curve_of_loads
from analysis.policies import rank_site, site_curve
from analysis.slots import PRESETS, CapacityError, batch_loads, capacities, make_batches
from tests.test_policies import COMPILING, ORDERED, queues_of, sites


@COMPILING
@given(site=sites(), factors=st.lists(st.floats(0, 5), min_size=2, max_size=5))
def test_dropped_total_is_the_excess_over_capacity_for_every_policy(site: tuple, factors: list[float]) -> None:
    experts, weights, n_experts, batches = site
    loads = batch_loads(experts, n_experts, batches)
    for factor in factors:
        slots = capacities(batches.sizes, n_experts, experts.shape[1], np.array([factor]), PRESETS["megatron"])
        for policy in ORDERED:
            over = rank_site(experts, weights, n_experts, batches, policy).at(factor)
            assert over.dropped.sum() == np.maximum(loads - slots, 0).sum()
            dropped, all_slots = curve_of_loads(loads, batches.sizes, experts.shape[1], [factor])
            assert (dropped[0], all_slots[0]) == (over.dropped.sum(), over.capacity.sum())
            assert over.total()["idle"] == np.maximum(slots - loads, 0).sum()
            assert (batch_loads(np.where(over.kept, experts, -1), n_experts, batches) <= slots).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("policy", ORDERED)
@COMPILING
@given(site=sites(), factors=st.lists(st.floats(0, 4), min_size=1, max_size=6))
def test_curve_equals_one_factor_at_a_time(policy: str, preset: str, site: tuple, factors: list[float]) -> None:
    experts, weights, n_experts, batches = site
    queues, rule = rank_site(experts, weights, n_experts, batches, policy), PRESETS[preset]
    curve = site_curve(experts, weights, n_experts, batches, policy, factors, rule)
    for i, row in enumerate(pa.table(curve.columns()).to_pylist()):
        total = queues.at(factors[i], rule).total()
        assert {x: row[x] for x in row if x in total and "mass" not in x} == {x: total[x] for x in row if x in total and "mass" not in x}
        for mass in ("gate_mass", "gate_mass_lost"):
            assert row[mass] == pytest.approx(total[mass], rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("preset", ["megatron", "megablocks", "tutel"])
@COMPILING
@given(site=sites(), factors=st.lists(st.floats(0, 4), min_size=1, max_size=6))
def test_the_curve_by_groups_equals_one_factor_at_a_time(preset: str, site: tuple, factors: list[float]) -> None:
    experts, weights, n_experts, batches = site
    queues, rule, keys = rank_site(experts, weights, n_experts, batches, "probability"), PRESETS[preset], np.arange(len(experts)) % 3
    rows = queues.curve_by(keys, 4, factors, rule).to_pylist()
    expected = [{"key": key, "factor": f, **queues.at(f, rule).by(keys, 4).to_pylist()[key]} for key in range(4) for f in factors]
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-12, abs=1e-9)


@COMPILING
@given(site=sites(), factor=st.floats(0, 3))
def test_tables_against_counting_by_hand(site: tuple, factor: float) -> None:
    experts, weights, n_experts, batches = site
    over = rank_site(experts, weights, n_experts, batches, "probability").at(factor)
    keys = np.arange(len(experts)) % 3
    rows = over.by(keys, 4).to_pylist()
    for key in range(4):
        mine = {"tokens": 0, "assignments": 0, "dropped": 0, "fully_dropped": 0, "partly_dropped": 0, "top1_dropped": 0}
        mass, lost = 0.0, 0.0
        for i in np.flatnonzero(keys == key):
            had = [s for s in range(experts.shape[1]) if experts[i, s] >= 0]
            gone = [s for s in had if not over.kept[i, s]]
            mine["tokens"] += 1
            mine["assignments"] += len(had)
            mine["dropped"] += len(gone)
            mine["fully_dropped"] += bool(had) and gone == had
            mine["partly_dropped"] += bool(gone) and gone != had
            mine["top1_dropped"] += bool(had) and max(had, key=lambda s: (weights[i, s], -s)) in gone
            mass, lost = mass + sum(map(float, weights[i, had])), lost + sum(map(float, weights[i, gone]))
        assert {x: rows[key][x] for x in mine} == mine
        assert (rows[key]["gate_mass"], rows[key]["gate_mass_lost"]) == pytest.approx((mass, lost), abs=1e-9)
    for row in over.by_expert().to_pylist():
        sent = experts == row["expert"]
        assert (row["assignments"], row["dropped"], row["kept"]) == (sent.sum(), (sent & ~over.kept).sum(), (sent & over.kept).sum())
        assert row["slots"] - row["kept"] == row["idle"] >= 0
        assert (over.kept_load[row["expert"]], over.dropped_load[row["expert"]]) == (row["kept"], row["dropped"])
        assert row["gate_mass_lost"] == pytest.approx(weights[sent & ~over.kept].astype(float).sum(), abs=1e-9)


def test_of_equal_weights_the_lower_slot_is_the_first_choice() -> None:
    ones = np.ones((2, 2), np.float32)
    for experts, top1 in (([[0, 1], [0, 2]], 1), ([[0, 1], [2, 0]], 0)):  # the second token loses expert 0 at one slot
        total = rank_site(np.array(experts, np.int16), ones, 3, make_batches([2])).at(slots=1).total()
        assert (total["dropped"], total["partly_dropped"], total["top1_dropped"]) == (1, 1, top1)


def test_classes_without_weights_take_no_slot() -> None:
    experts = np.array([[0, 4], [0, 5], [1, 0]], np.int16)  # 4 experts; 4 and 5 compute nothing
    over = rank_site(experts, np.ones((3, 2), np.float32), 4, make_batches([3]), n_special=2).at(slots=1)
    assert over.kept.tolist() == [[True, True], [False, True], [True, False]]
    assert (over.total()["assignments"], over.total()["dropped"], over.total()["fully_dropped"]) == (4, 2, 1)


def test_edges_are_exact() -> None:
    one = rank_site(np.array([[3]], np.int16), np.ones((1, 1), np.float32), 8, make_batches([1]))
    assert one.at(0.0).dropped.all() and not one.at(0.001).dropped.any() and one.at(1e6).total()["slots"] == 8 * 125_000
    assert one.at(slots=2**40).total()["idle"] == 8 * 2**40 - 1
    nobody = rank_site(np.full((5, 2), -1, np.int16), np.zeros((5, 2), np.float32), 4, make_batches([5]))
    total = nobody.at(1.0).total()
    assert (total["assignments"], total["dropped"], total["idle"]) == (0, 0, 12) and total["tokens"] == 5
    empty = rank_site(np.zeros((0, 2), np.int16), np.zeros((0, 2), np.float32), 4, make_batches([]))
    assert empty.at().total()["tokens"] == 0 and not empty.at().kept.any()
    assert site_curve(np.zeros((0, 2), np.int16), np.zeros((0, 2), np.float32), 4, make_batches([])).dropped.sum() == 0
    assert len(empty.at().by_expert()) == 4


def test_settings_without_meaning() -> None:
    with pytest.raises(CapacityError, match="batches, E"):
        curve_of_loads(np.array([3, 2]), np.array([5]), 1)
    queues = queues_of([[0], [1]], [[1], [1]])
    for work, message in ((lambda: queues.at(-1.0), "capacity factor"), (lambda: queues.at(slots=-1), "slots"),
                          (lambda: queues.at().by(np.array([0]), 1), "one key"), (lambda: queues.at().by(np.array([0, 3]), 3), "one key"),
                          (lambda: queues_of([[0], [1]], [[1], [1]], policy="dropless").at(block=0), "block"),
                          (lambda: site_curve(np.array([[0]]), np.ones((1, 1), np.float32), 2, make_batches([1]), "dropless"), "no curve"),
                          (lambda: site_curve(np.array([[0], [4]]), np.ones((2, 1), np.float32), 4, make_batches([2])), "outside"),
                          (lambda: site_curve(np.array([[0], [4]]), np.ones((2, 1), np.float32), 4, make_batches([2]), "choice"),
                           "outside")):  # fmt: skip
        with pytest.raises(CapacityError, match=message):
            work()


def test_chance_curve_is_the_mean_of_simulated_uniform_routing() -> None:
    rng = np.random.default_rng(3)
    batches, factors = make_batches([40, 7, 40]), [0.5, 1.0, 1.25, 2.0]
    chance = chance_curve(batches.sizes, 8, 2, factors)
    shares = []
    for _ in range(600):
        experts = rng.random((87, 8)).argsort(1)[:, :2].astype(np.int16)
        shares.append(site_curve(experts, np.ones((87, 2), np.float32), 8, batches, factors=factors).dropped / 174)
    error = 4 * np.std(shares, 0) / np.sqrt(600) + 1e-4
    assert (abs(np.mean(shares, 0) - chance) < error).all() and (np.diff(chance) < 0).all()
    assert chance_curve(batches.sizes, 8, 2, [0.0], PRESETS["tutel"])[0] == 0  # sized by the fullest expert: nothing overflows
