"""How many slots an expert has: capacity in every framework's arithmetic, what chance would overflow, what slots cost.

Expert capacity is the number of tokens an expert takes from one batch; the batch is whatever is routed together. It
follows from the batch's tokens T, the layer's experts E and choices per token k, and the capacity factor CF. Frameworks
differ in rounding, in whether k counts, and in a minimum; each is an entry of PRESETS. Who gets a slot is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from .binomial import binomial

MAX_FACTOR = 1e6
Rounding = Callable[[np.ndarray], np.ndarray]
SCOPES = ("document", "documents", "tokens", "run")
ROUNDINGS: Mapping[str, Rounding] = MappingProxyType({"up": np.ceil, "down": np.floor})


class CapacityError(ValueError):
    """A capacity setting that has no meaning, or that this run cannot answer; the message says what to change."""


# Each formula takes tokens T, experts E, k (1 where the rule does not count it), factors CF and the rounding, and keeps
# the framework's own order of operations: 100 tokens per expert at CF 1.1 are 110.00000000000001, which Megatron rounds to 111.


def _share_first(t: np.ndarray, e: int, k: int, cf: np.ndarray, rounding: Rounding) -> np.ndarray:
    return rounding(t * k / e * cf)


def _product_first(t: np.ndarray, e: int, k: int, cf: np.ndarray, rounding: Rounding) -> np.ndarray:
    return rounding(t * k * cf / e)


def _single_precision(t: np.ndarray, e: int, k: int, cf: np.ndarray, rounding: Rounding) -> np.ndarray:
    return rounding((t / e).astype(np.float32) * (cf * k).astype(np.float32)).astype(np.float64)


def _rounded_share(t: np.ndarray, e: int, k: int, cf: np.ndarray, rounding: Rounding) -> np.ndarray:
    return k * rounding(cf * np.ceil(t / e))


@dataclass(frozen=True)
class CapacityRule:
    """How a framework turns a capacity factor into slots per expert, and the drop policy it uses.

    ``counts_k``  the factor multiplies T*k/E (True) or T/E (False); ``minimum`` slots at least; a multiple of
    ``multiple``; never above T where ``within_tokens``. ``zero`` says what no factor or no slot means: "none" (drop all),
    or "max load" (as many slots as the fullest expert needs, as Tutel and MegaBlocks do).
    """

    name: str
    title: str
    formula: Callable[[np.ndarray, int, int, np.ndarray, Rounding], np.ndarray]
    rounding: str
    counts_k: bool
    policy: str
    source: str
    minimum: int = 0
    multiple: int = 1
    within_tokens: bool = False
    zero: str = "none"


_RULES = (
    CapacityRule("megatron", "Megatron-LM", _share_first, "up", True, "probability",
                 "Megatron-LM megatron/core/transformer/moe/moe_utils.py, get_capacity: ceil(T k / E * CF)"),
    CapacityRule("switch", "Switch Transformer", _share_first, "up", False, "position",
                 "Fedus et al., arXiv 2101.03961, eq. 3: T / E * CF; the paper gives no rounding, up is taken"),
    CapacityRule("gshard", "GShard (Lingvo)", _product_first, "down", False, "choice",
                 "lingvo/core/gshard_layers.py, Top2GatingOnLogits: int(G CF / E), up to a multiple of 4; k is not counted, so "
                 "the paper's 2 N / (G E) for top-2 (arXiv 2006.16668) is CF 2", multiple=4),
    CapacityRule("mesh", "Mesh-TensorFlow", _product_first, "down", False, "position",
                 "mesh_tensorflow/transformer/moe.py: max(min(G, int(G CF / E)), 4)", minimum=4, within_tokens=True),
    CapacityRule("deepspeed", "DeepSpeed", _single_precision, "up", True, "choice",
                 "deepspeed/moe/sharded_moe.py, _capacity in float32: max(ceil(T / E * (CF k)), min_capacity); its policy is that "
                 "of top2gating, for k above 2 topkgating drops by probability", minimum=4),
    CapacityRule("deepspeed_top1", "DeepSpeed top-1 gate", _single_precision, "up", False, "random",
                 "deepspeed/moe/sharded_moe.py, top1gating: as deepspeed, k not counted", minimum=4),
    CapacityRule("tutel", "Tutel", _rounded_share, "down", True, "choice",
                 "tutel/impls/fast_dispatch.py, extract_critical: k int(CF ceil(T / E)), up to a multiple of `alignment`; "
                 "CF 0: max load; CF < 0: min(max load, the same with -CF)", zero="max load"),
    CapacityRule("megablocks", "MegaBlocks MoE", lambda t, e, k, cf, rounding: rounding(cf * (k * t / e)), "down", True, "position",
                 "megablocks/layers/moe.py, expert_capacity: int(CF (k T / E)); 0 slots: max load", zero="max load"),
)  # fmt: skip
PRESETS: Mapping[str, CapacityRule] = MappingProxyType({rule.name: rule for rule in _RULES})


def capacity_rule(preset: str = "megatron", *, rounding: str | None = None, counts_k: bool | None = None, minimum: int | None = None,
                  multiple: int | None = None) -> CapacityRule:  # fmt: skip
    """A framework's rule with any of its parts replaced. Raises CapacityError for an unknown name or a value without meaning."""
    if preset not in PRESETS:
        raise CapacityError(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if rounding is not None and rounding not in ROUNDINGS:
        raise CapacityError(f"no rounding {rounding!r}: choose one of {', '.join(ROUNDINGS)}")
    for what, value, least in (("minimum", minimum, 0), ("multiple", multiple, 1)):
        if value is not None and not least <= value <= MAX_FACTOR:
            raise CapacityError(f"{what} {value} is not a number of slots from {least} to {MAX_FACTOR:.0f}")
    given: dict[str, Any] = {"rounding": rounding, "counts_k": counts_k, "minimum": minimum, "multiple": multiple}
    return replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})


