"""Drop policies at one routed site: who is served first, and who is not served.

``Queues`` ranks a site once under one policy, after which every capacity is a threshold. Pure functions on arrays. overflow.py has the
answers, slots.py batches and capacities, queues.py the compiled kernels.

    policy          who is served first
    position        tokens in order, all k choices of a token together (Switch, Mesh-TensorFlow, transformers)
    choice          all first choices in token order, then all second choices (GShard, DeepSpeed top-2, Tutel, NLLB)
    probability     each expert its largest gate weights; ties by token order (Megatron-LM "probs")
    batch_priority  as choice, with tokens ordered by their largest gate weight (V-MoE, arXiv 2106.05974; Tutel)
    random          each expert a seeded random order of its own (DeepSpeed's random token selection)
    reroute         as position, then what overflowed tries its token's next-best experts, stage by stage (Switch
                    appendix B, "no token left behind"; Mesh-TensorFlow); needs the probabilities of all experts
    dropless        everyone; slots are padded to a block (MegaBlocks, arXiv 2211.15841)

All but the last two drop sum over experts of max(n_e - C, 0) assignments: only who is dropped differs. Megatron-LM's own
"position" is torch.topk over ties, which is not first come first served, and is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from .overflow import COUNTED, FACTORS, Curve, Overflow, checked_keys, curve_of_loads
from .slots import PRESETS, Batches, CapacityError, CapacityRule, batch_loads, capacities, make_batches
from .trace import NO_EXPERT

_KERNEL: Mapping[str, int] = MappingProxyType(
    {"position": 0, "choice": 1, "probability": 2, "batch_priority": 3, "random": 4, "reroute": 0, "dropless": 0}
)
POLICIES = tuple(_KERNEL)
BLOCK = 128
BAD_WEIGHT = "a gate weight is NaN or infinite"


class MissingScores(CapacityError):
    """The run did not record what a policy orders by; another policy, or another capture, can be answered."""


@dataclass(frozen=True)
class Queues:
    """One site ranked under one policy: ``rank_site`` makes it; ``at`` and ``curve_by`` answer from it.

    ranks     int32 [tokens, k]; place in the expert's queue within the batch, -1 = no expert.
    special   bool [tokens, k] or None; assignments to classes that take no slot.
    preference  float32 [tokens, E] or None; scores of all experts, for "reroute". Other arrays as in Overflow.
    """

    experts: np.ndarray
    weights: np.ndarray
    ranks: np.ndarray
    loads: np.ndarray
    batches: Batches
    policy: str
    special: np.ndarray | None = None
    preference: np.ndarray | None = None
    weights_known: bool = True

    def at(self, factor: float = 1.25, rule: CapacityRule = PRESETS["megatron"], *, slots: int | None = None,
           block: int = BLOCK) -> Overflow:  # fmt: skip
        """The answer at one factor, or at an absolute number of ``slots`` per expert. ``block`` is for "dropless" alone."""
        from . import outcomes

        if self.policy == "dropless":
            return self._dropless(block)
        if slots is not None and not 0 <= slots <= 2**40:
            raise CapacityError(f"{slots} slots per expert have no meaning: give 0 or more")
        each = np.full(len(self.loads), slots, np.int64) if slots is not None else self._slots(factor, rule)
        capacity = np.broadcast_to(each[:, None], self.loads.shape)
        if self.policy == "reroute":
            return self._rerouted(each, capacity)
        return self._answer(outcomes.within(self.ranks, each, self.batches.of_row), capacity)

    def curve_by(self, keys: np.ndarray, n_keys: int, factors: Sequence[float] | np.ndarray = FACTORS,
                 rule: CapacityRule = PRESETS["megatron"]) -> pa.Table:  # fmt: skip
        """Overflow.by at every factor in one pass: one row per key and factor. "reroute" and "dropless" have no thresholds."""
        from . import outcomes

        _check_thresholds(self.policy)
        factors, keys = np.asarray(factors, np.float64), checked_keys(keys, n_keys, len(self.experts))
        most = self.loads.max(1, initial=0) if rule.zero == "max load" else None
        slots, places, row_of, _ = _thresholds(self.batches, self.loads.shape[1], self.experts.shape[1], factors, rule, most)
        counts, sums = outcomes.tally_curve(self.experts, self.weights, self.ranks, self.batches.order, self.batches.starts, keys, n_keys,
                                            np.take_along_axis(slots, places, 1), places, row_of)  # fmt: skip
        sums = sums if self.weights_known else np.full_like(sums, np.nan)
        columns = {name: counts[:, :, i].ravel() for i, name in enumerate(COUNTED)}
        return pa.table({"key": np.repeat(np.arange(n_keys), len(factors)), "factor": np.tile(factors, n_keys), **columns,
                         "gate_mass": sums[:, :, 0].ravel(), "gate_mass_lost": sums[:, :, 1].ravel()})  # fmt: skip

    def _slots(self, factor: float, rule: CapacityRule) -> np.ndarray:
        sizes, k = self.batches.sizes, self.experts.shape[1]
        return capacities(sizes, self.loads.shape[1], k, np.array([factor]), rule, self.loads.max(1, initial=0))[:, 0]

    def _answer(self, kept: np.ndarray, capacity: np.ndarray, moved: np.ndarray | None = None) -> Overflow:
        kept = kept if self.special is None else kept | self.special
        return Overflow(capacity, self.loads, self.experts, self.weights, kept, moved, self.weights_known)

    def _rerouted(self, each: np.ndarray, capacity: np.ndarray) -> Overflow:
        from . import outcomes

        moved = outcomes.reroute(self.experts, self.ranks, self.preference, self.batches.order, self.batches.starts, each)
        return self._answer(moved != NO_EXPERT, capacity, moved)

    def _dropless(self, block: int) -> Overflow:
        if block < 1:
            raise CapacityError(f"a block of {block} tokens has no meaning: give at least 1")
        return self._answer(self.experts != NO_EXPERT, -(-self.loads // block) * block)


def rank_site(experts: np.ndarray, weights: np.ndarray | None, n_experts: int, batches: Batches, policy: str = "position", *,
              n_special: int = 0, seed: int | Sequence[int] = 0, preference: np.ndarray | None = None, weights_known: bool = True) -> Queues:  # fmt: skip
    """Rank every assignment of a site once.

    experts int [tokens, k], ids 0..n_experts-1 need a slot, the next ``n_special`` do not, -1 = none; weights float
    [tokens, k], finite, or None where they are not known but the slots are in the order of falling weight; preference float
    [tokens, >= n_experts], for "reroute". ``seed`` is for "random".
    Raises CapacityError for an unknown policy, arrays that do not fit, ids or weights out of range, or what is missing.
    """
    from . import queues

    experts, weights, special, priority, known = _served_by(experts, weights, n_experts, batches, policy, n_special, seed, weights_known)
    if weights.size and not (np.isfinite(weights.min()) and np.isfinite(weights.max())):  # NaN passes through min
        raise CapacityError(BAD_WEIGHT)
    if policy == "reroute":
        if preference is None or preference.ndim != 2 or len(preference) != len(experts) or preference.shape[1] < n_experts:
            raise MissingScores("reroute needs the router's probabilities of all experts: capture the run with them")
        preference = np.ascontiguousarray(preference[:, :n_experts], np.float32)
    ranks, loads, bad = queues.rank_all(experts, priority.view(np.uint32), batches.order, batches.starts, n_experts, _KERNEL[policy])
    if bad:
        raise _bad_id(experts, n_experts)
    return Queues(experts, weights, ranks, loads, batches, policy, special, preference, known)


def site_curve(experts: np.ndarray, weights: np.ndarray | None, n_experts: int, batches: Batches, policy: str = "position",
               factors: Sequence[float] | np.ndarray = FACTORS, rule: CapacityRule = PRESETS["megatron"], *, n_special: int = 0,
               seed: int | Sequence[int] = 0, weights_known: bool = True) -> Curve:  # fmt: skip
    """A site's whole curve in one pass that stores no ranks: other arguments, and errors, as in ``rank_site``. "reroute" and "dropless" have
    no thresholds: ask ``Queues.at`` for one factor at a time."""
    from . import queues

    _check_thresholds(policy)
    experts, weights, _, priority, known = _served_by(experts, weights, n_experts, batches, policy, n_special, seed, weights_known)
    k, factors = experts.shape[1], np.asarray(factors, np.float64)
    most = batch_loads(experts, n_experts, batches).max(1, initial=0) if rule.zero == "max load" else None
    slots, places, row_of, count = _thresholds(batches, n_experts, k, factors, rule, most)
    (dropped, fully, some, first), lost, totals, bad = queues.curve(
        experts, weights, priority.view(np.uint32), batches.order, batches.starts, n_experts, _KERNEL[policy],
        np.take_along_axis(slots, places, 1), places, row_of)  # fmt: skip
    if bad:
        raise _bad_id(experts, n_experts)
    if not np.isfinite(totals[1]):  # a sum of finite float32 is finite
        raise CapacityError(BAD_WEIGHT)
    mass, lost = (totals[1], lost) if known else (float("nan"), np.full_like(lost, np.nan))
    return Curve(factors, int(totals[0]), len(experts), float(mass), dropped, fully, some - fully, first, lost,
                 n_experts * (count[:, None] * slots).sum(0))  # fmt: skip


def _served_by(experts: np.ndarray, weights: np.ndarray | None, n_experts: int, batches: Batches, policy: str, n_special: int,
               seed: int | Sequence[int], known: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, bool]:  # fmt: skip
    """(experts that need a slot, weights, special or None, priority, whether the weights are known), checked, as in Queues."""
    if weights is None and policy in ("probability", "batch_priority"):
        raise MissingScores(f"policy {policy!r} orders by gate weights, which this run did not store")
    if not known and (policy in ("probability", "batch_priority") or (policy == "choice" and experts.shape[1] > 1)):
        raise MissingScores(f"policy {policy!r} orders by gate weights, and those of natively dropped assignments were not recorded")
    if weights is None:  # any that fall will do: their order is known, and no sum of them is answered
        weights, known = np.broadcast_to(np.arange(experts.shape[-1], 0, -1), experts.shape), False
    experts, weights = _checked(experts, weights, batches, policy)
    special = None
    if n_special:
        if experts.size and experts.max() >= n_experts + n_special:
            raise _bad_id(experts, n_experts + n_special)
        special = experts >= n_experts
        experts = np.where(special, experts.dtype.type(NO_EXPERT), experts)
        special = special if special.any() else None
    return experts, weights, special, _random_priority(weights.shape, seed) if policy == "random" else weights, known


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache: some seconds the first time on a machine, 0.3 s afterwards."""
    experts, batches = np.zeros((1, 1), np.int16), make_batches([1])
    preference = np.ones((1, 2), np.float32)
    ranked = rank_site(experts, np.ones((1, 1), np.float32), 2, batches, "reroute", preference=preference)
    over = ranked.at(1.0)
    over.by_expert(), over.total()
    site_curve(experts, ranked.weights, 2, batches)
    curve_of_loads(ranked.loads, batches.sizes, 1)


