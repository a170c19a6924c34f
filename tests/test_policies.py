"""Drop policies against references written as the papers and frameworks write them, and properties that always hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.overflow import FACTORS
from analysis.policies import POLICIES, Queues, rank_site, site_curve, warm_up
from analysis.slots import PRESETS, Batches, CapacityError, batch_loads, capacities, capacity_rule, make_batches

ORDERED = ("position", "choice", "probability", "batch_priority", "random")
COMPILING = settings(deadline=None)  # the first call of a kernel compiles it
FIGURE_3 = np.array([[0], [0], [1], [0], [2], [1]], np.int16)  # Switch Transformer figure 3: loads 3, 2, 1


@st.composite
def sites(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, Batches]:
    """(experts, weights, E, batches): skewed, with missing experts and repeated weights, in any batches."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, min(4, n_experts)))
    lengths = draw(st.lists(st.integers(0, 12), max_size=6))
    n = sum(lengths)
    scores = rng.normal(0, 1, (n, n_experts)) + rng.normal(0, draw(st.sampled_from([0, 1, 5])), n_experts)
    experts = scores.argsort(1)[:, ::-1][:, :k].astype(draw(st.sampled_from([np.int16, np.int32])))
    experts[rng.random((n, k)) < draw(st.sampled_from([0, 0.3]))] = -1
    weights = np.where(rng.random((n, k)) < 0.3, rng.choice([0.0, -0.0, 0.25, 0.5], (n, k)), rng.normal(0.5, 0.4, (n, k)))
    scope, mixed = draw(st.sampled_from(["document", "documents", "tokens", "run"])), draw(st.none() | st.integers(0, 9))
    return experts, weights.astype(np.float32), n_experts, make_batches(lengths, scope, draw(st.integers(1, 15)), mixed)


def one_hot(experts: np.ndarray, n_experts: int) -> np.ndarray:
    """int64 [.., E]; all zero for -1."""
    return (experts[..., None] == np.arange(n_experts)).astype(np.int64)


def kept_by_position(experts: np.ndarray, weights: np.ndarray, n_experts: int, slots: int) -> np.ndarray:
    """Switch eq. 3 and transformers: cumulative sum of one-hots over tokens, here of all k choices of a token together."""
    hot = one_hot(experts, n_experts)
    before = hot.sum(1).cumsum(0) - hot.sum(1)  # [tokens, E], exclusive
    return ((before[:, None] < slots) & (hot > 0)).any(2)


def kept_by_choice(experts: np.ndarray, weights: np.ndarray, n_experts: int, slots: int, tokens: np.ndarray | None = None) -> np.ndarray:
    """GShard algorithm 1 and DeepSpeed top-2: each choice's cumulative sum starts at the loads of the choices before it."""
    tokens = np.arange(len(experts)) if tokens is None else tokens
    ranked = np.argsort(-weights, axis=1, kind="stable")
    kept, load = np.zeros(experts.shape, bool), np.zeros(n_experts, np.int64)
    for choice in range(experts.shape[1]):
        hot = one_hot(np.take_along_axis(experts, ranked[:, [choice]], 1)[tokens, 0], n_experts)
        place = load + hot.cumsum(0) - hot
        mine = ((place < slots) & (hot > 0)).any(1)
        kept[tokens, ranked[tokens, choice]] = mine
        load += hot.sum(0)
    return kept


def kept_by_priority(experts: np.ndarray, weights: np.ndarray, n_experts: int, slots: int) -> np.ndarray:
    """V-MoE algorithm 1: as GShard, with tokens sorted by their largest weight."""
    return kept_by_choice(experts, weights, n_experts, slots, np.argsort(-weights.max(1, initial=-np.inf), kind="stable"))


