"""Find the routing sites of a model, and say how each router scores.

Since transformers 5 nearly every MoE block calls ``experts(hidden_states, top_k_index, top_k_weights)``; what passes
that call is what the model executes, whatever the router did before. Sites are found by that contract, without family
names. ROUTERS says what a router's scores mean; a family that departs from the contract has an ``adapter`` there.
A router missing from ROUTERS is still captured exactly (ids and weights), with its scores left undefined.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .trace import NO_EXPERT, LayerInfo

ID_NAMES = frozenset({"top_k_index", "router_indices", "topk_indices", "selected_experts", "top_k_indices"})
WEIGHT_NAMES = frozenset({"top_k_weights", "routing_weights", "topk_weights", "router_scores"})
ROUTER_CLASS = re.compile(r"(Router|TopKGating|MoEGate|MoeGate|SparseGate)$")
REFUSED = MappingProxyType(
    {
        "NllbMoeTop2Router": "this release of transformers runs experts 0 and 1 for every token whatever the router"
        " chose (a mask is read as expert ids), so there is no routing to show",
        "VitPoseNaiveMoe": "its expert is picked by the dataset index, not by a router",
    }
)


class RouterError(RuntimeError):
    """The routing of this model cannot be recorded exactly; the message says what was seen and what to do."""


@dataclass(frozen=True)
class Routed:
    """What one forward sent to one site's experts, before padding is taken out.

    ids, chosen  int64 [N, k] (-1 = none); weights [N, k] in the dtype executed; logits [N, C] or None.
    """

    ids: Tensor
    weights: Tensor
    chosen: Tensor
    logits: Tensor | None


def _as_given(ids: Tensor, weights: Tensor, logits: Tensor | None) -> Routed:
    return Routed(ids, weights, ids, logits)


def _after_capacity(dispatch: Tensor, weights: Tensor, logits: Tensor | None) -> Routed:
    """Switch: a one-hot dispatch mask [N, 1, E] after native capacity; an all-zero row was dropped."""
    if logits is None:
        raise RouterError("the Switch router gave no logits, so dropped tokens cannot be told from routed ones")
    hot = dispatch.flatten(0, -2)
    chosen = logits.flatten(0, -2).softmax(-1, dtype=torch.float32).argmax(-1, keepdim=True)
    kept = hot.sum(-1, keepdim=True) > 0
    ids = torch.where(kept, hot.argmax(-1, keepdim=True), NO_EXPERT)
    if not torch.equal(ids[kept], chosen[kept]):
        raise RouterError("the Switch dispatch mask disagrees with the argmax of its router's probabilities")
    return Routed(ids, torch.where(kept, weights.reshape(-1, 1), 0), chosen, logits)


@dataclass(frozen=True)
class RouterKind:
    """What is known of one router class: its score function, where its logits stand in its output, its adapter."""

    scoring: str
    logits_at: int = 0
    adapter: Callable[[Tensor, Tensor, Tensor | None], Routed] = _as_given
    ids_at: int | None = 2


ROUTERS: Mapping[str, RouterKind] = MappingProxyType(
    {
        "MixtralTopKRouter": RouterKind("softmax"),
        "OlmoeTopKRouter": RouterKind("softmax"),
        "Qwen2MoeTopKRouter": RouterKind("softmax"),
        "Qwen3MoeTopKRouter": RouterKind("softmax"),
        "DeepseekV2TopkRouter": RouterKind("softmax"),
        "DeepseekV3TopkRouter": RouterKind("sigmoid"),
        "GptOssTopKRouter": RouterKind("softmax-topk"),
        "SwitchTransformersTop1Router": RouterKind("softmax", logits_at=2, adapter=_after_capacity, ids_at=0),
    }
)
UNKNOWN = RouterKind("unknown")


@dataclass(frozen=True)
class Site:
    """One routed block of a live model: its description, the modules to hook, and how to read them."""

    info: LayerInfo
    router: nn.Module
    experts: nn.Module
    block: nn.Module
    kind: RouterKind
    id_name: str
    weight_name: str


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """All routing sites of ``model`` in execution order.

    Raises RouterError for a model without routing, a refused family, or a block that is not understood.
    """
    names = dict(model.named_modules())
    for name, module in names.items():
        if (reason := REFUSED.get(type(module).__name__)) is not None:
            raise RouterError(f"refused: {name} is a {type(module).__name__}, and {reason}")
        if hasattr(module, "_orig_mod"):
            raise RouterError(f"{name or 'the model'} is compiled: load the model again and capture before torch.compile")
    declared = _declared_routers(model)
    found = [(name, *arguments) for name, m in names.items() if (arguments := _contract(m)) is not None]
    sites = [_site(model, names, declared, i, *entry) for i, entry in enumerate(found)]
    claimed = {id(s.router) for s in sites}
    strays = [n for n, m in names.items() if _is_router(m, declared) and id(m) not in claimed]
    if strays:
        raise RouterError(f"router {strays[0]} ({type(names[strays[0]]).__name__}) has no experts that follow the"
                          " contract experts(hidden, ids, weights): this family needs an adapter in routers.py")  # fmt: skip
    if not sites:
        raise RouterError(_why_none(model))
    return tuple(sites)


def _contract(module: nn.Module) -> tuple[str, str] | None:
    """(name of the ids argument, name of the weights argument) where ``module`` is an experts module."""
    parameters = list(inspect.signature(type(module).forward).parameters)
    if len(parameters) >= 4 and parameters[2] in ID_NAMES and parameters[3] in WEIGHT_NAMES:
        return parameters[2], parameters[3]
    return None


def _declared_routers(model: nn.Module) -> frozenset[str]:
    """Class names that the model's classes declare as the source of router logits."""
    recorders = (_CAN_RECORD_REGISTRY.get(m) for m in model.modules() if hasattr(m, "config"))
    given = (r.get("router_logits") for r in recorders if r)
    entries = [x for e in given if e is not None for x in (e if isinstance(e, (list, tuple)) else [e])]
    return frozenset(getattr(e, "target_class", e).__name__ for e in entries)


