"""What a site that departs from the contract returns, again from ids and weights: one pair of functions per way to execute.

Verify-model uses them on a user's checkpoint. The tests use them too, and guard them by what shares no code with them: one
expert's weights are changed, and exactly the tokens captured on it must change in the output that ``observed`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .routers import Site

# Last call of each module: its positional arguments, copied, and its output.
Seen = dict[nn.Module, tuple[tuple[Any, ...], Any]]


@dataclass(frozen=True)
class Execution:
    """``recompute(site, seen, ids, weights)`` and ``observed(model, site, seen)``: both [N, H], in the model's dtype."""

    recompute: Callable[[Site, Seen, Tensor, Tensor], Tensor]
    observed: Callable[[nn.Module, Site, Seen], Tensor]


@contextmanager
def watching(modules: Sequence[nn.Module], seen: Seen) -> Iterator[None]:
    """Keep arguments and output of the last call of each of ``modules`` while the block runs."""

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen[module] = (_copied(arguments), _copied(output))  # copies, because a block may go on in place

    handles = [m.register_forward_hook(keep) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def surroundings(model: nn.Module, site: Site) -> list[nn.Module]:
    """The block, all within it, and the module around it (JetMoE's attention calls its experts piecewise)."""
    return [_around(model, site), *site.block.modules()]


def execution(site: Site) -> Execution | None:
    """How a departing site is recomputed; None for one that follows the contract, or has no entry."""
    return next((EXECUTIONS[n] for n in (type(site.router).__name__, type(site.block).__name__) if n in EXECUTIONS), None)


def rows(tensor: Tensor) -> Tensor:
    """[..., H] as [N, H]."""
    return tensor.reshape(-1, tensor.shape[-1])


def combined(alone: Callable[[int], Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    """[N, H]: sum over slots of weight x (that expert alone on that token), ids and weights [N, k]; ``alone(e)`` is [N, H]."""
    out = torch.zeros_like(alone(0))
    for e in ids.unique().tolist():
        if e >= 0:
            out += (weights * (ids == e)).sum(-1, keepdim=True).to(out.dtype) * alone(e)
    return out


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(_copied(v) for v in value) if type(value) in (tuple, list) else value


def _around(model: nn.Module, site: Site) -> nn.Module:
    return model.get_submodule(site.info.name.rpartition(".")[0])


def _scaled_input(site: Site, seen: Seen, ids: Tensor, weights: Tensor) -> Tensor:
    """Llama 4: the weight multiplies the expert's input. gate_up_proj [E, H, 2I], down_proj [E, I, H]."""
    hidden = seen[site.router][0][0]
    experts: Any = site.experts
    gate_up, down, activation = experts.gate_up_proj, experts.down_proj, experts.act_fn
    out = torch.zeros_like(hidden)
    for e in ids.unique().tolist():
        at, slot = torch.where(ids == e)
        gate, up = ((hidden[at] * weights[at, slot, None]) @ gate_up[e]).chunk(2, -1)
        out.index_add_(0, at, (up * activation(gate)) @ down[e])
    return out


def _product_keys(site: Site, seen: Seen, ids: Tensor, weights: Tensor) -> Tensor:
    """Doge: an expert is a row of two embeddings, added to a shared MLP."""
    block: Any = site.block
    hidden = rows(seen[site.block][0][0])
    active = block.act_fn(torch.einsum("nkh,nh->nk", block.down_embed.weight[ids], hidden)) * weights
    shared = block.down_proj(block.act_fn(block.gate_proj(hidden)) * block.up_proj(hidden))
    return shared + torch.einsum("nk,nkh->nh", active.to(hidden.dtype), block.up_embed.weight[ids])


def _piecewise(site: Site, seen: Seen, ids: Tensor, weights: Tensor) -> Tensor:
    """JetMoE: weights [E, out, in]; in the attention, experts project the queries and, afterwards, the attention's result."""
    block: Any = site.block
    first, last = block.input_linear.weight, block.output_linear.weight
    if site.info.stack == "attention":
        order = ids.flatten().sort().indices  # the attention's result of each slot reaches the experts sorted by expert
        given = seen[block.output_linear][0][0]
        per_slot = torch.empty_like(given)
        per_slot[order] = given
        out = torch.einsum("ph,poh->po", per_slot, last[ids.flatten()])
        return (out * weights.reshape(-1, 1)).view(*ids.shape, -1).sum(1) + block.bias
    hidden = rows(seen[site.block][0][0])

    def alone(e: int) -> Tensor:
        gate, up = (hidden @ first[e].T).chunk(2, -1)
        return (block.activation(gate) * up) @ last[e].T

    return combined(alone, ids, weights) + block.bias


def _of_every_expert(model: nn.Module, site: Site, seen: Seen) -> Tensor:
    out = seen[site.experts][1]
    summed: Tensor = out.view(site.info.n_experts, -1, out.shape[-1]).sum(0)
    return summed


def _of_block(model: nn.Module, site: Site, seen: Seen) -> Tensor:
    out = seen[_around(model, site) if site.info.stack == "attention" else site.block][1]
    return rows(out[0] if isinstance(out, tuple) else out)


EXECUTIONS: Mapping[str, Execution] = MappingProxyType({
    "JetMoeTopKGating": Execution(_piecewise, _of_block),
    "Llama4Router": Execution(_scaled_input, _of_every_expert),
    "DogeCDMoE": Execution(_product_keys, _of_block),
})  # fmt: skip
