"""All ways to run a model: what is recorded does not depend on them, or the recording says why it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from analysis.capture import CaptureError, capture, capture_parts
from analysis.recorder import recording
from analysis.routers import RouterError, find_sites

from . import tiny
from .families import FAMILIES, VOCABULARY, Family
from .proofs import prove_perturbed, prove_recomputed, record, run
from .test_families import every

TOKENIZER = tiny.tokenizer()
OWN_LOOP = {"dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers"}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def some(*names: str) -> Any:
    return pytest.mark.parametrize("family", [FAMILIES[n] for n in names], ids=names)


@every
def test_every_implementation_of_the_experts_is_recorded_alike(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family.build()
    switchable = [hasattr(s.experts, "has_gate") for s in find_sites(model)]
    if family.name in OWN_LOOP:  # one implementation, proved in test_families.py
        assert not any(switchable)
        return
    assert all(switchable)
    calls: list[str] = []
    for name in IMPLEMENTATIONS[1:]:
        original = ALL_EXPERTS_FUNCTIONS[name]
        counted = lambda *a, name=name, original=original, **k: calls.append(name) or original(*a, **k)  # noqa: E731
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, counted)
    model.set_experts_implementation("eager")
    expected = record(model)
    for name in IMPLEMENTATIONS[1:]:
        model.set_experts_implementation(name)
        bare = run(model)
        calls.clear()
        for one, same in zip(record(model), expected, strict=True):
            assert torch.equal(one.ids, same.ids)
            torch.testing.assert_close(one.weights, same.weights, rtol=1e-5, atol=2e-6)
        assert calls == [name] * len(expected)
        with recording(model) as recorder:
            assert torch.equal(run(model), bare)
        recorder.take()


@some("mixtral", "deepseek_v3", "gpt_oss", "inkling2", "zaya", "jamba")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_is_proved(family: Family, name: str) -> None:
    model = family.build()
    model.set_experts_implementation(name)
    prove_recomputed(model)
    prove_perturbed(model)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_proved_as_loaded(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    """As users load it: saved, then read in another dtype; some families keep their routers in float32."""
    family.build().save_pretrained(tmp_path)
    model = family.model_class.from_pretrained(tmp_path, dtype=dtype).eval()
    assert model.dtype == dtype
    bare = run(model)
    with recording(model) as recorder:
        assert torch.equal(run(model), bare)
    recorder.take()
    prove_recomputed(model, tolerance=0.03, broken=0.06)
    if dtype == torch.bfloat16:
        prove_perturbed(model, factor=50)  # so that a small weight's change is not rounded away


@some("mixtral", "deepseek_v3", "gpt_oss", "llama4", "jetmoe", "longcat_flash", "phimoe", "gemma4", "kolibri1", "zaya")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_real_tokens_alone(family: Family, side: str) -> None:
    model = family.build()
    ids = torch.randint(4, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(3))
    pad, real = (
        (nn.functional.pad, slice(4, None))
        if side == "left"
        else (lambda x, p, value: nn.functional.pad(x, p[::-1], value=value), slice(9))
    )
    mask = pad(torch.ones_like(ids), (4, 0), value=0)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), recording(model) as alone:
        model(input_ids=ids)
    with torch.no_grad(), recording(model) as padded:
        model(input_ids=pad(ids, (4, 0), value=0), attention_mask=mask, position_ids=places)
    for one, other in zip(alone.take(), padded.take(), strict=True):
        assert len(other[0].ids) == 13
        assert torch.equal(one[0].ids, other[0].ids[real])
        torch.testing.assert_close(one[0].weights, other[0].weights[real], rtol=1e-4, atol=1e-5)


@some("mixtral", "deepseek_v2", "deepseek_v3", "deepseek_v4", "gpt_oss", "llama4", "jetmoe", "longcat_flash", "zaya", "gemma4", "dbrx",
      "qwen3_next", "jamba", "nemotron_h", "minimax", "lfm2_moe", "kimi_linear", "phimoe")  # fmt: skip
def test_generation_with_a_cache_equals_one_forward(family: Family) -> None:
    model = family.build()
    made = capture(model, TOKENIZER, ["Il pleut"], new_tokens=4)
    ids = made.tokens["token_id"].to_pylist()
    assert made.tokens["phase"].to_pylist() == ["prefill"] * 8 + ["decode"] * (len(ids) - 8)
    with torch.no_grad(), recording(model) as recorder:
        model(input_ids=torch.tensor([ids]))
    for layer, forwards in zip(made.layers, recorder.take(), strict=True):
        assert np.array_equal(np.sort(made.experts(layer.index)), forwards[0].ids.sort(-1).values.numpy())


def test_doge_routes_generated_tokens_by_their_own_forward() -> None:
    """Its routing mixes the tokens of a forward, so generation and one forward differ: recorded as executed, and said."""
    model = FAMILIES["doge"].build()
    made = capture(model, TOKENIZER, ["Il pleut"], new_tokens=4)
    ids = made.tokens["token_id"].to_pylist()
    with torch.no_grad(), recording(model) as recorder:
        model(input_ids=torch.tensor([ids]))
    assert any(not np.array_equal(made.experts(x.index), f[0].ids.numpy()) for x, f in zip(made.layers, recorder.take(), strict=True))
    assert all("generation routes differently" in layer.note for layer in made.layers)


class Loaded:
    """What accelerate attaches to each module of layers on disk: weights are on the meta device except while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False)}
        self.original = module.forward
        self.post_forward(module)
        module._hf_hook = self
        module.forward = partial(self.forward, module)

    def pre_forward(self, module: nn.Module) -> None:
        module._parameters.update({n: nn.Parameter(p, requires_grad=False) for n, p in self.own.items()})

    def post_forward(self, module: nn.Module, output: Any = None) -> None:
        module._parameters.update({n: nn.Parameter(p.to("meta"), requires_grad=False) for n, p in self.own.items()})

    def forward(self, module: nn.Module, *given: Any, **named: Any) -> Any:
        self.pre_forward(module)
        output = self.original(*given, **named)
        self.post_forward(module)
        return output


