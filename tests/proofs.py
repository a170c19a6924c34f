"""Two proofs that what was recorded is what the model executes, sharing no path with the recording.

Recompute what a site returned from the captured ids and weights; change one expert's weights and see whose output changes.
Families that depart from the contract are recomputed by the product's own analysis/recompute.py, which the second proof
guards. For all others ``by_contract`` is kept apart from the product's loop over weights on purpose: it calls the model's
experts one expert at a time and knows no layout, so neither can hide a mistake of the other.
"""

from typing import Any

import torch
from torch import Tensor, nn

from analysis.recompute import Execution, Seen, combined, rows, surroundings, watching
from analysis.recompute import execution as departing
from analysis.recorder import recording
from analysis.routers import Routed, Site, find_sites

from .families import inputs


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


def of_experts(model: nn.Module, site: Site, seen: Seen) -> Tensor:
    return rows(seen[site.experts][1])


def execution(site: Site) -> Execution:
    return departing(site) or Execution(by_contract, of_experts)


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
        how = execution(site)
        with watching(surroundings(model, site), seen):
            run(model)
        with torch.no_grad():
            out = how.observed(model, site, seen)
            assert relative(how.recompute(site, seen, routed.ids, routed.weights), out) <= tolerance
            wrong = routed.ids.clone()
            real = (wrong >= 0) & (wrong < site.info.n_experts)
            at, slot = divmod(int((routed.weights.float().abs() * real).argmax()), site.info.top_k)
            wrong[at, slot] = next(e for e in range(site.info.n_experts) if e not in wrong[at].tolist())
            assert relative(how.recompute(site, seen, wrong, routed.weights), out) > broken


def prove_perturbed(model: Any, factor: float = 3) -> None:
    """Other weights for one expert change exactly the tokens captured on it."""
    for site, routed in zip(find_sites(model), record(model), strict=True):
        seen: Seen = {}
        how = execution(site)
        with watching(surroundings(model, site), seen), torch.no_grad():
            run(model)
            before = how.observed(model, site, seen).clone()
            for e in range(site.info.n_experts):
                part = last_weights(site, e)
                kept = part.clone()
                part.mul_(factor)
                run(model)
                part.copy_(kept)
                changed = (how.observed(model, site, seen) != before).any(-1)
                assert torch.equal(changed, (routed.ids == e).any(-1)), (site.info.name, e)
        assert len(routed.ids.unique()) >= 2  # not vacuous: more than one expert was at work