def kept_by_probability(experts: np.ndarray, weights: np.ndarray, n_experts: int, slots: int) -> np.ndarray:
    """Megatron-LM "probs": weights scattered to [tokens, E], the top C of each expert's column; ties by token order."""
    dense = np.full((len(experts), n_experts), -np.inf)
    rows, s = np.nonzero(experts >= 0)
    dense[rows, experts[rows, s]] = weights[rows, s] + 0.0
    mask = np.zeros(dense.shape, bool)
    best = np.argsort(-dense, axis=0, kind="stable")[: max(slots, 0)]
    np.put_along_axis(mask, best, True, 0)
    kept = np.zeros(experts.shape, bool)
    kept[rows, s] = mask[rows, experts[rows, s]]
    return kept


REFERENCES = {
    "position": kept_by_position,
    "choice": kept_by_choice,
    "probability": kept_by_probability,
    "batch_priority": kept_by_priority,
}


def in_batches(reference, experts: np.ndarray, weights: np.ndarray, n_experts: int, batches: Batches, slots: np.ndarray) -> np.ndarray:
    kept = np.zeros(experts.shape, bool)
    for b, c in enumerate(slots):
        rows = batches.order[batches.starts[b] : batches.starts[b + 1]]
        kept[rows] = reference(experts[rows], weights[rows], n_experts, int(c))
    return kept


@pytest.mark.parametrize("policy", REFERENCES)
@COMPILING
@given(site=sites(), factor=st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.25, 2.0]))
def test_policy_is_the_papers(policy: str, site: tuple, factor: float) -> None:
    experts, weights, n_experts, batches = site
    slots = capacities(batches.sizes, n_experts, experts.shape[1], np.array([factor]), PRESETS["megatron"])[:, 0]
    expected = in_batches(REFERENCES[policy], experts, weights, n_experts, batches, slots)
    assert np.array_equal(rank_site(experts, weights, n_experts, batches, policy).at(factor).kept, expected)


@pytest.mark.parametrize("n_experts", [4, 300])
@pytest.mark.parametrize("policy", REFERENCES)
def test_policy_is_the_papers_on_large_batches(policy: str, n_experts: int) -> None:
    """Enough assignments for several digits of the sort, float32 and bfloat16 weights."""
    rng = np.random.default_rng(5)
    experts = rng.random((6_000, n_experts)).argpartition(2, axis=1)[:, :2].astype(np.int32)
    weights = rng.lognormal(-3, 1.5, experts.shape).astype(np.float32)
    for w in (weights, (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)):
        over = rank_site(experts, w, n_experts, make_batches([6_000], "run"), policy).at(0.8)
        assert np.array_equal(over.kept, REFERENCES[policy](experts, w, n_experts, int(over.capacity[0, 0])))


def test_figure_3_of_the_switch_paper() -> None:
    ones = np.ones(FIGURE_3.shape, np.float32)
    queues = rank_site(FIGURE_3, ones, 3, make_batches([6], "run"))
    for factor, slots, dropped, idle in ((1.0, 2, 1, 1), (1.5, 3, 0, 3)):
        total = queues.at(factor).total()
        assert (total["largest_capacity"], total["dropped"], total["idle"], total["slots"]) == (slots, dropped, idle, 3 * slots)
        assert total["fully_dropped"] == total["top1_dropped"] == dropped and total["partly_dropped"] == 0
    assert np.flatnonzero(queues.at(1.0).dropped.ravel()).tolist() == [3]  # the third token sent to expert 0


