"""How each kind of router scores and selects: the one table that a new family is entered in.

Most families need no entry to be captured exactly; an entry says what the scores mean, and a family that departs from
``experts(hidden, ids, weights)`` has an ``adapter`` here. Nothing in this module walks a model: see routers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .trace import NO_EXPERT


class RouterError(RuntimeError):
    """The routing of this model cannot be recorded exactly; the message says what was seen and what to do."""


@dataclass(frozen=True)
class Flaw:
    """A contradiction that the device looks for while the forward goes on: ``found`` bool [] there; true means ``error``."""

    found: Tensor
    error: Exception


@dataclass(frozen=True)
class Routed:
    """What one forward sent to one site's experts, before padding is taken out.

    ids, chosen  int64 [N, k] (-1 = none); weights [N, k] in the dtype executed; logits [N, C] or None. Void where a flaw is found.
    """

    ids: Tensor
    weights: Tensor
    chosen: Tensor
    logits: Tensor | None
    flaws: tuple[Flaw, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a site's experts: its arguments by parameter name, and what the router had returned before it.

    ids, weights  [N, k] as handed over, where the call follows the contract; else None. logits [N, C] or None.
    """

    router: Any
    block: Any
    output: Any
    arguments: Mapping[str, Any]
    ids: Tensor | None
    weights: Tensor | None
    logits: Tensor | None


def differs(a: Tensor, b: Tensor) -> Tensor:
    """bool [] on their device: not ``torch.equal``, which waits for the device to tell."""
    return (a != b).any() if a.shape == b.shape else torch.ones((), dtype=torch.bool, device=a.device)


def _as_given(call: Call) -> Routed:
    if call.ids is None or call.weights is None:
        raise RouterError(f"{type(call.router).__name__}: its experts were called without ids and weights; it needs an adapter")
    return Routed(call.ids, call.weights, call.ids, call.logits)


def _scores_of(call: Call) -> Tensor:
    if call.logits is None:
        raise RouterError(f"{type(call.router).__name__} gave no scores, so what its experts execute cannot be told")
    return call.logits.flatten(0, -2)


def _after_capacity(call: Call) -> Routed:
    """Switch: a one-hot dispatch mask [N, 1, E] after native capacity; an all-zero row was dropped."""
    logits, given = _scores_of(call), _as_given(call)
    hot = given.ids.flatten(0, -2)
    chosen = logits.softmax(-1, dtype=torch.float32).argmax(-1, keepdim=True)
    kept = hot.sum(-1, keepdim=True) > 0
    ids = torch.where(kept, hot.argmax(-1, keepdim=True), NO_EXPERT)
    wrong = Flaw(
        ((ids != chosen) & kept).any(), RouterError("the Switch dispatch mask disagrees with the argmax of its router's probabilities")
    )
    return Routed(ids, torch.where(kept, given.weights.reshape(-1, 1), 0), chosen, logits, (wrong,))


def _scaled_input(call: Call) -> Routed:
    """Llama 4: every expert runs on every token, its input multiplied by a score [N, E] that is 0 unless chosen."""
    scores, logits = call.output[0].detach(), _scores_of(call)
    ids = logits.topk(int(call.router.top_k), dim=-1).indices
    wrong = Flaw(scores.scatter(1, ids, 0).any(), RouterError("the Llama 4 router gave a score to an expert outside its top k"))
    return Routed(ids, scores.gather(1, ids), ids, logits, (wrong,))


def _sorted_by_expert(call: Call) -> Routed:
    """JetMoE: assignments sorted by expert; position p of the sorted list is slot ``order[p]`` of [N, k] flattened."""
    order, _, gates, sizes, logits = call.output
    if list(call.arguments["expert_size"]) != list(sizes):
        raise RouterError("the JetMoE experts got other group sizes than the router gave")
    counts = torch.tensor(sizes).to(order.device, non_blocking=True)
    experts = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), counts, output_size=len(order))
    k = int(call.router.top_k)
    ids = torch.empty_like(order).scatter_(0, order, experts).view(-1, k)
    weights = torch.empty_like(gates).scatter_(0, order, gates).view(-1, k)
    return Routed(ids, weights.detach(), ids, logits.detach().clone())


