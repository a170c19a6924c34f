"""Find the routing sites of a model, describe them, and turn a router's scores into probabilities.

Since transformers 5 nearly every MoE block calls ``experts(hidden_states, top_k_index, top_k_weights)``; what passes
that call is what the model executes, whatever the router did before. Sites are found by that contract, without family
names; the families that depart from it, and what each router's scores mean, are in families.py.
A router missing there is still captured exactly (ids and weights), with its scores left undefined.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .families import NOT_ROUTERS, REFUSED, ROUTERS, UNKNOWN, Call, Routed, RouterError, RouterKind
from .trace import LayerInfo

__all__ = ["ROUTERS", "Call", "Routed", "RouterError", "RouterKind", "Site", "find_sites", "router_scores"]

ID_NAMES = frozenset({"top_k_index", "router_indices", "topk_indices", "selected_experts", "top_k_indices"})
WEIGHT_NAMES = frozenset({"top_k_weights", "routing_weights", "topk_weights", "router_scores"})
ROUTER_CLASS = re.compile(r"(Router|TopKGating|MoEGate|MoeGate|MoEV1Gate|SparseGate)$")
# Where families keep the correction that is added to the scores before selection: on the router or on its block.
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases", "moe_statics.e_score_correction_bias")
SCALINGS = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
EXPERT_COUNTS = ("num_routed_experts", "num_experts", "num_local_experts", "n_routed_experts")
SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SCORES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "softmax": lambda x: x.softmax(-1),
        "softmax-topk": lambda x: x.softmax(-1),
        "sparsemixer": lambda x: x.softmax(-1),
        "product-keys": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    }
)


@dataclass(frozen=True)
class Site:
    """One routed block of a live model: its description, the modules to hook, and how to read them.

    ``boundary`` is the module whose call is the execution; ``experts`` holds the weights, nearly always the same module.
    ``parameters`` names the boundary's arguments, ``id_name`` and ``weight_name`` those of the contract ("" without).
    ``shared`` holds the experts every token passes beside the routed ones, wherever they stand.
    """

    info: LayerInfo
    router: nn.Module
    experts: nn.Module
    boundary: nn.Module
    block: nn.Module
    kind: RouterKind
    parameters: tuple[str, ...]
    id_name: str = ""
    weight_name: str = ""
    shared: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A block that routes: path and modules, before it is described."""

    path: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    boundary: nn.Module
    kind: RouterKind


def find_sites(model: nn.Module, routers: Mapping[str, RouterKind] = ROUTERS) -> tuple[Site, ...]:
    """All routing sites of ``model``'s language model in execution order; experts of vision towers see no text.

    ``routers`` replaces the table of families.py, to try an entry before it goes there.
    Raises RouterError for a model without routing, a refused family, or a block that is not understood.
    """
    names = {n: m for n, m in model.named_modules() if not any(step.startswith(("vision", "visual")) for step in n.split("."))}
    for name, module in names.items():
        if (reason := REFUSED.get(type(module).__name__)) is not None:
            raise RouterError(f"refused: {name} is a {type(module).__name__}, and {reason}")
        if _compiled(module):
            raise RouterError(f"{name or 'the model'} is compiled: load the model again and capture before torch.compile")
    declared = _declared_routers(model)
    found = sorted((f for name in names if (f := _found(names, declared, name, routers)) is not None), key=_execution(names))
    sites = tuple(_site(model, names, i, f) for i, f in enumerate(found))
    claimed = {id(m) for s in sites for m in (s.router, s.block)}
    for name, module in names.items():
        if _is_router(module, declared) and not any(id(m) in claimed for m in module.modules()):
            raise RouterError(f"router {name} ({type(module).__name__}) has no experts that follow the"
                              " contract experts(hidden, ids, weights): this family needs an adapter in families.py")  # fmt: skip
    if not sites:
        raise RouterError(_why_none(model))
    return sites


def _compiled(module: nn.Module) -> bool:
    """Whether torch.compile has this module in hand, in any of its forms; hooks added later may be skipped silently."""
    forward = getattr(module, "forward", None)
    return (hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(forward, "_torchdynamo_orig_callable"))  # fmt: skip


def _found(names: Mapping[str, nn.Module], declared: frozenset[str], name: str, table: Mapping[str, RouterKind]) -> _Found | None:
    """The block that ``name`` gives away: an experts module of the contract, or a class of the table with a boundary."""
    module, parent = names[name], name.rpartition(".")[0]
    kind = table.get(type(module).__name__, UNKNOWN)
    if kind.boundary:
        path = name if kind.router else parent
        children = dict(names[path].named_children())
        if missing := [c for c in (kind.boundary, *kind.experts) if c not in children]:
            raise RouterError(f"{path} has no {missing[0]}: the entry of {type(module).__name__} in families.py does not fit it")
        held = [children[c] for c in kind.experts]
        router = children[kind.router] if kind.router else module
        return _Found(path, names[path], router, held[0] if len(held) == 1 else nn.ModuleList(held), children[kind.boundary], kind)
    if _contract(module) is None:
        return None
    block = names[parent]
    routers = [(n, m) for n, m in block.named_children() if _is_router(m, declared)]
    if len(routers) != 1:
        seen = ", ".join(f"{n}: {type(m).__name__}" for n, m in block.named_children())
        raise RouterError(f"{parent} has experts but {len(routers)} routers beside them (children: {seen})")
    router = routers[0][1]
    return _Found(parent, block, router, module, module, table.get(type(router).__name__, UNKNOWN))