def _checked(experts: np.ndarray, weights: np.ndarray, batches: Batches, policy: str) -> tuple[np.ndarray, np.ndarray]:
    if policy not in _KERNEL:
        raise CapacityError(f"no policy {policy!r}: choose one of {', '.join(POLICIES)}")
    if experts.ndim != 2 or experts.shape != weights.shape or experts.dtype.kind not in "iu":
        raise CapacityError(f"experts {experts.shape} {experts.dtype} and weights {weights.shape} must be integer and float [tokens, k]")
    if len(batches.order) != len(experts):
        raise CapacityError(f"the batches hold {len(batches.order)} tokens, the site {len(experts)}")
    if experts.dtype.itemsize > 4 and experts.size and not -(2**31) <= int(experts.min()) <= int(experts.max()) < 2**31:
        raise CapacityError(f"expert id {experts.max()} is out of range")
    narrow = np.int16 if experts.dtype in (np.int8, np.uint8, np.int16) else np.int32
    return np.ascontiguousarray(experts, narrow), np.ascontiguousarray(weights, np.float32)


def _bad_id(experts: np.ndarray, classes: int) -> CapacityError:
    worst = experts.max() if experts.max() >= classes else experts.min()
    return CapacityError(f"expert id {worst} is outside {NO_EXPERT}..{classes - 1}")


def _check_thresholds(policy: str) -> None:
    if policy in ("reroute", "dropless"):
        raise CapacityError(f"policy {policy!r} has no curve by thresholds: ask for one factor at a time")


def _thresholds(batches: Batches, n_experts: int, k: int, factors: np.ndarray, rule: CapacityRule,
                most: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(slots [rows, factors], the factors in ascending order of slots [rows, factors], row int32 [batches], batches per row).

    Batches of one size share a row; with ``most`` [batches], the load of each batch's fullest expert, each has its own.
    """
    sizes, row_of, count = np.unique(batches.sizes, return_inverse=True, return_counts=True)
    if most is not None:
        sizes, row_of, count = batches.sizes, np.arange(len(most)), np.ones(len(most), np.int64)
    slots = capacities(sizes, n_experts, k, factors, rule, most)
    return slots, np.argsort(slots, axis=1, kind="stable"), row_of.astype(np.int32).ravel(), count


def _random_priority(shape: tuple[int, ...], seed: int | Sequence[int]) -> np.ndarray:
    """float32: positive numbers with uniformly random bits, so that their order is uniformly random and ties are rare."""
    return np.random.default_rng(seed).integers(0, 0x7F800000, shape, np.uint32).view(np.float32)