def _product_keys(call: Call) -> Routed:
    """Doge: an expert is a pair of keys; ids are read where its embedding is looked up. logits [N, 2 keys]."""
    n = call.arguments["input"].shape[0]
    halves = call.output.detach().view(2, n, -1)
    (first, second), (rows, columns) = halves.topk(halves.shape[-1], dim=-1)
    sums = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(1)
    pairs = (rows.unsqueeze(-1) * halves.shape[-1] + columns.unsqueeze(-2)).flatten(1)
    scores, at = sums.topk(int(call.block.top_k), dim=-1)
    ids = pairs.gather(-1, at)
    wrong = Flaw(differs(ids, call.arguments["input"]), RouterError("Doge looked up other experts than its product keys select"))
    weights = scores.softmax(-1)
    if call.block.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routed(ids, weights, ids, torch.cat([halves[0], halves[1]], dim=-1), (wrong,))


def _with_skip(call: Call) -> Routed:
    """ZAYA: the skip class E reaches the experts as id 0 with weight 0; the biased probabilities tell it apart."""
    given, logits = _as_given(call), _scores_of(call)
    biased = logits.softmax(-1).float() + call.router.balancing_biases
    ids = biased.topk(given.ids.shape[1], dim=-1).indices
    skipped = ids == logits.shape[-1] - 1
    found = differs(ids.masked_fill(skipped, 0), given.ids) | given.weights.masked_fill(~skipped, 0).any()
    wrong = Flaw(found, RouterError("the ZAYA experts got other ids than its biased probabilities select"))
    return Routed(ids, given.weights, ids, logits, (wrong,))


def _configured(attribute: str, **renamed: str) -> Callable[[nn.Module, Any], str]:
    """A score function that the configuration names; ``renamed`` maps its words to ours."""

    def scoring(router: nn.Module, config: Any) -> str:
        named = getattr(router, attribute, None) or getattr(config, attribute, None)
        return renamed.get(str(named), str(named))

    return scoring


@dataclass(frozen=True)
class RouterKind:
    """What is known of one router class.

    scoring     score function, or how the configuration names it
    selection   rule by which scores become experts
    normalised  weights of a token sum to 1 (before scaling); None: as the configuration's norm_topk_prob says
    logits_at   where the scores stand in the router's output; ``ids_at`` the ids, None where it gives none
    gives       what stands at ``logits_at``: logits or probabilities
    bias_on     what a correction bias is added to before selection: scores or logits
    group_by    how a group of experts is scored, where groups are limited
    weights_on  what the weights multiply: the experts' output or input
    scaled_by   attribute of the block, a factor it applies to the experts' sum afterwards
    boundary    child of the block whose call is the execution, where that is not the contract; ``experts`` hold the weights
    router      child of the block that scores, where the entry names the block's class
    mixes       a token's routing depends on the other tokens of the forward, so each document runs alone
    """

    scoring: str | Callable[[nn.Module, Any], str]
    selection: str = "top-k"
    normalised: bool | None = None
    logits_at: int = 0
    ids_at: int | None = 2
    gives: str = "logits"
    bias_on: str = "scores"
    group_by: str = "sum of its best two"
    weights_on: str = "output"
    scaled_by: str = ""
    boundary: str = ""
    experts: tuple[str, ...] = ()
    router: str = ""
    mixes: bool = False
    note: str = ""
    adapter: Callable[[Call], Routed] = _as_given


UNKNOWN = RouterKind("unknown")
_SOFTMAX = RouterKind("softmax")
_TO_ONE = RouterKind("softmax", normalised=True)
_OF_TOP = RouterKind("softmax-topk", normalised=True)
_RAW = RouterKind("softmax", normalised=False)
_BEST_IN_GROUP = replace(_RAW, group_by="its best")
_SIGMOID = RouterKind("sigmoid")
_SIGMOID_TO_ONE = RouterKind("sigmoid", normalised=True)
_SCALED = replace(_SIGMOID_TO_ONE, scaled_by="routed_scaling_factor")
_CONFIGURED = RouterKind(_configured("scoring_func"), normalised=True)
_PROBABILITIES = RouterKind("softmax", normalised=True, gives="probabilities",
                            note="weights are scaled per expert after normalisation; a dense MLP runs beside the experts")  # fmt: skip

