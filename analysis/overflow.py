"""What overflows at one routed site: ``Overflow`` is the answer at one capacity and ``Curve`` that at many factors.

policies.py ranks a site for them, slots.py has the capacities, outcomes.py the compiled kernels. Curves from loads alone, and by chance,
need no ranks. Router classes without weights (zero-compute, skip) take no slot: they are left out of every figure and always kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from .slots import PRESETS, CapacityError, CapacityRule, capacities, uniform_overflow
from .trace import NO_EXPERT

FACTORS = tuple(round(0.25 + 0.05 * i, 2) for i in range(76))
COUNTED = ("tokens", "assignments", "dropped", "fully_dropped", "partly_dropped", "top1_dropped")


@dataclass(frozen=True)
class Curve:
    """One site over capacity factors, float64 [factors]; arrays int64 [factors] unless said otherwise.

    ``assignments``, ``tokens`` and ``gate_mass`` are the totals; ``lost`` is float64, the gate weight of dropped
    assignments; ``slots`` over all experts and batches; fully, partly and top1 count tokens, as in Overflow.by.
    """

    factors: np.ndarray
    assignments: int
    tokens: int
    gate_mass: float
    dropped: np.ndarray
    fully_dropped: np.ndarray
    partly_dropped: np.ndarray
    top1_dropped: np.ndarray
    lost: np.ndarray
    slots: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """[factors]: factor, the columns of Overflow.by, then kept, slots, idle."""
        n, kept = len(self.factors), self.assignments - self.dropped
        return {
            "factor": self.factors, "tokens": np.full(n, self.tokens), "assignments": np.full(n, self.assignments),
            "dropped": self.dropped, "fully_dropped": self.fully_dropped, "partly_dropped": self.partly_dropped,
            "top1_dropped": self.top1_dropped, "gate_mass": np.full(n, self.gate_mass), "gate_mass_lost": self.lost,
            "kept": kept, "slots": self.slots, "idle": self.slots - kept,
        }  # fmt: skip


@dataclass(frozen=True)
class SlotUse:
    """One site at one setting, by the loads of its experts alone.

    capacity  int64 [batches, E]; slots per expert (alike over E except under "dropless").
    loads     int64 [batches, E]; assignments chosen per expert.
    """

    capacity: np.ndarray
    loads: np.ndarray

    @property
    def capacity_range(self) -> tuple[int, int]:
        """Least and largest number of slots of an expert in a batch; 0 where there is no batch."""
        return (int(self.capacity.min()), int(self.capacity.max())) if self.capacity.size else (0, 0)

    @property
    def slots(self) -> np.ndarray:
        """int64 [E]: slots of each expert over all batches."""
        return np.asarray(self.capacity.sum(0))

    @property
    def idle(self) -> np.ndarray:
        """int64 [E]: slots of each expert that hold no token."""
        return self.slots - self.kept_load

    @property
    def dropped_load(self) -> np.ndarray:
        """int64 [E]: assignments that chose each expert and are executed by none."""
        return self.loads.sum(0) - self.kept_load

    @cached_property
    def kept_load(self) -> np.ndarray:
        """int64 [E]: assignments each expert executes."""
        return np.asarray(np.minimum(self.loads, self.capacity).sum(0))


@dataclass(frozen=True)
class Overflow(SlotUse):
    """One site at one setting, assignment by assignment.

    experts   int [tokens, k]; chosen experts that need a slot, -1 = none.
    weights   float32 [tokens, k]; gate weights. Where ``weights_known`` is False some were not recorded, and mass is NaN.
    kept      bool [tokens, k]; True where the assignment is executed, by whichever expert.
    moved     int [tokens, k] or None; under "reroute" the expert that executes each assignment, -1 = none.
    """

    experts: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    moved: np.ndarray | None = None
    weights_known: bool = True

    @property
    def dropped(self) -> np.ndarray:
        """bool [tokens, k]: chosen, but executed by no expert."""
        return (self.experts != NO_EXPERT) & ~self.kept

    @property
    def rerouted(self) -> int:
        """Assignments executed by another expert than the one chosen."""
        return 0 if self.moved is None else int(((self.moved != self.experts) & (self.moved != NO_EXPERT)).sum())

    @property
    def dropped_load(self) -> np.ndarray:
        """int64 [E]: assignments that chose each expert and are executed by none."""
        return super().dropped_load if self.moved is None else np.bincount(self.experts[self.dropped], minlength=self.loads.shape[1])

    @cached_property
    def kept_load(self) -> np.ndarray:
        """int64 [E]: assignments each expert executes."""
        if self.moved is None:
            return np.minimum(self.loads, self.capacity).sum(0)
        return np.bincount(self.moved[self.moved != NO_EXPERT], minlength=self.loads.shape[1])

    def by(self, keys: np.ndarray, n_keys: int) -> pa.Table:
        """One row per key, keys int [tokens] in 0..n_keys-1 (labels, positions, documents, token ids, or all 0).

        tokens, assignments, dropped; tokens that lost all (fully), some (partly), their first choice (top1, largest
        weight); gate mass and what of it is lost. Raises CapacityError unless every token has a key in range.
        """
        from . import outcomes

        counts, sums = outcomes.tally(self.experts, self.weights, self.kept, checked_keys(keys, n_keys, len(self.experts)), n_keys)
        return pa.table({**{name: counts[:, i] for i, name in enumerate(COUNTED)}, **self._mass(sums)})

    def by_expert(self) -> pa.Table:
        """One row per expert: assignments, dropped, kept (executed here), slots, idle, gate mass and what of it is lost."""
        from . import outcomes

        counts, sums = outcomes.tally_experts(self.experts, self.weights, self.kept, self.loads.shape[1])
        counted = {"assignments": counts[:, 0], "dropped": counts[:, 1], "kept": self.kept_load, "slots": self.slots, "idle": self.idle}
        return pa.table({"expert": np.arange(len(self.slots), dtype=np.int32), **counted, **self._mass(sums)})

    def total(self) -> dict[str, Any]:
        """The row of ``by`` over all tokens, with kept, rerouted, slots, idle, batches and the capacities' range."""
        row = self.by(np.zeros(len(self.experts), np.int32), 1).to_pylist()[0]
        slots, kept = int(self.capacity.sum()), int(self.kept_load.sum())
        low, high = self.capacity_range
        slot = {"kept": kept, "rerouted": self.rerouted, "slots": slots, "idle": slots - kept}
        return {**row, **slot, "batches": len(self.capacity), "least_capacity": low, "largest_capacity": high}

    def _mass(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        known = sums if self.weights_known else np.full_like(sums, np.nan)
        return {"gate_mass": known[:, 0], "gate_mass_lost": known[:, 1]}


@dataclass(frozen=True)
class SiteLoads:
    """One site's batches by their loads alone: loads int64 [batches, E], sizes int64 [batches] tokens, k choices per token.

    All of it is exact for every policy but "reroute" and "dropless".
    """

    loads: np.ndarray
    sizes: np.ndarray
    top_k: int

    def at(self, factor: float, rule: CapacityRule = PRESETS["megatron"]) -> SlotUse:
        """The answer at one factor."""
        each = capacities(self.sizes, self.loads.shape[1], self.top_k, np.array([factor]), rule, self.loads.max(1, initial=0))
        return SlotUse(np.broadcast_to(each, self.loads.shape), self.loads)

    def curve(self, factors: Sequence[float] | np.ndarray = FACTORS, rule: CapacityRule = PRESETS["megatron"]) -> dict[str, np.ndarray]:
        """[factors]: factor, tokens, assignments, dropped, kept, slots, idle."""
        dropped, slots = curve_of_loads(self.loads, self.sizes, self.top_k, factors, rule)
        n, assignments = len(slots), int(self.loads.sum())
        kept = assignments - dropped
        return {"factor": np.asarray(factors, np.float64), "tokens": np.full(n, int(self.sizes.sum())), "assignments": np.full(n, assignments),
                "dropped": dropped, "kept": kept, "slots": slots, "idle": slots - kept}  # fmt: skip


def curve_of_loads(loads: np.ndarray, sizes: np.ndarray, top_k: int, factors: Sequence[float] | np.ndarray = FACTORS,
                   rule: CapacityRule = PRESETS["megatron"]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(dropped, slots) int64 [factors] from loads alone, int [batches, E] for batches of ``sizes`` [batches] tokens.

    Exact for every policy but "reroute" and "dropless": how much overflows does not depend on who is served first. For
    runs of statistics, pass one batch. Raises CapacityError for shapes that do not fit.
    """
    loads, sizes = np.asarray(loads), np.asarray(sizes)
    if loads.ndim != 2 or len(loads) != len(sizes):
        raise CapacityError(f"loads {loads.shape} must be [batches, E] for {len(sizes)} batches")
    from .queues import excess  # pays for numba

    slots = capacities(sizes, loads.shape[1], top_k, np.asarray(factors, np.float64), rule, loads.max(1, initial=0))
    return np.asarray(excess(np.ascontiguousarray(loads, np.int64), slots)), loads.shape[1] * slots.sum(0)


def chance_curve(sizes: np.ndarray, n_experts: int, top_k: int, factors: Sequence[float] | np.ndarray = FACTORS,
                 rule: CapacityRule = PRESETS["megatron"], n_special: int = 0) -> np.ndarray:  # fmt: skip
    """float64 [factors]: share of assignments expected to overflow under uniform routing in batches of ``sizes`` [batches]."""
    sizes, count = np.unique(sizes, return_counts=True)
    slots = capacities(sizes, n_experts, top_k, np.asarray(factors, np.float64), rule, sizes)  # no load exceeds the tokens
    over = [uniform_overflow(int(t), n_experts, top_k, c, n_special) for t, c in zip(sizes, slots, strict=True)]
    assignments = (sizes * count).sum() * top_k * n_experts / (n_experts + n_special)
    return np.array(count @ np.array(over) / assignments if len(sizes) else np.full(len(factors), np.nan))


def checked_keys(keys: np.ndarray, n_keys: int, n: int) -> np.ndarray:
    """int32 [n], as given. Raises CapacityError unless each of ``n`` tokens has a key in 0..n_keys-1."""
    if len(keys) != n or (n and not 0 <= int(keys.min()) <= int(keys.max()) < n_keys):
        raise CapacityError(f"one key in 0..{n_keys - 1} is needed for each of the {n} tokens")
    return np.ascontiguousarray(keys, np.int32)
