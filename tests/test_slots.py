"""Capacities against the frameworks' own arithmetic, batches, the chance overflow and the cost of slots."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.slots import (
    PRESETS,
    SCOPES,
    CapacityError,
    ExpertShape,
    batch_loads,
    batch_sizes,
    capacities,
    capacity_rule,
    document_batches,
    expert_capacity,
    least_factor,
    make_batches,
    slot_cost,
    uniform_overflow,
)

# (T, E, k, CF) -> mesh, megatron, deepspeed_top1, deepspeed, tutel
COLUMNS = ("mesh", "megatron", "deepspeed_top1", "deepspeed", "tutel")
VECTORS = {
    (6, 3, 1, 1.0): (4, 2, 4, 4, 2), (6, 3, 1, 1.5): (4, 3, 4, 4, 3), (100, 8, 2, 1.25): (15, 32, 16, 32, 32),
    (2048, 64, 8, 1.0): (32, 256, 32, 256, 256), (7, 3, 1, 1.25): (4, 3, 4, 4, 3), (10, 4, 2, 1.3): (4, 7, 4, 7, 6),
}  # fmt: skip
# (T, E, k) -> expected drop in percent at CF 1.0, 1.25, 1.5, 2.0 under Megatron's capacity
CHANCE = {
    (6, 3, 1): (21.948, 5.967, 5.967, 0.960), (64, 8, 2): (8.589, 1.422, 0.104, 0.000), (512, 8, 1): (4.658, 0.084, 0.0001, 0),
    (2048, 8, 1): (2.332, 0, 0, 0), (4096, 128, 1): (7.007, 0.716, 0.024, 0), (256, 32, 1): (13.739, 5.128, 1.511, 0.066),
}  # fmt: skip
SHAPES = st.tuples(st.integers(1, 5000), st.integers(1, 256), st.integers(1, 16), st.floats(0.01, 8)).filter(lambda x: x[2] <= x[1])


def as_megatron(t: int, e: int, k: int, cf: float) -> int:
    """megatron/core/transformer/moe/moe_utils.py, get_capacity(num_tokens * topk, ...)."""
    return math.ceil((t * k / e) * cf)


def as_mesh(t: int, e: int, k: int, cf: float) -> int:
    """mesh_tensorflow/transformer/moe.py."""
    return max(min(t, int((t * cf) / e)), 4)


def as_lingvo(t: int, e: int, k: int, cf: float) -> int:
    """lingvo/core/gshard_layers.py, Top2GatingOnLogits, with no capacity of its own."""
    capacity = int((t * cf) / e)
    while capacity % 4:
        capacity += 1
    return capacity


def as_deepspeed(t: int, e: int, k: int, cf: float) -> int:
    """deepspeed/moe/sharded_moe.py: _capacity(gates, torch.tensor(capacity_factor * k), torch.tensor(min_capacity))."""
    capacity = torch.ceil((t / e) * torch.tensor(cf * k)).to(torch.int64)
    return int(torch.maximum(capacity, torch.tensor(4)))


def as_tutel(t: int, e: int, k: int, cf: float) -> int:
    """tutel/impls/fast_dispatch.py, extract_critical, alignment 1."""
    return k * int(cf * ((t + e - 1) // e))


FRAMEWORKS = {
    "megatron": as_megatron, "mesh": as_mesh, "gshard": as_lingvo, "deepspeed": as_deepspeed, "tutel": as_tutel,
    "deepspeed_top1": lambda t, e, k, cf: as_deepspeed(t, e, 1, cf), "switch": lambda t, e, k, cf: math.ceil(t / e * cf),
}  # fmt: skip


@pytest.mark.parametrize("shape", VECTORS, ids=str)
def test_published_vectors(shape: tuple[int, int, int, float]) -> None:
    t, e, k, cf = shape
    assert tuple(expert_capacity(t, e, k, cf, preset) for preset in COLUMNS) == VECTORS[shape]


@pytest.mark.parametrize("preset", FRAMEWORKS)
@given(shape=SHAPES)
def test_preset_is_the_frameworks_own_arithmetic(preset: str, shape: tuple[int, int, int, float]) -> None:
    assert expert_capacity(*shape, preset=preset) == FRAMEWORKS[preset](*shape)


@given(shape=SHAPES)
def test_megablocks(shape: tuple[int, int, int, float]) -> None:
    """megablocks/layers/moe.py: int(capacity_factor * (top_k * tokens * 1 / num_experts)); 0 stands for the fullest expert."""
    t, e, k, cf = shape
    assert expert_capacity(*shape, preset="megablocks", max_load=77) == (int(cf * (k * t * 1 / e)) or 77)


def test_rounding_differs_in_the_last_bit_between_frameworks() -> None:
    """100 tokens per expert at CF 1.1: binary64 gives 110.00000000000001, binary32 gives 110."""
    assert expert_capacity(800, 8, 1, 1.1, "megatron") == 111 and expert_capacity(800, 8, 1, 1.1, "deepspeed") == 110


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_title_a_source_and_a_policy(preset: str) -> None:
    from analysis.policies import POLICIES

    rule = PRESETS[preset]
    assert rule.name == preset and rule.title and len(rule.source) > 20 and rule.policy in POLICIES


def test_parts_of_a_preset_can_be_replaced() -> None:
    assert expert_capacity(100, 8, 2, 1.25) == 32
    assert expert_capacity(100, 8, 2, 1.25, rounding="down") == 31
    assert expert_capacity(100, 8, 2, 1.25, counts_k=False) == 16
    assert expert_capacity(100, 8, 2, 1.25, minimum=40) == 40
    assert expert_capacity(100, 8, 2, 1.25, multiple=24) == 48


def test_tutel_sizes_by_the_fullest_expert() -> None:
    assert expert_capacity(100, 8, 2, 0, "tutel", max_load=61) == 61
    assert expert_capacity(100, 8, 2, -1.0, "tutel", max_load=61) == 26  # 2 * int(1.0 * ceil(100 / 8))
    assert expert_capacity(100, 8, 2, -1.0, "tutel", max_load=9) == 9
    assert expert_capacity(100, 8, 2, 0, "tutel", max_load=61, multiple=8) == 64
    assert expert_capacity(100, 8, 2, 0) == 0  # elsewhere, no factor means no slots


def test_capacity_at_the_edges() -> None:
    assert expert_capacity(1, 1) == 1 and expert_capacity(0, 8) == 0
    assert expert_capacity(0, 8, preset="deepspeed") == 4
    assert expert_capacity(10, 4, 4, 1.0) == 10
    assert expert_capacity(2**40, 8, 1, 1e6) == 2**37 * 10**6
    assert expert_capacity(10, 8, 1, 1e6) > 10  # more slots than tokens is allowed: they idle


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": 9}, "cannot choose 9 of 8"), ({"top_k": 0}, "at least 1"), ({"n_experts": 0}, "at least 1"), ({"tokens": -1}, "tokens per batch"),
     ({"tokens": 2.5}, "whole numbers"), ({"factor": -1.0}, "capacity factor -1"), ({"factor": math.nan}, "capacity factor nan"),
     ({"factor": math.inf}, "capacity factor inf"), ({"factor": 2e6}, "outside"), ({"preset": "fairseq"}, "no preset 'fairseq'"),
     ({"rounding": "half"}, "no rounding"), ({"minimum": -1}, "minimum -1"), ({"multiple": 0}, "multiple 0"),
     ({"preset": "tutel", "factor": 0.0}, "give max_load"), ({"preset": "megablocks", "factor": 0.0}, "give max_load")],
)  # fmt: skip
def test_settings_without_meaning(arguments: dict, message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        expert_capacity(**{"tokens": 10, "n_experts": 8, **arguments})


def test_capacities_of_many_batches_and_factors_equal_one_by_one() -> None:
    sizes, factors = np.array([1, 7, 100, 2048]), np.array([0.0, 0.5, 1.1, 3.0])
    for preset, rule in PRESETS.items():
        together = capacities(sizes, 8, 2, factors, rule, np.array([2, 5, 60, 900]))
        for i, (t, load) in enumerate(zip(sizes, (2, 5, 60, 900), strict=True)):
            assert together[i].tolist() == [expert_capacity(int(t), 8, 2, cf, preset, max_load=load) for cf in factors]


@pytest.mark.parametrize("shape", CHANCE, ids=str)
def test_published_chance_overflow(shape: tuple[int, int, int]) -> None:
    t, e, k = shape
    slots = capacities(np.array([t]), e, k, np.array([1.0, 1.25, 1.5, 2.0]), PRESETS["megatron"])[0]
    share = 100 * uniform_overflow(t, e, k, slots) / (t * k)
    for ours, published in zip(share, CHANCE[shape], strict=True):
        assert ours == pytest.approx(published, abs=0.00101 if published != 0.0001 else 0.00005)


def exact_overflow(tokens: int, n_experts: int, top_k: int, slots: int) -> Fraction:
    """E * E[max(n - C, 0)] for n ~ Binomial(T, k/E), in whole numbers over E^T."""
    total, ways = 0, top_k**tokens  # ways: comb(T, n) k^n (E - k)^(T - n), from n = T downwards
    for n in range(tokens, slots, -1):
        total += ways * (n - slots)
        ways = ways * n * (n_experts - top_k) // ((tokens - n + 1) * top_k)
    return Fraction(n_experts * total, n_experts**tokens)


def test_two_of_those_figures_are_one_off_in_their_last_digit() -> None:
    """Given as 4.658 and 7.007; the rational sums are 4.65853 and 7.00650. Hence the tolerance above, and this check."""
    for (t, e, c), percent in (((512, 8, 64), 4.6585260), ((4096, 128, 32), 7.0064971)):
        exact = float(100 * exact_overflow(t, e, 1, c) / t)
        assert exact == pytest.approx(percent, abs=5e-8)
        assert 100 * uniform_overflow(t, e, 1, np.array([c]))[0] / t == pytest.approx(exact, rel=1e-10)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 45))
def test_chance_overflow_is_the_exact_sum(tokens: int, n_experts: int, top_k: int, slots: int) -> None:
    k = min(top_k, n_experts)
    exact = float(exact_overflow(tokens, n_experts, k, slots))
    assert uniform_overflow(tokens, n_experts, k, np.array([slots]))[0] == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_chance_overflow_tends_to_its_asymptote() -> None:
    for t, e, k in ((10**6, 64, 8), (10**8, 8, 1)):
        asymptote = math.sqrt((1 - k / e) / (2 * math.pi * t * k / e))
        assert uniform_overflow(t, e, k, np.array([t * k / e]))[0] / (t * k) == pytest.approx(asymptote, rel=1e-3)


def test_chance_overflow_with_classes_that_take_no_slot() -> None:
    """8 experts and 8 skip classes: an expert's load is Binomial(T, k / 16)."""
    assert uniform_overflow(100, 8, 2, np.array([9]), n_special=8)[0] == pytest.approx(uniform_overflow(100, 16, 2, np.array([9]))[0] / 2)