ROUTERS: Mapping[str, RouterKind] = MappingProxyType(
    {
        **dict.fromkeys(
            ("FlexOlmoTopKRouter", "MellumTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter",
             "Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3OmniMoeTalkerTextTopKRouter", "Qwen4ExpTextTopKRouter", "Mistral4TopkRouter"),
            _SOFTMAX),
        **dict.fromkeys(
            ("MixtralTopKRouter", "MiniMaxTopKRouter", "HunYuanMoEV1Gate", "Qwen3_5MoeTopKRouter", "Qwen3OmniMoeTextTopKRouter",
             "Qwen3VLMoeTextTopKRouter", "MistralLarge4TextTopkRouter", "Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter"), _TO_ONE),
        **dict.fromkeys(
            ("AriaTextTopKRouter", "GptOssTopKRouter", "GraniteMoeTopKRouter", "GraniteMoeSWATopKRouter", "GraniteMoeHybridTopKRouter",
             "GraniteMoeSharedTopKRouter"), _OF_TOP),
        **dict.fromkeys(
            ("AXK1TopkRouter", "AXK2TopkRouter", "BailingHybridTopkRouter", "DeepseekV3TopkRouter", "DeepseekV32TopkRouter",
             "Dots1TopkRouter", "Dots3NoteTextTopkRouter", "ExaoneMoeTopkRouter", "FlintTopKRouter", "Glm4MoeTopkRouter",
             "Glm4MoeLiteTopkRouter", "Glm4vMoeTextTopkRouter", "Glm5NextTextTopkRouter", "GlmMoeDsaTopkRouter", "HYV4TopkRouter",
             "KimiLinearTopkRouter", "Lfm2MoeTopKRouter", "MiMoV2FlashTopkRouter", "NemotronHTopkRouter", "SolarOpenTopkRouter"), _SIGMOID),
        **dict.fromkeys(
            ("AfmoeTokenChoiceRouter", "Dots3NoteVisionTopKRouter", "HYV3TopKRouter", "MiniMaxM2TopKRouter", "MuseSparkTopkRouter"),
            _SIGMOID_TO_ONE),
        **dict.fromkeys(("LagunaTopKRouter", "MiniMaxM3VLTopKRouter", "Step3p7TopKRouter"), _SCALED),
        **dict.fromkeys(("DeepseekV2TopkRouter", "DeepseekOcr2TextTopkRouter", "UnlimitedOcrTextTopkRouter"), _BEST_IN_GROUP),
        **dict.fromkeys(("Gemma4TextRouter", "DiffusionGemmaTextRouter"), _PROBABILITIES),
        **dict.fromkeys(("DeepseekV4TopKRouter", "Inkling2TopKRouter"), _CONFIGURED),
        "DeepseekV4HashRouter": replace(_CONFIGURED, selection="hash", note="experts follow from the token id by a fixed table"),
        "BeamTopKRouter": replace(_SIGMOID, scaled_by="routed_scaling_factor"),
        "Cohere2MoeTopKRouter": RouterKind(_configured("expert_selection_fn", softmax="softmax-topk")),
        "DbrxRouter": replace(_SOFTMAX, ids_at=None),
        "DogeCDMoE": RouterKind(
            "product-keys", "product keys", normalised=True, ids_at=None, router="router_gate", boundary="down_embed",
            experts=("down_embed", "up_embed"), mixes=True, adapter=_product_keys,
            note="routing mixes the tokens of one forward pass: generation routes differently"),
        "InklingTopkRouter": RouterKind(
            "sigmoid", normalised=False, note="weights sum to the scale together with those of the shared experts"),
        "JambaTopKRouter": _RAW,
        "JetMoeTopKGating": replace(
            _OF_TOP, logits_at=4, ids_at=None, boundary="input_linear", experts=("input_linear", "output_linear"), adapter=_sorted_by_expert),
        "Kolibri1TopKRouter": replace(_SIGMOID, bias_on="logits"),
        "Llama4Router": RouterKind(
            "sigmoid", normalised=False, logits_at=1, ids_at=None, weights_on="input", boundary="experts", experts=("experts",),
            adapter=_scaled_input, note="the weight multiplies the expert's input, not its output"),
        "LongcatFlashTopkRouter": _RAW,
        "OpenAIPrivacyFilterTopKRouter": replace(_OF_TOP, normalised=False, scaled_by="num_experts", note="weights sum to 1/k"),
        "PhimoeTopKRouter": RouterKind(
            "sparsemixer", normalised=False, note="each weight is a softmax over the experts near the best one left; they sum to about 2"),
        "SwitchTransformersTop1Router": RouterKind(
            "softmax", "top-1 with capacity", normalised=False, logits_at=2, ids_at=0, adapter=_after_capacity),
        "ZayaRouter": replace(_RAW, ids_at=None, adapter=_with_skip),
    }
)  # fmt: skip
REFUSED = MappingProxyType(
    {
        "NllbMoeTop2Router": "this release of transformers runs experts 0 and 1 for every token whatever the router"
        " chose (a mask is read as expert ids), so there is no routing to show",
        "VitPoseNaiveMoe": "its expert is picked by the dataset index, not by a router",
    }
)
# Called routers, but they choose no experts for tokens.
NOT_ROUTERS = frozenset({"GraniteDoclingDensityRouter"})