def _is_router(module: nn.Module, declared: frozenset[str]) -> bool:
    name = type(module).__name__
    return name in declared or ROUTER_CLASS.search(name) is not None


def _site(model: nn.Module, names: Mapping[str, nn.Module], declared: frozenset[str], index: int,
          name: str, id_name: str, weight_name: str) -> Site:  # fmt: skip
    parent = name.rpartition(".")[0]
    block, experts = names[parent], names[name]
    routers = [(n, m) for n, m in block.named_children() if _is_router(m, declared)]
    if len(routers) != 1:
        seen = ", ".join(f"{n}: {type(m).__name__}" for n, m in block.named_children())
        raise RouterError(f"{parent} has experts but {len(routers)} routers beside them (children: {seen})")
    router = routers[0][1]
    kind = ROUTERS.get(type(router).__name__, UNKNOWN)
    config = _config_of(model, parent)
    stack = "encoder" if "encoder" in parent.split(".") else "decoder"
    settings: dict[str, Any] = {k: v for k in ("num_group", "topk_group", "topk_method", "routed_scaling_factor", "expert_capacity")
                if isinstance(v := getattr(router, k, None), (int, float, str))}  # fmt: skip
    if isinstance(bias := getattr(router, "e_score_correction_bias", None), Tensor):
        settings["bias"] = bias.detach().float().tolist()
    info = LayerInfo(
        index=index,
        layer=int((re.findall(r"\.(\d+)(?=\.|$)", parent) or ["0"])[0]),
        stack=stack,
        stream=stack,
        name=parent,
        n_experts=_first_int(router, experts, config, names=("num_experts", "num_local_experts", "n_routed_experts")),
        top_k=1 if kind.adapter is _after_capacity else _first_int(router, block, config, names=("top_k", "num_experts_per_tok")),
        scoring=kind.scoring,
        n_shared=_shared(block, config),
        normalised=_first_bool(router, config),
        native_capacity=getattr(router, "expert_capacity", None),
        router=settings,
        note="" if kind is not UNKNOWN else f"scores of {type(router).__name__} are not known: entropy and margin undefined",
    )  # fmt: skip
    return Site(info, router, experts, block, kind, id_name, weight_name)


def _config_of(model: nn.Module, name: str) -> Any:
    """Configuration of the innermost module on the path ``name`` that has one."""
    config, module = getattr(model, "config", None), model
    for step in name.split("."):
        module = module.get_submodule(step)
        config = getattr(module, "config", config)
    return config


def _first_int(*places: Any, names: tuple[str, ...]) -> int:
    for place in places:
        for name in names:
            if isinstance(value := getattr(place, name, None), int):
                return value
    raise RouterError(f"none of {', '.join(names)} is set on {type(places[0]).__name__}, its block or its config")


def _first_bool(router: nn.Module, config: Any) -> bool | None:
    for place in (router, config):
        if isinstance(value := getattr(place, "norm_topk_prob", None), bool):
            return value
    return True if type(router).__name__ in ("MixtralTopKRouter", "GptOssTopKRouter") else None


def _shared(block: nn.Module, config: Any) -> int:
    children = [n for n, _ in block.named_children() if n.startswith("shared_expert") and not n.endswith("gate")]
    return (getattr(config, "n_shared_experts", None) or 1) if children else 0


def _why_none(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    counts = {n: getattr(config, n, None) for n in ("num_experts", "num_local_experts", "n_routed_experts")}
    known = {n: v for n, v in counts.items() if isinstance(v, int) and v > 1}
    what = type(model).__name__
    if known:
        n, v = next(iter(known.items()))
        return (f"{what} says {n}={v} but no block calls experts(hidden, ids, weights): either all its layers are dense"
                " by configuration, or its blocks are not recognised and need an adapter in routers.py")  # fmt: skip
    return f"{what} has no router layers: looked for blocks that call experts(hidden, ids, weights) and found none"


def selection_scores(info: LayerInfo, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """(router probabilities float32 [N, C], scores by which experts are chosen [N, C] or None where not definable).

    Probabilities sum to 1; sigmoid scores are divided by their sum. With limited groups the best rejected expert is
    not the next best score, so selection scores are None there.
    """
    if info.scoring == "sigmoid":
        scores = logits.float().sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
        bias = info.router.get("bias")
        scores = scores if bias is None else scores + torch.tensor(bias, device=scores.device)
    else:
        scores = probabilities = logits.float().softmax(-1)
    groups, kept = info.router.get("num_group") or 0, info.router.get("topk_group") or 0
    limited = 0 < kept < groups and info.router.get("topk_method") != "greedy"
    return probabilities, None if limited else scores