LENGTHS = st.lists(st.integers(0, 9), max_size=12)


@given(LENGTHS, st.sampled_from(SCOPES), st.integers(1, 20), st.none() | st.integers(0, 99))
def test_batches_hold_every_row_once_in_document_order(lengths: list[int], scope: str, size: int, mixed: int | None) -> None:
    batches = make_batches(lengths, scope, size, mixed)
    total = sum(lengths)
    assert sorted(batches.order.tolist()) == list(range(total)) and (batches.sizes > 0).all() and batches.sizes.sum() == total
    document = np.repeat(np.arange(len(lengths)), lengths)[batches.order]
    changes = int((np.diff(document) != 0).sum())
    assert changes == max(len(set(document.tolist())) - 1, 0)  # each document stays in one piece, in its own order
    assert all((np.diff(batches.order[document == d]) == 1).all() for d in set(document.tolist()))
    if mixed is None:
        assert batches.order.tolist() == list(range(total))
    of_batch = np.repeat(np.arange(len(batches.sizes)), batches.sizes)
    assert batches.of_row[batches.order].tolist() == of_batch.tolist()
    if scope == "run":
        assert len(batches.sizes) == (total > 0)
    if scope == "tokens":
        assert (batches.sizes[:-1] == size).all() and (batches.sizes <= size).all()
    if scope in ("document", "documents"):
        assert all(len(set(of_batch[document == d].tolist())) == 1 for d in set(document.tolist()))


