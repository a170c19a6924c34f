"""Two proofs that what was recorded is what the model executes, sharing no path with the recording.

Recompute what a site returned from the captured ids and weights; change one expert's weights and see whose output changes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from analysis.recorder import recording
from analysis.routers import Routed, Site, find_sites

from .families import inputs

Seen = dict[nn.Module, tuple[tuple[Any, ...], Any]]


def run(model: Any, n: int = 12) -> Tensor:
    """The main output of one forward over two documents of ``n`` tokens."""
    device = "cpu" if model.device.type == "meta" else model.device  # offloaded whole
    given = {k: v.to(device, model.dtype if v.is_floating_point() else None) for k, v in inputs(model, n).items()}
    with torch.no_grad():
        return model(**given)[0]


def record(model: Any, n: int = 12) -> list[Routed]:
    with recording(model) as recorder:
        run(model, n)
    return [forwards[0] for forwards in recorder.take()]


@contextmanager
def watching(modules: Any, seen: Seen) -> Iterator[None]:
    """Keep arguments and output of the last call of each module."""

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen[module] = (tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments), output)

    handles = [m.register_forward_hook(keep) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def surroundings(model: nn.Module, site: Site) -> list[nn.Module]:
    """The block, all within it, and the module around it (JetMoE's attention calls its experts piecewise)."""
    around = model.get_submodule(site.info.name.rpartition(".")[0])
    return [around, *site.block.modules()]


def rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


# ---- what a site returned, and the same from ids and weights: one pair of functions per way to execute --------------------


def combined(alone: Callable[[int], Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    """sum over slots of weight x (that expert alone on that token); ``alone(e)`` is [N, H]."""
    out = torch.zeros_like(alone(0))
    for e in ids.unique().tolist():
        if e >= 0:
            out += (weights * (ids == e)).sum(-1, keepdim=True).to(out.dtype) * alone(e)
    return out


def by_contract(site: Site, seen: Seen, ids: Tensor, weights: Tensor) -> Tensor:
    hidden = seen[site.experts][0][0]
    n = ids.shape[0]
    width = 2 if hasattr(site.experts, "identity_expert") else 1  # LongCat's loop fails for one slot

    def alone(e: int) -> Tensor:
        if e >= site.info.n_experts and not hasattr(site.experts, "identity_expert"):  # a skip class computes nothing
            return torch.zeros_like(rows(hidden))
        given = torch.full((n, width), e, device=hidden.device)
        if site.info.native_capacity is not None:
            given = nn.functional.one_hot(given, site.info.n_experts)
        return rows(site.experts(hidden, given, torch.full((n, width), 1 / width, dtype=hidden.dtype, device=hidden.device)))

    return combined(alone, ids, weights)


def scaled_input(site: Site, seen: Seen, ids: Tensor, weights: Tensor) -> Tensor:
    hidden, e = seen[site.router][0][0], site.experts
    out = torch.zeros_like(hidden)
    for slot in range(ids.shape[1]):
        gate, up = torch.einsum("nh,nhf->nf", hidden * weights[:, slot, None], e.gate_up_proj[ids[:, slot]]).chunk(2, -1)
        out += torch.einsum("nf,nfh->nh", up * e.act_fn(gate), e.down_proj[ids[:, slot]])
    return out


def product_keys(site: Site, seen: Seen, ids: Tensor, weights: Tensor) -> Tensor:
    block, hidden = site.block, rows(seen[site.block][0][0])
    active = block.act_fn(torch.einsum("nkh,nh->nk", block.down_embed.weight[ids], hidden)) * weights
    shared = block.down_proj(block.act_fn(block.gate_proj(hidden)) * block.up_proj(hidden))
    return shared + torch.einsum("nk,nkh->nh", active, block.up_embed.weight[ids])


def sorted_by_expert(site: Site, seen: Seen, ids: Tensor, weights: Tensor) -> Tensor:
    block = site.block
    if site.info.stack == "decoder":
        hidden = rows(seen[block][0][0])

        def alone(e: int) -> Tensor:
            gate, up = (hidden @ block.input_linear.weight[e].T).chunk(2, -1)
            return (block.activation(gate) * up) @ block.output_linear.weight[e].T

        return combined(alone, ids, weights) + block.bias
    order = ids.flatten().sort().indices  # the attention's result of each slot reaches the experts sorted by expert
    per_slot = torch.empty_like(seen[block.output_linear][0][0])
    per_slot[order] = seen[block.output_linear][0][0]
    out = torch.einsum("ph,poh->po", per_slot, block.output_linear.weight[ids.flatten()])
    return (out * weights.reshape(-1, 1)).view(*ids.shape, -1).sum(1) + block.bias


def of_experts(model: nn.Module, site: Site, seen: Seen) -> Tensor:
    return rows(seen[site.experts][1])


def of_every_expert(model: nn.Module, site: Site, seen: Seen) -> Tensor:
    out = seen[site.experts][1]
    return out.view(site.info.n_experts, -1, out.shape[-1]).sum(0)


def of_block(model: nn.Module, site: Site, seen: Seen) -> Tensor:
    out = seen[site.block][1]
    return rows(out[0] if isinstance(out, tuple) else out)


def of_block_or_attention(model: nn.Module, site: Site, seen: Seen) -> Tensor:
    if site.info.stack == "decoder":
        return of_block(model, site, seen)
    return rows(seen[model.get_submodule(site.info.name.rpartition(".")[0])][1][0])


EXECUTIONS = MappingProxyType({
    "JetMoeTopKGating": (sorted_by_expert, of_block_or_attention),
    "Llama4Router": (scaled_input, of_every_expert),
    "DogeCDMoE": (product_keys, of_block),
})  # fmt: skip


def execution(site: Site) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(recompute, observed) of a site."""
    names = (type(site.router).__name__, type(site.block).__name__)
    return next((EXECUTIONS[n] for n in names if n in EXECUTIONS), (by_contract, of_experts))


def last_weights(site: Site, e: int) -> Tensor:
    """The parameters that only expert ``e`` uses last, by layout alone."""
    experts = site.experts
    if isinstance(experts, nn.ModuleDict):
        return experts[f"expert_{e}"].wo.weight
    if isinstance(experts, nn.ModuleList):
        return experts[-1].weight[e]
    if hasattr(experts, "mlp"):
        return experts.mlp.w2.view(site.info.n_experts, -1, experts.hidden_size)[e]
    return experts.down_proj[e]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---- the proofs -----------------------------------------------------------------------------------------------------------


def prove_recomputed(model: Any, tolerance: float = 1e-5, broken: float = 1e-4) -> None:
    """What the experts returned follows from the captured ids and weights; with one wrong id it does not."""
    for site, routed in zip(find_sites(model), record(model), strict=True):
        seen: Seen = {}
        recompute, observed = execution(site)
        with watching(surroundings(model, site), seen):
            run(model)
        with torch.no_grad():
            out = observed(model, site, seen)
            assert relative(recompute(site, seen, routed.ids, routed.weights), out) <= tolerance
            wrong = routed.ids.clone()
            real = (wrong >= 0) & (wrong < site.info.n_experts)
            at, slot = divmod(int((routed.weights.float().abs() * real).argmax()), site.info.top_k)
            wrong[at, slot] = next(e for e in range(site.info.n_experts) if e not in wrong[at].tolist())
            assert relative(recompute(site, seen, wrong, routed.weights), out) > broken


def prove_perturbed(model: Any, factor: float = 3) -> None:
    """Other weights for one expert change exactly the tokens captured on it."""
    for site, routed in zip(find_sites(model), record(model), strict=True):
        seen: Seen = {}
        observed = execution(site)[1]
        with watching(surroundings(model, site), seen), torch.no_grad():
            run(model)
            before = observed(model, site, seen).clone()
            for e in range(site.info.n_experts):
                part = last_weights(site, e)
                kept = part.clone()
                part.mul_(factor)
                run(model)
                part.copy_(kept)
                changed = (observed(model, site, seen) != before).any(-1)
                assert torch.equal(changed, (routed.ids == e).any(-1)), (site.info.name, e)
        assert len(routed.ids.unique()) >= 2  # not vacuous: more than one expert was at work
