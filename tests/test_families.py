"""Every family: what is captured is what the model executes, and the table says of its scores what is true.

Two proofs that do not share a path with capture: recompute what the experts returned from the captured ids and weights, and
change one expert's weights to see that exactly the tokens captured on it change.
"""

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from analysis.capture import capture
from analysis.families import NOT_ROUTERS, REFUSED, ROUTERS
from analysis.recorder import recording
from analysis.routers import ROUTER_CLASS, Routed, Site, find_sites, router_scores

from . import tiny
from .families import FAMILIES, Family, inputs, routed_layers

TEXTS = ("def f(x): return x", "Il pleut.")
TOKENIZER = tiny.tokenizer()
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
Seen = dict[nn.Module, tuple[tuple[Any, ...], Any]]


def run(model: nn.Module) -> Tensor:
    """The main output of one forward."""
    with torch.no_grad():
        return model(**inputs(model))[0]


def record(model: nn.Module) -> list[Routed]:
    with recording(model) as recorder:
        run(model)
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
        given = torch.full((n, width), e)
        if site.info.native_capacity is not None:
            given = nn.functional.one_hot(given, site.info.n_experts)
        return rows(site.experts(hidden, given, torch.full((n, width), 1 / width, dtype=hidden.dtype)))

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


@every
def test_sites_are_what_the_config_says(family: Family) -> None:
    model = family.build()
    sites = find_sites(model)
    assert sorted(s.info.layer for s in sites) == sorted(routed_layers(model.config))
    assert [s.info.index for s in sites] == list(range(len(sites)))
    for site, routed in zip(sites, record(model), strict=True):
        assert site.info.scoring != "unknown"
        assert routed.ids.shape == routed.weights.shape == (len(routed.ids), site.info.top_k)
        assert int(routed.ids.max()) < site.info.n_classes and site.info.n_experts == (16 if family.name == "doge" else 8)
        k = getattr(model.config, "num_experts_per_tok", site.info.top_k)
        assert site.info.top_k == (k[site.info.layer] if isinstance(k, list) else k)


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
        assert len(routed.ids.unique()) > 2  # not vacuous: several experts were at work


@every
def test_recomputed_from_captured_ids_and_weights(family: Family) -> None:
    prove_recomputed(family.build())


@every
def test_perturbing_an_expert_changes_exactly_its_tokens(family: Family) -> None:
    prove_perturbed(family.build())


@every
def test_outputs_are_bit_equal_and_hooks_are_gone(family: Family) -> None:
    model = family.build()
    bare = run(model)
    with recording(model) as recorder:
        hooked = run(model)
    recorder.take()
    assert torch.equal(bare, hooked)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every
def test_scores_explain_the_choice_and_the_weights(family: Family) -> None:
    """By the table's entry alone: the chosen are the top k of the selection scores, and weights follow the scores."""
    model = family.build()
    for site, routed in zip(find_sites(model), record(model), strict=True):
        info = site.info
        given = routed.logits.flatten(0, -2)
        shares, selection, volume = router_scores(info, given)
        torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares)))
        assert info.router.get("gives") == "probabilities" or torch.isfinite(volume).all()
        if selection is not None:
            assert torch.equal(selection.topk(info.top_k).indices.sort(-1).values, routed.chosen.sort(-1).values)
        else:
            assert info.selection in ("hash", "group-limited top-k")
        if info.scoring == "sparsemixer":
            continue  # its weights are softmaxes over part of the scores, as the note says
        kept = (routed.ids >= 0) & (routed.ids < info.n_experts) if info.n_special and info.top_k == 1 else routed.ids >= 0
        raw = shares.gather(-1, routed.chosen)
        if hasattr(site.router, "per_expert_scale"):
            raw = raw * site.router.per_expert_scale[routed.ids]
        weights = routed.weights.float()
        torch.testing.assert_close((weights / weights.sum(-1, keepdim=True))[kept], (raw / raw.sum(-1, keepdim=True))[kept])
        if info.normalised is not None and not hasattr(site.router, "per_expert_scale"):
            sums = weights.sum(-1) / info.router.get("routed_scaling_factor", 1)
            assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4) == info.normalised


@every
def test_captured_as_a_trace_and_padding_leaves_no_mark(family: Family) -> None:
    model = family.build()
    if "input_ids" not in inputs(model):
        pytest.raises(AttributeError, capture, model, TOKENIZER, TEXTS).match("embed_tokens")
        return
    together = capture(model, TOKENIZER, TEXTS, batch_size=2)
    alone = capture(model, TOKENIZER, TEXTS, batch_size=1)
    for layer in together.layers:
        assert len(together.experts(layer.index)) == together.n_tokens(layer.stream) > 0
        assert np.array_equal(np.sort(together.experts(layer.index)), np.sort(alone.experts(layer.index)))
        np.testing.assert_allclose(np.sort(together.weights(layer.index)), np.sort(alone.weights(layer.index)), rtol=1e-4, atol=1e-5)
        scores = together.scores(layer.index)
        assert np.isfinite(scores.entropy).all() and (scores.entropy <= np.log(layer.n_classes) + 1e-5).all()
        assert np.isnan(scores.margin).all() if layer.selection in ("hash", "group-limited top-k") else (scores.margin >= 0).all()


# ---- what transformers ships ----------------------------------------------------------------------------------------------

# Folders with classes that look like routing, and why no family of the table covers them.
ELSEWHERE = MappingProxyType({
    "nllb_moe": "refused: its experts run the wrong ids in this release (test_routers.py)",
    "vitpose_backbone": "refused: the expert is picked by dataset index; vision only",
    "granite_docling": "a router of connector paths, not of experts",
})  # fmt: skip
TAKES_IDS = re.compile(r"top_k_index|topk_indices|selected_experts|router_indices|routing_weights|top_k_weights|topk_weights")


ROUTING_CLASS = re.compile(r"class \w*(Router|TopKGating|MoE\w*Gate|Experts|MoE|Moe)\(")


@pytest.fixture(scope="module")
def routing_classes() -> dict[str, set[str]]:
    """folder -> classes that route or execute routed experts, read from the source without importing it."""
    found: dict[str, set[str]] = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if TAKES_IDS.search(text) or ROUTING_CLASS.search(text) else ():
            if isinstance(node, ast.ClassDef):
                forward = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward"), None)
                takes = forward is not None and any(TAKES_IDS.fullmatch(a.arg) for a in forward.args.args)
                if takes or ROUTER_CLASS.search(node.name) or ROUTING_CLASS.match(f"class {node.name}("):
                    found.setdefault(path.parent.name, set()).add(node.name)
    return found


def test_every_family_of_transformers_is_in_the_table(routing_classes: dict[str, set[str]]) -> None:
    """A new family in a later release fails here until it has a line in families.py, or a reason why not."""
    tested = {f.folder or f.name for f in FAMILIES.values()}
    assert set(routing_classes) - tested == set(ELSEWHERE)
    assert len(FAMILIES) == 72  # and NLLB-MoE, refused


def test_every_router_class_of_transformers_is_known(routing_classes: dict[str, set[str]]) -> None:
    routers = {c for classes in routing_classes.values() for c in classes if ROUTER_CLASS.search(c)}
    known = set(ROUTERS) | set(REFUSED) | NOT_ROUTERS
    assert routers - known == set()
    built = {type(m).__name__ for f in FAMILIES.values() for s in find_sites(f.build()) for m in (s.router, s.block)}
    # Not built here: a class whose tower no text reaches, and one that its own model never uses.
    assert set(ROUTERS) - built == {"Dots3NoteVisionTopKRouter", "Qwen3OmniMoeTextTopKRouter"}