def _execution(names: Mapping[str, nn.Module]) -> Callable[[_Found], tuple[int, bool]]:
    """Sort key: layers as the model lists them; in a layer, experts of the attention run before those of the MLP."""
    places = {name: i for i, name in enumerate(names)}

    def key(found: _Found) -> tuple[int, bool]:
        layer = re.match(r"(.*?(?:^|\.)\d+)(?=\.|$)", found.path)
        return places[layer[1] if layer else found.path], not _in_attention(found.path)

    return key


def _in_attention(path: str) -> bool:
    return any(step in ("self_attention", "self_attn") for step in path.split("."))


def _contract(module: nn.Module) -> tuple[str, str] | None:
    """(name of the ids argument, name of the weights argument) where ``module`` is an experts module."""
    parameters = _parameters(module)
    if len(parameters) >= 3 and parameters[1] in ID_NAMES and parameters[2] in WEIGHT_NAMES:
        return parameters[1], parameters[2]
    return None


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _declared_routers(model: nn.Module) -> frozenset[str]:
    """Class names that the model's classes declare as the source of router logits."""
    recorders = (_CAN_RECORD_REGISTRY.get(m) for m in model.modules() if hasattr(m, "config"))
    given = (r.get("router_logits") for r in recorders if r)
    entries = [x for e in given if e is not None for x in (e if isinstance(e, (list, tuple)) else [e])]
    return frozenset(getattr(e, "target_class", e).__name__ for e in entries)


def _is_router(module: nn.Module, declared: frozenset[str]) -> bool:
    name = type(module).__name__
    return name not in NOT_ROUTERS and (name in declared or ROUTER_CLASS.search(name) is not None)


def _site(model: nn.Module, names: Mapping[str, nn.Module], index: int, found: _Found) -> Site:
    kind, router, block, config = found.kind, found.router, found.block, _config_of(model, found.path)
    stream = "encoder" if "encoder" in found.path.split(".") else "decoder"
    n_experts = _first_int(router, found.boundary, block, config, names=EXPERT_COUNTS)
    scoring = kind.scoring if isinstance(kind.scoring, str) else kind.scoring(router, config)
    known = scoring in SCORES
    settings = _settings(router, block, kind)
    shared = _shared(block, names.get(found.path.rpartition(".")[0]))
    info = LayerInfo(
        index=index,
        layer=int((re.findall(r"\.(\d+)(?=\.|$)", "." + found.path) or ["0"])[0]),
        stack="attention" if _in_attention(found.path) else stream,
        stream=stream,
        name=found.path,
        n_experts=n_experts,
        n_special=_specials(router, found.boundary, n_experts),
        top_k=_first_int(router, block, config, names=("top_k", "num_experts_per_tok", "top_k_experts"), default=_top_k(kind)),
        scoring=scoring if known else "unknown",
        selection="group-limited top-k" if "num_group" in settings else kind.selection,
        weights_on=kind.weights_on,
        scaled_after=_scaled_after(block, kind),
        n_shared=_how_many(shared, config),
        shared_gate=any("shared_expert_gate" in n for n, _ in block.named_children()),
        normalised=_normalised(router, block, config, kind),
        native_capacity=getattr(router, "expert_capacity", None),
        router=settings,
        note=kind.note if known else f"scores of {type(router).__name__} are not known: entropy and margin undefined",
    )
    contract = _contract(found.boundary) or ("", "")
    return Site(info, router, found.experts, found.boundary, block, kind, _parameters(found.boundary), *contract, shared=shared)


def _settings(router: nn.Module, block: nn.Module, kind: RouterKind) -> dict[str, Any]:
    """What a what-if over this router needs beside its score function; JSON values."""
    kept: dict[str, Any] = {}
    groups, limit = (getattr(router, n, None) or 0 for n in ("num_group", "topk_group"))
    if 0 < limit < groups and getattr(router, "topk_method", None) != "greedy":
        kept |= {"num_group": groups, "topk_group": limit, "group_by": kind.group_by}
    for name in SCALINGS:
        if isinstance(value := getattr(router, name, None), (int, float)):
            kept["routed_scaling_factor"] = value
    if isinstance(p := getattr(block, "moe_normalize_expert_weights", None), (int, float)):
        kept["norm_p"] = p
    if kind.gives != "logits":
        kept["gives"] = kind.gives
    if (bias := _bias(router, block)) is not None:  # on the meta device (offloaded) its values cannot be had
        kept |= {"bias": None if bias.is_meta else bias.detach().float().flatten().tolist(), "bias_on": kind.bias_on}
    return kept