def capacities(tokens: np.ndarray, n_experts: int, top_k: int, factors: np.ndarray, rule: CapacityRule,
               max_load: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """int64 [batches, factors]: slots per expert for batches of ``tokens`` [batches] tokens at ``factors`` [factors].

    ``max_load`` [batches] is the load of each batch's fullest expert; only rules with ``zero`` = "max load" read it, and
    only at factors that need it. Raises CapacityError for shapes or factors without meaning.
    """
    _check_shape(tokens, n_experts, top_k)
    cf = np.asarray(factors, np.float64)
    low = -MAX_FACTOR if rule.name == "tutel" else 0.0
    if not ((cf >= low) & (cf <= MAX_FACTOR)).all():  # NaN fails both
        raise CapacityError(f"capacity factor {cf[~((cf >= low) & (cf <= MAX_FACTOR))][0]} is outside {low:g} to {MAX_FACTOR:g}")
    t = np.asarray(tokens, np.float64)[:, None]
    slots = rule.formula(t, n_experts, top_k if rule.counts_k else 1, np.abs(cf)[None], ROUNDINGS[rule.rounding])
    if rule.within_tokens:
        slots = np.minimum(slots, t)
    whole = np.maximum(slots.astype(np.int64), rule.minimum)
    if rule.zero == "max load":
        whole = _fitted(whole, cf, rule, max_load)
    return -(-whole // rule.multiple) * rule.multiple


def expert_capacity(tokens: int, n_experts: int, top_k: int = 1, factor: float = 1.0, preset: str = "megatron", *,
                    max_load: int | None = None, **parts: Any) -> int:  # fmt: skip
    """Slots per expert for one batch. ``parts`` replace parts of the preset, as in ``capacity_rule``.

    >>> expert_capacity(tokens=6, n_experts=3, top_k=1, factor=1.0, preset="megatron")
    2
    """
    loads = None if max_load is None else np.array([max_load])
    rule = capacity_rule(preset, **parts)
    return int(capacities(np.array([tokens]), n_experts, top_k, np.array([factor]), rule, loads)[0, 0])


@dataclass(frozen=True)
class Batches:
    """Which tokens are routed together: order int64 [tokens], rows as served; starts int64 [batches + 1] into order."""

    order: np.ndarray
    starts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """int64 [batches]: tokens per batch; none is empty."""
        return np.diff(self.starts)

    @cached_property
    def of_row(self) -> np.ndarray:
        """int32 [tokens]: the batch of each row."""
        out = np.empty(len(self.order), np.int32)
        out[self.order] = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)
        return out


def make_batches(lengths: Sequence[int] | np.ndarray, scope: str = "document", size: int | None = None,
                 mixed: int | None = None) -> Batches:  # fmt: skip
    """Batches over documents of ``lengths`` [documents] tokens, whose rows follow one another from row 0.

    scope    "document" each on its own; "documents" ``size`` at a time; "tokens" ``size`` tokens at a time, cutting
             documents, the last batch shorter; "run" all at once.
    mixed    a seed that shuffles the documents first, as training does; None keeps the recorded order.
    """
    starts, lengths = np.append(0, np.cumsum(batch_sizes(lengths, scope, size, mixed))), np.asarray(lengths, np.int64)
    order = np.arange(starts[-1], dtype=np.int64)
    if mixed is not None:
        served = _served(len(lengths), mixed)
        first, lengths = (np.cumsum(lengths) - lengths)[served], lengths[served]
        order += np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
    return Batches(order, starts)


def batch_sizes(lengths: Sequence[int] | np.ndarray, scope: str = "document", size: int | None = None,
                mixed: int | None = None) -> np.ndarray:  # fmt: skip
    """int64 [batches]: tokens of each batch of ``make_batches``, whose arguments these are; takes no time per token."""
    lengths, step = _checked_batches(lengths, scope, size)
    if scope == "tokens":
        n = int(lengths.sum())
        return np.diff(np.append(np.arange(0, n, step), n))
    served, first = document_batches(lengths, scope, size, mixed)
    return np.add.reduceat(lengths[served], first) if len(first) else np.zeros(0, np.int64)


def document_batches(lengths: Sequence[int] | np.ndarray, scope: str = "document", size: int | None = None,
                     mixed: int | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(int64 [documents], the documents as they are served; int64 [batches], which of these each batch starts with).

    Arguments of ``make_batches``; raises CapacityError for "tokens", whose batches cut documents.
    """
    lengths, step = _checked_batches(lengths, scope, size)
    if scope == "tokens":
        raise CapacityError("batches of tokens are not made of whole documents")
    served = _served(len(lengths), mixed)
    first = np.arange(0, len(served), {"document": 1, "documents": step}.get(scope, max(len(served), 1)))
    return served, first[np.add.reduceat(lengths[served], first) > 0] if len(first) else first


def _checked_batches(lengths: Sequence[int] | np.ndarray, scope: str, size: int | None) -> tuple[np.ndarray, int]:
    if scope not in SCOPES:
        raise CapacityError(f"no scope {scope!r}: choose one of {', '.join(SCOPES)}")
    if scope in ("documents", "tokens") and (size or 0) < 1:
        raise CapacityError(f"a batch of {size} {scope} has no meaning: give size, at least 1")
    lengths = np.asarray(lengths, np.int64)
    if (lengths < 0).any():
        raise CapacityError("a document cannot have a negative number of tokens")
    return lengths, size or 0


def _served(documents: int, mixed: int | None) -> np.ndarray:
    return np.arange(documents) if mixed is None else np.random.default_rng(mixed).permutation(documents)


def batch_loads(experts: np.ndarray, n_experts: int, batches: Batches) -> np.ndarray:
    """int64 [batches, E]: assignments chosen per expert in each batch; ids outside 0..E-1 are not counted."""
    from .queues import loads_of  # pays for numba

    if len(batches.order) != len(experts):
        raise CapacityError(f"the batches hold {len(batches.order)} tokens, the site {len(experts)}")
    return np.asarray(loads_of(experts, batches.order, batches.starts, n_experts))


def uniform_overflow(tokens: int, n_experts: int, top_k: int, slots: np.ndarray, n_special: int = 0) -> np.ndarray:
    """float64 [n]: assignments expected to overflow ``slots`` [n] per expert when each token picks k of E experts uniformly.

    Exact: every load n_e is Binomial(T, k/E), with E counting also ``n_special`` classes that take no slot, so the sum over experts is E * E[max(n_e - C, 0)], for each policy that
    does not reroute. The null beside a measured curve; at C = T k / E it tends to T k sqrt((1 - k/E) / (2 pi T k / E)).
    Time and memory grow with sqrt(T).
    """
    _check_shape(np.array([tokens]), n_experts + n_special, top_k)
    slots, share = np.asarray(slots, np.float64), top_k / (n_experts + n_special)
    mean = tokens * share
    if tokens == 0 or share == 1:
        return n_experts * np.maximum(mean - slots, 0)
    low, mass = binomial(tokens, share)
    loads = np.arange(low, low + len(mass))
    above = np.append(np.cumsum(mass[::-1])[::-1], 0.0)  # P(n >= low + i)
    mass_above = np.append(np.cumsum((mass * loads)[::-1])[::-1], 0.0)
    first = np.clip(slots + 1 - low, 0, len(loads)).astype(np.int64)  # the first load above C
    return n_experts * np.maximum(mass_above[first] - slots * above[first], 0)


@dataclass(frozen=True)
class ExpertShape:
    """One expert: ``hidden_size`` values in and out of ``bytes_per_value`` bytes, and ``parameters`` weights in matrices."""

    hidden_size: int
    parameters: int
    bytes_per_value: float = 2


@dataclass(frozen=True)
class SlotCost:
    """What a number of slots costs in one forward pass of one layer; each figure, then the part of it that is padding.

    ``flops`` count a multiply-add as two, over all slots, filled or not. ``all_to_all_bytes`` cross between devices, in
    dispatch and combine together.
    """

    slots: int
    idle: int
    flops: int
    padding_flops: int
    all_to_all_bytes: int
    padding_bytes: int


def slot_cost(slots: int, kept: int, shape: ExpertShape, devices: int = 1) -> SlotCost:
    """Cost of ``slots`` expert slots of which ``kept`` hold a token, with experts and tokens spread evenly over ``devices``.

    A slot costs 2 FLOPs per parameter of its expert and moves the hidden values once there and once back; (devices - 1) /
    devices of the slots cross between devices (all-to-all dispatch and combine of GShard, arXiv 2006.16668, section 3.3).
    Raises CapacityError when more tokens are kept than there are slots, or for a size below one.
    """
    if min(shape.hidden_size, shape.parameters, devices) < 1 or not shape.bytes_per_value > 0:
        raise CapacityError(f"sizes must be positive: {shape}, {devices} devices")
    if not 0 <= kept <= slots:
        raise CapacityError(f"{kept} tokens cannot be kept in {slots} slots")
    idle, per_slot = slots - kept, 2 * shape.parameters
    moved, moved_idle = (round(2 * n * shape.hidden_size * shape.bytes_per_value * (devices - 1) / devices) for n in (slots, idle))
    return SlotCost(slots, idle, slots * per_slot, idle * per_slot, moved, moved_idle)


def _check_shape(tokens: np.ndarray, n_experts: int, top_k: int) -> None:
    if n_experts < 1 or top_k < 1:
        raise CapacityError(f"{n_experts} experts and {top_k} choices per token: both must be at least 1")
    if top_k > n_experts:
        raise CapacityError(f"a token cannot choose {top_k} of {n_experts} different experts")
    if np.asarray(tokens).dtype.kind not in "iu" or (np.asarray(tokens) < 0).any() or (np.asarray(tokens) > 2**40).any():
        raise CapacityError(f"tokens per batch must be whole numbers from 0 to 2^40, not {tokens}")


def _fitted(slots: np.ndarray, cf: np.ndarray, rule: CapacityRule, max_load: np.ndarray | None) -> np.ndarray:
    """Replace slots where no factor, or no slot, means as many as the fullest expert needs (Tutel, MegaBlocks)."""
    fits = np.broadcast_to(cf == 0, slots.shape) if rule.name == "tutel" else slots == 0
    capped = np.broadcast_to(cf < 0, slots.shape)
    if not (fits | capped).any():
        return slots
    if max_load is None:
        raise CapacityError(f"{rule.title} sizes its slots by the fullest expert at this factor: give max_load")
    load = np.asarray(max_load, np.int64)[:, None]
    return np.where(fits, load, np.where(capped, np.minimum(slots, load), slots))


def least_factor(factors: np.ndarray, dropped_share: np.ndarray, target: float) -> float:
    """The smallest of ``factors`` from which on ``dropped_share`` stays at or below ``target``; NaN where none does."""
    above = np.flatnonzero(~(np.asarray(dropped_share) <= target))
    first = above[-1] + 1 if len(above) else 0
    return float(factors[first]) if first < len(factors) else math.nan