def test_batches_by_hand() -> None:
    assert make_batches([3, 2, 4]).starts.tolist() == [0, 3, 5, 9]
    assert make_batches([3, 2, 4], "documents", 2).starts.tolist() == [0, 5, 9]
    assert make_batches([3, 2, 4], "tokens", 4).starts.tolist() == [0, 4, 8, 9]
    assert make_batches([3, 2, 4], "run").starts.tolist() == [0, 9]
    assert make_batches([3, 0, 4]).starts.tolist() == [0, 3, 7]  # an empty document is no batch
    mixed = make_batches([2] * 9, "run", mixed=1)
    assert mixed.order.tolist() != list(range(18)) and mixed.order.tolist() == make_batches([2] * 9, "run", mixed=1).order.tolist()


@pytest.mark.parametrize(
    ("scope", "size", "message"), [("epoch", None, "no scope"), ("tokens", None, "give size"), ("documents", 0, "size")]
)
def test_batches_without_meaning(scope: str, size: int | None, message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        make_batches([3], scope, size)
    with pytest.raises(CapacityError, match="negative"):
        make_batches([3, -1])


def test_batch_loads() -> None:
    experts = np.array([[0, 1], [1, -1], [2, 1]], np.int16)
    assert batch_loads(experts, 3, make_batches([2, 1])).tolist() == [[1, 2, 0], [0, 1, 1]]


def test_cost_of_a_mixtral_layer() -> None:
    """8 experts of 3 x 4096 x 14336, 512 slots each, 4000 filled, 8 devices, bfloat16."""
    shape = ExpertShape(4096, 3 * 4096 * 14336)
    cost = slot_cost(4096, 4000, shape, devices=8)
    assert (cost.idle, cost.flops, cost.padding_flops) == (96, 4096 * 352_321_536, 96 * 352_321_536)
    assert cost.all_to_all_bytes == 2 * 4096 * 4096 * 2 * 7 // 8 and cost.padding_bytes == 2 * 96 * 4096 * 2 * 7 // 8
    assert slot_cost(4096, 4000, shape).all_to_all_bytes == 0  # one device sends nothing
    assert slot_cost(0, 0, shape).flops == 0


def test_costs_without_meaning() -> None:
    shape = ExpertShape(4, 8)
    for slots, kept, devices in ((3, 4, 1), (3, -1, 1), (3, 3, 0)):
        with pytest.raises(CapacityError):
            slot_cost(slots, kept, shape, devices)
    with pytest.raises(CapacityError, match="positive"):
        slot_cost(3, 3, ExpertShape(0, 8))


def test_least_factor() -> None:
    factors = np.array([1.0, 1.5, 2.0, 2.5])
    assert least_factor(factors, np.array([0.3, 0.02, 0.01, 0.0]), 0.01) == 2.0
    assert least_factor(factors, np.array([0.005, 0.02, 0.01, 0.0]), 0.01) == 2.0  # from there on, not once by luck
    assert least_factor(factors, np.zeros(4), 0.01) == 1.0
    assert math.isnan(least_factor(factors, np.ones(4), 0.01)) and math.isnan(least_factor(factors, np.full(4, np.nan), 0.01))


def test_the_doctest() -> None:
    assert expert_capacity(tokens=6, n_experts=3, top_k=1, factor=1.0, preset="megatron") == 2
    assert capacity_rule("mesh", minimum=0).minimum == 0


@given(lengths=st.lists(st.integers(0, 9), max_size=12), scope=st.sampled_from(["document", "documents", "tokens", "run"]), size=st.integers(1, 5),
       mixed=st.none() | st.integers(0, 9))  # fmt: skip
def test_sizes_and_documents_of_batches_are_those_that_are_made(lengths: list[int], scope: str, size: int, mixed: int | None) -> None:
    batches = make_batches(lengths, scope, size, mixed)
    assert batch_sizes(lengths, scope, size, mixed).tolist() == batches.sizes.tolist() and (batches.sizes > 0).all()
    if scope == "tokens":
        with pytest.raises(CapacityError, match="whole documents"):
            document_batches(lengths, scope, size, mixed)
        return
    served, first = document_batches(lengths, scope, size, mixed)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for b, mine in enumerate(np.split(served, first)[1:]):
        rows = batches.order[batches.starts[b] : batches.starts[b + 1]]
        assert owner[rows].tolist() == np.repeat(mine, np.array(lengths)[mine]).tolist()