def _bias(router: nn.Module, block: nn.Module) -> Tensor | None:
    for path in BIASES:
        for place in (router, block):
            *way, last = path.split(".")
            for step in way:
                place = getattr(place, step, nn.Identity())
            if isinstance(bias := getattr(place, last, None), Tensor):
                return bias
    return None


def _top_k(kind: RouterKind) -> int | None:
    return 1 if kind.selection == "top-1 with capacity" else None


def _specials(router: nn.Module, experts: nn.Module, n_experts: int) -> int:
    """Classes without weights: zero-compute experts, or a skip class."""
    classes = getattr(router, "num_router_classes", None)
    return int(classes) - n_experts if classes is not None else int(getattr(experts, "zero_expert_num", None) or 0)


def _scaled_after(block: nn.Module, kind: RouterKind) -> float | None:
    if getattr(block, "shared_expert_combination_strategy", "") == "average" and getattr(block, "num_shared_experts", 0) > 0:
        return 0.5
    return float(getattr(block, kind.scaled_by)) if kind.scaled_by else None


def _config_of(model: nn.Module, name: str) -> Any:
    """Configuration of the innermost module on the path ``name`` that has one."""
    config, module = getattr(model, "config", None), model
    for step in filter(None, name.split(".")):
        module = module.get_submodule(step)
        config = getattr(module, "config", config)
    return config


def _first_int(*places: Any, names: tuple[str, ...], default: int | None = None) -> int:
    for place in places:
        for name in names:
            if isinstance(value := getattr(place, name, None), int):
                return value
    if default is None:
        raise RouterError(f"none of {', '.join(names)} is set on {type(places[0]).__name__}, its block or its config")
    return default


def _normalised(router: nn.Module, block: nn.Module, config: Any, kind: RouterKind) -> bool | None:
    if kind.normalised is not None:
        return kind.normalised
    if (p := getattr(block, "moe_normalize_expert_weights", None)) is not None:
        return bool(p == 1)
    for place in (router, config):
        if isinstance(value := getattr(place, "norm_topk_prob", None), bool):
            return value
    return None


def _shared(block: nn.Module, parent: nn.Module | None) -> tuple[nn.Module, ...]:
    """Experts every token passes, beside the routed ones: in the block or in the layer around it."""
    children = [c for place in (block, parent) if place is not None for c in place.named_children()]
    return tuple(m for n, m in children if n.startswith(("shared_expert", "shared_mlp")) and not n.endswith("gate"))


def _how_many(shared: tuple[nn.Module, ...], config: Any) -> int:
    counts = (getattr(config, n, None) for n in SHARED_COUNTS)
    return next((c for c in counts if isinstance(c, int) and c > 0), 1) if shared else 0


def _why_none(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    counts = {n: getattr(config, n, None) for n in ("num_experts", "num_local_experts", "n_routed_experts")}
    known = {n: v for n, v in counts.items() if isinstance(v, int) and v > 1}
    what = type(model).__name__
    if known:
        n, v = next(iter(known.items()))
        return (f"{what} says {n}={v} but no block calls experts(hidden, ids, weights): either all its layers are dense"
                " by configuration, or its blocks are not recognised and need an adapter in families.py")  # fmt: skip
    return f"{what} has no router layers: looked for blocks that call experts(hidden, ids, weights) and found none"


def router_scores(info: LayerInfo, given: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """From what a router gave [N, C]: probabilities float32 [N, classes], selection scores or None, logsumexp [N].

    Probabilities sum to 1: scores of independent experts (sigmoid, sqrt-softplus) are divided by their sum. Selection
    scores are those whose largest k were chosen; None where no such scores exist: hashed tokens, and limited groups,
    where the best rejected expert is not the next best score. logsumexp is NaN where no logits are given.
    Raises RouterError where C is not the number of classes.
    """
    given = _all_pairs(info, given.float()) if info.scoring == "product-keys" else given.float()
    if given.shape[-1] != info.n_classes:
        raise RouterError(f"{info.name}: its router gave {given.shape[-1]} scores per token for {info.n_classes} experts")
    if info.router.get("gives") == "probabilities":
        scores, volume = given, torch.full_like(given[:, 0], torch.nan)
    else:
        scores, volume = SCORES[info.scoring](given), given.logsumexp(-1)
    probabilities = scores / scores.sum(-1, keepdim=True)
    biased = "bias" in info.router
    if info.selection in ("hash", "group-limited top-k") or (biased and info.router["bias"] is None):
        return probabilities, None, volume
    selection = given if info.router.get("bias_on") == "logits" else scores
    if biased:
        selection = selection + torch.tensor(info.router["bias"]).to(selection.device, non_blocking=True)
    return probabilities, selection, volume


def _all_pairs(info: LayerInfo, halves: Tensor) -> Tensor:
    """Scores [N, E] of all pairs of keys from those of single keys [N, 2 keys]; experts without a pair get -inf."""
    first, second = halves.chunk(2, dim=-1)
    pairs = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(1)
    return F.pad(pairs, (0, info.n_experts - pairs.shape[1]), value=-torch.inf)
