"""The longest queue of a device against a slow loop over decisions, its chance value against convolution and simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis import balance
from analysis.devices import chance_longest_queues, device_counts, device_loads, queue_batches, queue_table
from analysis.stability import maxvio_batches
from analysis.trace import SiteRouting
from tests.synthetic import PLAIN, SPECIAL, make_part, make_trace, site


def of_one(tokens: int, *settings: int) -> float:
    """The chance of one number of tokens, asked alone."""
    return float(chance_longest_queues(np.array([tokens]), *settings)[0])


def test_placement_is_in_order_of_number() -> None:
    load = np.array([[5, 1, 2, 2, 0, 4], [1, 1, 1, 1, 1, 1]])
    assert device_loads(load, 3).tolist() == [[6, 4, 4], [2, 2, 2]] and device_loads(load, 2).tolist() == [[8, 6], [3, 3]]
    assert device_loads(load[0], 1).tolist() == [14] and device_loads(load[0], 6).tolist() == load[0].tolist()
    for devices in (0, 4, 12):
        with pytest.raises(ValueError, match=f"6 experts cannot be shared out evenly over {devices} devices"):
            device_loads(load, devices)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("mixed", [None, 3])
def test_queues_are_those_of_a_loop_over_decisions(devices: int, mixed: int | None) -> None:
    trace = make_trace(SPECIAL)
    owner = trace.stream_tokens("decoder")["document"].to_numpy()
    order = np.arange(9) if mixed is None else np.random.default_rng(mixed).permutation(9)
    for layer in trace.layers:
        batches, filled = [[]], 0
        for document in order:
            if filled >= 15:
                batches, filled = [*batches, []], 0
            rows = np.flatnonzero(owner == document)
            batches[-1] += rows.tolist()
            filled += len(rows)
        if filled < 15:
            batches = [*batches[:-2], batches[-2] + batches[-1]]
        expected = []
        for rows in batches:
            held = [0] * devices
            for e in trace.experts(layer.index)[rows].ravel().tolist():
                if 0 <= e < layer.n_experts:
                    held[e // (layer.n_experts // devices)] += 1
            expected.append(max(held) / (sum(held) / devices))
        found = queue_batches(trace, layer.index, devices, 15, mixed)
        assert found["n"].to_pylist() == [len(b) for b in batches] and len(batches) > 1
        np.testing.assert_allclose(found["queue"].to_numpy(), expected)
        np.testing.assert_allclose(found["experts"].to_numpy(), maxvio_batches(trace, layer.index, 15, mixed)["maxvio"].to_numpy() + 1)
        if devices == 1:
            assert set(found["queue"].to_pylist()) == set(found["chance"].to_pylist()) == {1.0}
        if devices == 8:
            assert found["queue"].to_pylist() == found["experts"].to_pylist()


def test_numbers_within_a_device_do_not_matter_and_between_devices_they_do() -> None:
    part = make_part(PLAIN, [40] * 6)
    skewed = np.array([0, 1, 2, 3, 0, 1, 2, 3])[part.routing[0].experts].astype(np.int16)  # the first four experts only

    def queues(names: list[int]) -> np.ndarray:
        experts = np.array(names, np.int16)[skewed]
        trace = make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])
        return queue_batches(trace, 0, 4)["queue"].to_numpy()

    as_is = queues([0, 1, 2, 3, 4, 5, 6, 7])
    assert (as_is >= 2).all()  # two of four devices have it all
    np.testing.assert_array_equal(queues([1, 0, 3, 2, 5, 4, 7, 6]), as_is)
    np.testing.assert_array_equal(queues([6, 7, 4, 5, 2, 3, 0, 1]), as_is)  # whole devices change places
    assert (queues([0, 2, 4, 6, 1, 3, 5, 7]) < as_is).all()  # spread out


def test_table_sums_batches_up() -> None:
    layers = (site(0, 6, 2), site(1, 8, 2), site(2, 4, 1))
    trace = make_trace(layers)
    rows = queue_table(trace, 4, 12, 0).to_pylist()
    assert [r["site"] for r in rows] == [1, 2]  # six experts are left out
    for row in rows:
        each = queue_batches(trace, row["site"], 4, 12, 0)
        queue = np.sort(each["queue"].to_numpy())
        assert len(queue) == 3 == row["batches"] and row["batch_n"] == 18 and row["devices"] == 4
        assert (row["least"], row["median"], row["most"]) == tuple(queue) and row["p95"] == pytest.approx(np.percentile(queue, 95))
        assert row["balancedness"] == pytest.approx(np.mean([1 / q for q in queue]))
        assert row["experts"] == np.median(each["experts"].to_numpy()) and row["chance"] == pytest.approx(each["chance"].to_numpy().mean())
    assert device_counts(trace) == ([2, 3, 4, 6, 8], 8) and device_counts(make_trace((site(0, 60, 4),)))[1] == 6
    assert device_counts(make_trace((site(0, 11, 4),))) == ([11], 11)
    [alone, _] = queue_table(replace(trace, documents=trace.documents.slice(0, 0)), 4).to_pylist()
    assert alone["batches"] == 0 and math.isnan(alone["median"]) and math.isnan(alone["chance"])


@pytest.mark.parametrize(("tokens", "classes", "experts", "k", "devices"),
                         [(1, 8, 8, 2, 4), (7, 8, 8, 3, 2), (40, 12, 12, 5, 3), (60, 12, 8, 3, 4), (300, 64, 64, 8, 8)])  # fmt: skip
def test_chance_is_the_union_bound_of_the_exact_distribution(tokens: int, classes: int, experts: int, k: int, devices: int) -> None:
    held = experts // devices
    one = [math.comb(held, h) * math.comb(classes - held, k - h) / math.comb(classes, k) for h in range(k + 1)]
    mass = np.ones(1)
    for _ in range(tokens):
        mass = np.convolve(mass, one)
    bound = sum(min(1.0, devices * mass[t + 1 :].sum()) for t in range(len(mass))) / (tokens * k * held / classes)
    assert of_one(tokens, experts, classes, k, devices) == pytest.approx(bound, abs=1e-10)


def test_chance_of_many_numbers_of_tokens_is_that_of_each() -> None:
    """In whatever order, of windows of several sizes, more of one size than are looked at in one go."""
    tokens = np.random.default_rng(0).permutation(np.concatenate([np.arange(600), [1_000, 70_000, 5_000_000], np.arange(300)]))
    for settings in ((64, 64, 8, 8), (12, 15, 5, 3), (64, 64, 8, 1)):
        each = [of_one(int(n), *settings) for n in tokens]
        np.testing.assert_allclose(chance_longest_queues(tokens, *settings), each, rtol=1e-12)


def test_chance_of_single_experts_is_that_of_balance_and_of_one_device_is_none() -> None:
    for tokens in (1, 50, 1_024, 1_000_000, 10**8):
        assert of_one(tokens, 64, 64, 8, 64) == pytest.approx(balance.chance_max_over_mean(tokens, 64, 8), rel=1e-6)
        assert of_one(tokens, 64, 64, 8, 1) == 1 == of_one(tokens, 8, 8, 8, 4)
    assert math.isnan(of_one(0, 64, 64, 8, 8))


@pytest.mark.parametrize("devices", [2, 4, 16])
def test_simulated_uniform_routing_stays_below_chance_and_little_below(devices: int) -> None:
    rng = np.random.default_rng(devices)
    longest = []
    for _ in range(400):
        chosen = np.argsort(rng.random((200, 16)), axis=1)[:, :3]
        load = device_loads(np.bincount(chosen.ravel(), minlength=16), devices)
        longest.append(load.max() / load.mean())
    chance, error = of_one(200, 16, 16, 3, devices), np.std(longest) / 20
    assert 0.95 * chance < np.mean(longest) - 3 * error < chance  # of two devices it is the mean itself
    assert devices == 2 or np.mean(longest) + 3 * error < chance
