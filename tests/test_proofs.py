"""The proofs pass on sound models and notice every fault put into one."""

from typing import Any

import pytest
import torch
from torch import nn

from analysis.capture import CaptureError
from analysis.proofs import DIFFERS, NOT_CHECKED, PASS, Proof, canary, verify_model
from analysis.routers import RouterError

from . import tiny

TOKENIZER = tiny.tokenizer()
FIRES, SAME, HOOKS = "every site fires once per forward", "the same input is routed the same", "outputs are the same with and without hooks"
OWN, LOOP = "its own experts, given the captured ids and weights", "a plain loop over the experts' weights"


def verdicts(proofs: tuple[Proof, ...]) -> dict[tuple[str, str], str]:
    return {(p.name, p.where): p.verdict for p in proofs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sound_models_pass(family: str, dtype: torch.dtype) -> None:
    model = tiny.build(family).to(dtype)
    found = verify_model(model, TOKENIZER)
    switch = family == "switch_transformers"  # its experts take a dispatch mask, so only the loop can be made
    assert [p.verdict for p in found] == [PASS] * 3 + [NOT_CHECKED if switch else PASS, PASS] * 2
    assert len({p.where for p in found if p.where}) == 2
    canary(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_every_experts_implementation_passes(family: str, implementation: str) -> None:
    model = tiny.build(family)
    model.set_experts_implementation(implementation)
    assert {p.verdict for p in verify_model(model, TOKENIZER)} == {PASS}


def test_first_and_last_site_of_many() -> None:
    from transformers import AutoModelForCausalLM, OlmoeConfig

    config = OlmoeConfig(**tiny.FAMILIES["olmoe"][1] | {"num_hidden_layers": 4})
    places = {p.where for p in verify_model(AutoModelForCausalLM.from_config(config).eval(), TOKENIZER) if p.name == LOOP}
    assert places == {"model.layers.0.mlp", "model.layers.3.mlp"}


def test_experts_that_execute_others_than_they_are_given() -> None:
    """As NLLB in this release: the call is right, what runs is not. Only the loop over the weights can tell."""
    model = tiny.build("olmoe")
    experts = model.model.layers[1].mlp.experts
    honest = experts.forward
    experts.forward = lambda hidden, ids, weights: honest(hidden, (ids + 1) % 8, weights)
    found = verdicts(verify_model(model, TOKENIZER))
    assert found[LOOP, "model.layers.1.mlp"] == DIFFERS
    assert found[LOOP, "model.layers.0.mlp"] == PASS and found[OWN, "model.layers.1.mlp"] == PASS


def test_experts_that_weigh_otherwise_than_they_are_told() -> None:
    model = tiny.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    honest = experts.forward
    experts.forward = lambda hidden, ids, weights: honest(hidden, ids, weights * 1.01)
    found = verdicts(verify_model(model, TOKENIZER))
    assert found[LOOP, "model.layers.0.mlp"] == DIFFERS


def test_experts_that_remember() -> None:
    """An output that depends on more than the captured call: the module itself, called again, gives another."""
    model = tiny.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    honest, calls = experts.forward, []
    experts.forward = lambda *given: (calls.append(1), honest(*given) * len(calls))[1]
    found = verdicts(verify_model(model, TOKENIZER))
    assert found[OWN, "model.layers.0.mlp"] == DIFFERS


def test_random_routing_is_noticed() -> None:
    model = tiny.build("olmoe")
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_pre_hook(lambda m, a: (torch.randn_like(a[0]),))
    found = {p.name: p for p in verify_model(model, TOKENIZER)}
    assert found[SAME].verdict == DIFFERS and "layers.1.mlp sent" in found[SAME].detail
    assert found[HOOKS].verdict == NOT_CHECKED
    with pytest.raises(CaptureError, match="cannot be captured exactly: model.layers.1.mlp"):
        canary(model)


def test_weights_that_change_are_noticed_though_ids_do_not() -> None:
    model = tiny.build("mixtral")
    calls: list[int] = []

    def other(module: nn.Module, given: Any, out: Any) -> Any:
        calls.append(1)
        return out[0], out[1] * (1 + len(calls) / 100), out[2]

    model.model.layers[0].mlp.gate.register_forward_hook(other)
    found = {p.name: p for p in verify_model(model, TOKENIZER)}
    assert found[SAME].verdict == DIFFERS and "other weights" in found[SAME].detail


def test_outputs_that_hooks_change_are_noticed() -> None:
    model = tiny.build("olmoe")
    honest = model.forward

    def watched(**given: Any) -> Any:
        out = honest(**given)
        hooked = any(m._forward_pre_hooks for m in model.modules())
        out.logits = out.logits + hooked
        return out

    model.forward = watched
    found = {p.name: p for p in verify_model(model, TOKENIZER)}
    assert found[HOOKS].verdict == DIFFERS and found[SAME].verdict == PASS


@pytest.mark.parametrize("times", [0, 2])
def test_a_site_that_does_not_fire_once(times: int) -> None:
    model = tiny.build("olmoe")
    block = model.model.layers[1].mlp
    once = block.forward
    block.forward = lambda hidden: hidden if times == 0 else once(hidden) + once(hidden)
    found = verify_model(model, TOKENIZER)
    assert found[0].verdict == DIFFERS and f"routed {times} times" in found[0].detail
    assert {p.verdict for p in found[1:]} == {NOT_CHECKED}
    with pytest.raises(CaptureError, match="cannot be captured exactly"):
        canary(model)


def test_equal_experts_prove_nothing() -> None:
    """Where a wrong id would go unnoticed, agreement is not called a pass."""
    model = tiny.build("olmoe")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(p[:1].expand_as(p).clone())
    found = [p for p in verify_model(model, TOKENIZER) if p.where == "model.layers.0.mlp"]
    assert {p.verdict for p in found} == {NOT_CHECKED} and all("proves nothing" in p.detail for p in found)


def test_outputs_that_are_not_numbers_differ() -> None:
    model = tiny.build("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(torch.nan)
    found = verdicts(verify_model(model, TOKENIZER))
    assert found[LOOP, "model.layers.1.mlp"] == DIFFERS


class OtherExperts(nn.Module):
    """Keeps the contract, lays out its weights in a way of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(p.detach().flip(0)) for p in (inner.gate_up_proj, inner.down_proj))
        self.hidden = (inner,)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.hidden[0](hidden_states, top_k_index, top_k_weights)
        return out


def test_an_unknown_layout_is_not_called_a_pass() -> None:
    model = tiny.build("olmoe")
    block = model.model.layers[0].mlp
    block.experts = OtherExperts(block.experts)
    found = {(p.name, p.where): p for p in verify_model(model, TOKENIZER)}
    assert found[OWN, "model.layers.0.mlp"].verdict == PASS
    loop = found[LOOP, "model.layers.0.mlp"]
    assert loop.verdict == NOT_CHECKED and "how OtherExperts lays out its weights is unknown" in loop.detail


def test_quantised_weights_are_not_read_as_numbers() -> None:
    model = tiny.build("olmoe")
    experts = model.model.layers[0].mlp.experts
    honest, kept = experts.forward, experts.down_proj.detach().clone()
    small = nn.Parameter(kept.to(torch.float8_e4m3fn), requires_grad=False)

    def unpacked(*given: Any) -> Any:
        experts.down_proj = nn.Parameter(kept)
        out = honest(*given)
        experts.down_proj = small
        return out

    experts.down_proj, experts.forward = small, unpacked
    found = {(p.name, p.where): p for p in verify_model(model, TOKENIZER)}
    assert found[OWN, "model.layers.0.mlp"].verdict == PASS
    assert found[LOOP, "model.layers.0.mlp"].detail == "the weights of OlmoeExperts are quantised"


def test_training_mode_and_dense_models_are_named_errors() -> None:
    with pytest.raises(CaptureError, match="training mode"):
        verify_model(tiny.build("olmoe").train(), TOKENIZER)
    with pytest.raises(CaptureError, match="training mode"):
        canary(tiny.build("olmoe").train())
    with pytest.raises(RouterError, match="no router"):
        verify_model(nn.Linear(2, 2), TOKENIZER)


def test_a_model_that_cannot_run_is_a_named_error() -> None:
    model = tiny.build("olmoe")
    model.lm_head = nn.Linear(3, 4)
    with pytest.raises(CaptureError, match="cannot run at all \\(RuntimeError: mat1 and mat2"):
        verify_model(model, TOKENIZER)
    with pytest.raises(CaptureError, match="cannot run at all"):
        canary(model)