def test_the_switch_block_of_transformers_drops_the_same() -> None:
    """transformers' own router, with its native capacity: exactly the tokens kept here at as many slots, per sequence."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    for capacity in (0, 1, 3, 7, 50):
        torch.manual_seed(capacity)
        router = SwitchTransformersTop1Router(SwitchTransformersConfig(d_model=8, num_experts=5, expert_capacity=capacity)).eval()
        router.classifier.weight.data.normal_(0, 1)
        with torch.no_grad():
            dispatch, weight, logits = router(torch.randn(4, 30, 8))
        experts = logits.argmax(-1).reshape(-1, 1).numpy().astype(np.int16)
        ours = rank_site(experts, weight.reshape(-1, 1).numpy(), 5, make_batches([30] * 4)).at(slots=capacity)
        assert np.array_equal(ours.kept[:, 0], dispatch.reshape(-1, 5).sum(-1).numpy() > 0)
        assert capacity != 3 or 0 < ours.dropped.sum() < 120


def test_random_is_seeded_uniform_and_per_expert() -> None:
    experts, ones = np.zeros((10, 1), np.int16), np.ones((10, 1), np.float32)
    run = make_batches([10], "run")
    kept = np.zeros(10)
    for seed in range(2_000):
        kept += rank_site(experts, ones, 1, run, "random", seed=seed).at(slots=3).kept[:, 0]
    assert kept.sum() == 6_000 and (abs(kept - 600) < 4.5 * np.sqrt(2_000 * 0.3 * 0.7)).all()
    a, b = (rank_site(experts, ones, 1, run, "random", seed=7).ranks for _ in range(2))
    assert np.array_equal(a, b) and not np.array_equal(a, rank_site(experts, ones, 1, run, "random", seed=8).ranks)


def rerouted(experts: np.ndarray, preference: np.ndarray, slots: int) -> np.ndarray:
    """Stage by stage with sets and sorted lists: the expert that serves each assignment, -1 = none."""
    n, k = experts.shape
    load = dict.fromkeys(range(preference.shape[1]), 0)
    served = np.full((n, k), -1)
    waiting = []
    for i in range(n):
        for s in range(k):
            e = int(experts[i, s])
            if e >= 0 and load[e] < slots:
                served[i, s] = e
            elif e >= 0:
                waiting.append((i, s))
            if e >= 0:
                load[e] = min(load[e] + 1, slots)
    tried: dict = {at: set() for at in waiting}
    while waiting:
        still = []
        for i, s in waiting:
            out = set(experts[i]) | set(served[i]) | tried[i, s]
            options = [e for e in sorted(load, key=lambda e: (-preference[i, e], e)) if e not in out]
            if options and load[options[0]] < slots:
                served[i, s] = options[0]
                load[options[0]] += 1
            elif options:
                tried[i, s].add(options[0])
                still.append((i, s))
        waiting = still
    return served


@COMPILING
@given(site=sites(), factor=st.sampled_from([0.0, 0.4, 1.0, 1.5]), seed=st.integers(0, 99))
def test_reroute(site: tuple, factor: float, seed: int) -> None:
    experts, weights, n_experts, batches = site
    preference = np.random.default_rng(seed).integers(0, 6, (len(experts), n_experts)).astype(np.float32)  # with ties
    over = rank_site(experts, weights, n_experts, batches, "reroute", preference=preference).at(factor)
    for b in range(len(batches.sizes)):
        rows = batches.order[batches.starts[b] : batches.starts[b + 1]]
        assert np.array_equal(over.moved[rows], rerouted(experts[rows], preference[rows], int(over.capacity[b, 0])))
    served = np.sort(over.moved, 1)
    assert not ((served[:, 1:] == served[:, :-1]) & (served[:, 1:] >= 0)).any()  # no token twice at one expert
    assert (batch_loads(over.moved, n_experts, batches) <= over.capacity).all()
    position = rank_site(experts, weights, n_experts, batches).at(factor)
    assert over.dropped.sum() <= position.dropped.sum() and (over.kept | ~position.kept).all()
    assert over.total()["kept"] == over.kept.sum() and over.rerouted == over.kept.sum() - position.kept.sum()


@pytest.mark.parametrize("policy", ORDERED)
@COMPILING
@given(site=sites())
def test_more_capacity_never_drops_more_and_enough_drops_nothing(policy: str, site: tuple) -> None:
    experts, weights, n_experts, batches = site
    queues = rank_site(experts, weights, n_experts, batches, policy)
    kept = [queues.at(slots=c).kept for c in (0, 1, 2, 3, 5, 8)]
    assert not kept[0].any() and all((more | ~less).all() for less, more in zip(kept, kept[1:], strict=False))
    assert not queues.at(slots=int(queues.loads.max(initial=0))).dropped.any()
    assert not queues.at(float(n_experts)).dropped.any()


@pytest.mark.parametrize("policy", ORDERED)
@COMPILING
@given(site=sites(), seed=st.integers(0, 99))
def test_numbering_of_experts_does_not_matter(policy: str, site: tuple, seed: int) -> None:
    experts, weights, n_experts, batches = site
    names = np.append(np.random.default_rng(seed).permutation(n_experts), -1).astype(experts.dtype)
    before, after = (rank_site(x, weights, n_experts, batches, policy) for x in (experts, names[experts]))
    assert np.array_equal(before.ranks, after.ranks)
    assert np.array_equal(before.loads, after.loads[:, names[:-1]])


def test_dropless_pads_to_blocks() -> None:
    ones = np.ones(FIGURE_3.shape, np.float32)
    queues = rank_site(FIGURE_3, ones, 3, make_batches([6], "run"), "dropless")
    over = queues.at(block=2)
    assert over.total()["dropped"] == 0 and over.capacity.tolist() == [[4, 2, 2]] and over.total()["idle"] == 2
    assert queues.at().capacity.tolist() == [[128, 128, 128]]  # MegaBlocks' block of 128 tokens
    empty = rank_site(FIGURE_3[:0], ones[:0], 3, make_batches([], "run"), "dropless").at()
    assert empty.total()["slots"] == 0


def test_unknown_weights_give_no_mass_and_no_order() -> None:
    experts, ones = np.array([[0, 1]], np.int16), np.ones((1, 2), np.float32)
    queues, curve = (f(experts, ones, 2, make_batches([1]), weights_known=False) for f in (rank_site, site_curve))
    assert np.isnan(queues.at().total()["gate_mass_lost"]) and np.isnan(curve.lost).all() and curve.dropped[0] == 0
    assert queues.at().by_expert()["gate_mass"].to_numpy().tolist() == pytest.approx([np.nan] * 2, nan_ok=True)
    for policy in ("choice", "probability", "batch_priority"):
        with pytest.raises(CapacityError, match="natively dropped"):
            rank_site(experts, ones, 2, make_batches([1]), policy, weights_known=False)
    rank_site(experts[:, :1], ones[:, :1], 2, make_batches([1]), "choice", weights_known=False)  # one choice: the order is known


def queues_of(experts: object, weights: object, **more: object) -> Queues:
    return rank_site(np.asarray(experts), np.asarray(weights, np.float32), 4, **{"batches": make_batches([2]), **more})


@pytest.mark.parametrize(
    ("experts", "weights", "more", "message"),
    [([[0], [4]], [[1], [1]], {}, "expert id 4"), ([[0], [-2]], [[1], [1]], {}, "expert id -2"), ([[0], [1]], [[1], [np.nan]], {}, "NaN"),
     ([[0], [1]], [[1], [np.inf]], {}, "infinite"), ([[0], [1]], [[1]], {}, "tokens, k"), ([0, 1], [1, 1], {}, "tokens, k"),
     ([[0.0], [1.0]], [[1], [1]], {}, "integer"), ([[0]], [[1]], {}, "hold 2 tokens"), ([[0], [2**40]], [[1], [1]], {}, "out of range"),
     ([[0], [1]], [[1], [1]], {"policy": "lottery"}, "no policy"), ([[0], [1]], [[1], [1]], {"policy": "reroute"}, "probabilities"),
     ([[0], [1]], [[1], [1]], {"policy": "reroute", "preference": np.ones((2, 3))}, "probabilities")],
)  # fmt: skip
def test_arrays_without_meaning(experts: object, weights: object, more: dict, message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        queues_of(experts, weights, **more)


def test_factors_and_policies() -> None:
    assert len(FACTORS) == 76 and FACTORS[0] == 0.25 and FACTORS[-1] == 4.0 and 1.25 in FACTORS
    assert set(POLICIES) == {*ORDERED, "reroute", "dropless"}
    assert capacity_rule().name == "megatron"
    warm_up()