def offloaded(model: nn.Module) -> None:
    """As from_pretrained(device_map=...) with every layer on disk; accelerate itself is not among the requirements."""
    for module in model.modules():
        if module._parameters:
            Loaded(module)


# These read a child's weights without calling it (Llama 4 only its embedding): torch returns uninitialised memory for that.
GARBAGE_OFFLOADED = {"dbrx", "jetmoe", "llama4", "longcat_flash"}


@every
def test_offloaded_weights_change_nothing_or_are_refused(family: Family) -> None:
    expected = record(family.build())
    model = family.build()
    offloaded(model)
    assert all(p.is_meta for p in model.parameters())
    if family.name in GARBAGE_OFFLOADED:
        with pytest.raises(CaptureError, match="reads weights while they are offloaded"):
            record(model)
        return
    for one, same in zip(record(model), expected, strict=True):
        assert torch.equal(one.ids, same.ids) and torch.equal(one.weights, same.weights)


def test_margin_is_undefined_where_the_correction_is_offloaded() -> None:
    model = FAMILIES["laguna"].build()
    offloaded(model)
    (part,) = capture_parts(model, TOKENIZER, ["Il pleut"])
    assert np.isnan(part.scores[0].margin).all() and np.isfinite(part.scores[0].entropy).all()


def test_skipped_and_zero_compute_experts_are_ids_from_e_upwards() -> None:
    model = FAMILIES["zaya"].build()
    find_sites(model)[0].router.balancing_biases[8] += 0.5  # so that some tokens skip
    skip = capture(model, TOKENIZER, ["Il pleut, il pleut"])
    experts, weights = skip.experts(0), skip.weights(0)
    assert (experts == 8).any() and (experts < 8).any() and not weights[experts == 8].any() and weights[experts < 8].all()
    zero = capture(FAMILIES["longcat_flash"].build(), TOKENIZER, ["Il pleut, il pleut"])
    assert (zero.experts(0) >= 8).any() and zero.weights(0)[zero.experts(0) >= 8].all()


def test_hooks_are_gone_after_an_exception() -> None:
    model = FAMILIES["mixtral"].build()
    with pytest.raises(ZeroDivisionError), recording(model):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def test_sites_that_run_out_of_order_are_an_error() -> None:
    model = FAMILIES["mixtral"].build()
    sites = find_sites(model)
    with pytest.raises(CaptureError, match="another order than the model lists them"), recording(model, sites[::-1]) as recorder:
        run(model)
        recorder.take()


def test_a_router_that_returns_no_scores_is_an_error() -> None:
    model = FAMILIES["mixtral"].build()
    gate = model.model.layers[0].mlp.gate
    original = gate.forward
    gate.forward = lambda hidden: ("no scores", *original(hidden)[1:])
    with pytest.raises(CaptureError, match="layers.0.mlp: its router returned no scores"):
        record(model)


def test_scores_for_another_number_of_experts_are_an_error() -> None:
    model = FAMILIES["mixtral"].build()
    gate = model.model.layers[0].mlp.gate
    original = gate.forward
    gate.forward = lambda hidden: (original(hidden)[0][:, :7], *original(hidden)[1:])
    with pytest.raises(RouterError, match="gave 7 scores per token for 8 experts"):
        capture(model, TOKENIZER, ["abc"])


def test_a_site_that_sees_part_of_the_tokens_is_an_error() -> None:
    model = FAMILIES["mixtral"].build()
    block = model.model.layers[1].mlp
    original = block.forward
    block.forward = lambda hidden: torch.cat([original(hidden[:, :2]), hidden[:, 2:]], dim=1)
    with pytest.raises(CaptureError, match="layers.1.mlp routed 2 of 3 tokens"):
        capture(model, TOKENIZER, ["abc"])


def test_experts_that_jetmoe_groups_otherwise_are_an_error() -> None:
    model = FAMILIES["jetmoe"].build()
    linear = model.model.layers[0].mlp.input_linear
    linear.register_forward_pre_hook(lambda m, given: (given[0], given[1][::-1]))
    with pytest.raises(RouterError, match="other group sizes than the router gave"):
        record(model)


def test_zaya_ids_changed_after_its_router_are_an_error() -> None:
    model = FAMILIES["zaya"].build()
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, given: (given[0], (given[1] + 1) % 8, given[2]))
    with pytest.raises((RouterError, CaptureError), match="other ids than"):
        record(model)


def test_doge_experts_looked_up_otherwise_are_an_error() -> None:
    model = FAMILIES["doge"].build()
    model.model.layers[0].mlp.down_embed.register_forward_pre_hook(lambda m, given: ((given[0] + 1) % 16,))
    with pytest.raises(RouterError, match="other experts than its product keys select"):
        record(model)


def test_llama4_scores_beyond_the_top_k_are_an_error() -> None:
    model = FAMILIES["llama4"].build()
    router = model.model.layers[1].feed_forward.router
    original = router.forward
    router.forward = lambda hidden: (original(hidden)[0] + 0.1, original(hidden)[1])
    with pytest.raises(RouterError, match="outside its top k"):
        record(model)
