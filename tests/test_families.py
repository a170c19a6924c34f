"""Every family: what is captured is what the model executes, and the table says of its scores what is true.

The proofs are in proofs.py; here they run over all families, with what transformers ships compared to the table.
"""

import ast
import re
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from analysis.capture import capture
from analysis.families import NOT_ROUTERS, REFUSED, ROUTERS
from analysis.recorder import recording
from analysis.routers import ROUTER_CLASS, SCORES, find_sites, router_scores
from analysis.trace import LayerInfo

from . import tiny
from .families import FAMILIES, Family, inputs, routed_layers
from .proofs import prove_perturbed, prove_recomputed, record, run

TEXTS = ("def f(x): return x", "Il pleut.")
TOKENIZER = tiny.tokenizer()
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


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


def raw_scores(info: LayerInfo, logits: Tensor) -> Tensor:
    """Scores [N, C] of an entry, before any division."""
    if info.router.get("gives") == "probabilities":
        assert torch.allclose(logits.sum(-1), torch.ones(len(logits))) == info.scoring.startswith("softmax")
        return logits
    return SCORES[info.scoring](logits)


def in_groups(info: LayerInfo, scores: Tensor) -> Tensor:
    """Ids chosen among the best ``topk_group`` groups, by the settings alone."""
    rule = info.router
    if "bias" in rule:
        assert rule["bias_on"] == "scores"
        scores = scores + torch.tensor(rule["bias"])
    grouped = scores.view(len(scores), rule["num_group"], -1)
    best = grouped.amax(-1) if rule["group_by"] == "its best" else grouped.topk(2).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(rule["topk_group"]).indices, True)
    return scores.masked_fill(~kept.repeat_interleave(grouped.shape[-1], 1), -torch.inf).topk(info.top_k).indices


@every
def test_scores_explain_the_choice(family: Family) -> None:
    """By the table's entry alone: the chosen are the top k of the selection scores, of all or of the groups let through."""
    model = family.build()
    for site, routed in zip(find_sites(model), record(model, 40), strict=True):
        info, given = site.info, routed.logits.flatten(0, -2)
        shares, selection, volume = router_scores(info, given)
        torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares)))
        assert torch.isnan(volume).all() if info.router.get("gives") == "probabilities" else torch.isfinite(volume).all()
        assert (selection is None) == (info.selection in ("hash", "group-limited top-k"))
        if info.selection == "hash":
            assert torch.equal(routed.ids, site.router.tid2eid[inputs(model, 40)["input_ids"].flatten()])
            continue
        chosen = in_groups(info, raw_scores(info, given)) if selection is None else selection.topk(info.top_k).indices
        assert torch.equal(chosen.sort(-1).values, routed.chosen.sort(-1).values)


@every
def test_scores_explain_the_weights(family: Family) -> None:
    """Weights are the chosen scores, divided by their sum where ``normalised``, times the scaling."""
    model = family.build()
    for site, routed in zip(find_sites(model), record(model, 40), strict=True):
        info, given = site.info, routed.logits.flatten(0, -2)
        kept = (routed.weights != 0) if info.top_k == 1 else torch.ones_like(routed.ids, dtype=torch.bool)
        weights = routed.weights.float() / info.router.get("routed_scaling_factor", 1)
        if hasattr(site.router, "per_expert_scale"):
            weights = weights / site.router.per_expert_scale[routed.ids]
        raw = router_scores(info, given)[0] if info.scoring == "product-keys" else raw_scores(info, given)
        raw = raw.gather(-1, routed.chosen)
        sums = weights.sum(-1, keepdim=True)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4) == info.normalised
        if info.scoring == "sparsemixer":  # softmaxes over part of the scores, as the note says
            assert "softmax over the experts near the best" in info.note
            continue
        torch.testing.assert_close((weights / sums)[kept], (raw / raw.sum(-1, keepdim=True))[kept])
        if not info.normalised and family.name not in ("inkling", "openai_privacy_filter"):  # their notes say what else divides
            torch.testing.assert_close(weights[kept], raw[kept])


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
