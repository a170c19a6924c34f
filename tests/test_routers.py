from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from analysis.capture import capture
from analysis.families import UNKNOWN
from analysis.routers import RouterError, find_sites

from . import tiny
from .families import FAMILIES, Family

# What LayerInfo must say of one site of a family, rule by rule.
FACTS = (
    ("mixtral", 0, {"scoring": "softmax", "selection": "top-k", "normalised": True, "n_shared": 0, "weights_on": "output"}),
    ("gpt_oss", 0, {"scoring": "softmax-topk", "normalised": True}),
    ("phimoe", 0, {"scoring": "sparsemixer", "normalised": False}),
    ("deepseek_v2", 0, {"scoring": "softmax", "selection": "group-limited top-k", "normalised": False, "layer": 1, "n_shared": 1}),
    ("deepseek_v3", 0, {"scoring": "sigmoid", "selection": "group-limited top-k", "normalised": True, "layer": 1, "n_shared": 1}),
    ("deepseek_v4", 0, {"scoring": "sqrtsoftplus", "selection": "hash"}),
    ("deepseek_v4", 1, {"scoring": "sqrtsoftplus", "selection": "top-k"}),
    ("cohere2_moe", 0, {"scoring": "softmax-topk", "scaled_after": 0.5}),
    ("laguna", 0, {"scoring": "sigmoid", "scaled_after": 2.5, "n_shared": 1, "shared_gate": False}),
    ("qwen2_moe", 0, {"n_shared": 1, "shared_gate": True, "normalised": False}),
    ("granitemoeshared", 0, {"n_shared": 1, "shared_gate": False}),
    ("ernie4_5_vl_moe", 0, {"n_shared": 1, "name": "layers.1.mlp.text_moe"}),
    ("hunyuan_v1_moe", 0, {"top_k": 2}),
    ("hunyuan_v1_moe", 1, {"top_k": 3}),
    ("jetmoe", 0, {"stack": "attention", "stream": "decoder", "layer": 0}),
    ("jetmoe", 1, {"stack": "decoder", "stream": "decoder", "layer": 0}),
    ("llama4", 0, {"weights_on": "input", "scoring": "sigmoid", "layer": 1, "n_shared": 1}),
    ("longcat_flash", 0, {"n_experts": 8, "n_special": 4, "n_classes": 12}),
    ("zaya", 0, {"n_experts": 8, "n_special": 1, "top_k": 1}),
    ("doge", 0, {"scoring": "product-keys", "selection": "product keys", "n_experts": 16, "top_k": 3}),
    ("switch_transformers", 0, {"stack": "encoder", "stream": "encoder", "selection": "top-1 with capacity", "native_capacity": 3}),
    ("switch_transformers", 1, {"stack": "decoder", "stream": "decoder", "native_capacity": 3}),
)


@pytest.mark.parametrize(("family", "site", "facts"), FACTS, ids=[f"{f}-{i}" for f, i, _ in FACTS])
def test_layer_info_says_how_a_site_routes(family: str, site: int, facts: dict[str, Any]) -> None:
    info = find_sites(FAMILIES[family].build())[site].info
    assert {name: getattr(info, name) for name in facts} == facts


def test_settings_of_a_what_if() -> None:
    v3 = find_sites(tiny.build("deepseek_v3"))[0].info.router
    assert (v3["num_group"], v3["topk_group"], v3["group_by"], v3["routed_scaling_factor"]) == (4, 2, "sum of its best two", 2.5)
    assert len(v3["bias"]) == 8 and v3["bias_on"] == "scores"
    assert find_sites(FAMILIES["kolibri1"].build())[0].info.router["bias_on"] == "logits"
    assert find_sites(FAMILIES["deepseek_v2"].build())[0].info.router["group_by"] == "its best"
    assert "num_group" not in find_sites(FAMILIES["deepseek_v2"].build(topk_method="greedy"))[0].info.router


def test_experts_may_differ_in_number_from_layer_to_layer() -> None:
    model = FAMILIES["mixtral"].build()
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(FAMILIES["mixtral"].config(num_local_experts=5, num_experts_per_tok=3))
    assert [(s.info.n_experts, s.info.top_k) for s in find_sites(model)] == [(8, 2), (5, 3)]


def test_a_router_missing_from_the_table_has_no_scores_but_its_ids() -> None:
    model = FAMILIES["mixtral"].build()
    for layer in model.model.layers:
        gate = layer.mlp.gate
        gate.__class__ = type("NobodyTopKRouter", (type(gate),), {})
    info = find_sites(model)[0].info
    assert info.scoring == "unknown" and "scores of NobodyTopKRouter are not known" in info.note
    trace = capture(model, tiny.tokenizer(), ["Il pleut"])
    assert np.isnan(trace.scores(0).entropy).all() and (trace.experts(0) >= 0).all()


def test_experts_of_a_vision_tower_are_left_out() -> None:
    model = FAMILIES["ernie4_5_vl_moe"].build()
    assert "layers.1.mlp.vision_moe.experts" in dict(model.named_modules())
    assert [s.info.name for s in find_sites(model)] == ["layers.1.mlp.text_moe"]


# Multimodal models at their default sizes: how many sites their text reaches, and where the first one is.
WHOLE = (
    ("aria", "AriaForConditionalGeneration", 32, "model.language_model.layers.0.mlp"),
    ("dots3_note", "Dots3NoteForConditionalGeneration", 45, "model.language_model.layers.1.mlp"),
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", 27, "model.language_model.layers.1.mlp.text_moe"),
    ("glm4v_moe", "Glm4vMoeForConditionalGeneration", 45, "model.language_model.layers.1.mlp"),
    ("glm5_next", "Glm5NextForConditionalGeneration", 42, "model.language_model.layers.3.mlp"),
    ("inkling", "InklingForConditionalGeneration", 66, "model.language_model.layers.0.mlp"),
    ("inkling2", "Inkling2ForConditionalGeneration", 48, "model.language_model.layers.0.mlp"),
    ("kimi_k25", "Kimi_K25ForConditionalGeneration", 58, "model.language_model.layers.3.mlp"),
    ("llama4", "Llama4ForConditionalGeneration", 48, "language_model.model.layers.0.feed_forward"),
    ("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", 60, "model.language_model.layers.0.mlp"),
    ("mistral_large4", "MistralLarge4ForConditionalGeneration", 71, "model.language_model.layers.1.mlp"),
    ("muse_spark", "MuseSparkForConditionalGeneration", 62, "model.language_model.layers.0.mlp"),
    ("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3", 1, "language_model.model.layers.1.mixer"),
    ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", 40, "model.language_model.layers.0.mlp"),
    ("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration", 28, "model.language_model.layers.0.mlp"),
    ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", 24, "model.language_model.layers.0.mlp"),
    ("step3p7", "Step3p7ForConditionalGeneration", 42, "model.language_model.layers.3.mlp"),
    ("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", 11, "model.language_model.layers.1.mlp"),
)  # fmt: skip


@pytest.mark.parametrize(("folder", "name", "n", "first"), WHOLE, ids=[w[0] for w in WHOLE])
def test_whole_multimodal_models_show_the_sites_of_their_text(folder: str, name: str, n: int, first: str) -> None:
    """Sizes of the class defaults, on the meta device: nothing is allocated."""
    kind = Family(folder, name).model_class
    with torch.device("meta"):
        model = kind._from_config(kind.config_class())
    sites = find_sites(model)
    assert (len(sites), sites[0].info.name) == (n, first)
    assert {s.info.stream for s in sites} == {"decoder"} and not any(s.kind is UNKNOWN for s in sites)


@pytest.mark.parametrize(("family", "name", "vision"), [
    ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16,
                                                             "out_hidden_size": 32, "deepstack_visual_indexes": [0]}),
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}),
])  # fmt: skip
def test_text_through_a_whole_model_routes_as_through_its_tower(family: str, name: str, vision: dict[str, Any]) -> None:
    tower = FAMILIES[family].build()
    kind = Family(family, name).model_class
    whole = kind._from_config(kind.config_class(text_config=tower.config.to_dict(), vision_config=vision)).float().eval()
    whole.model.language_model.load_state_dict(tower.state_dict())
    texts = ["Il pleut.", "def f(x)"]
    through, alone = (capture(m, tiny.tokenizer(), texts) for m in (whole, tower))
    assert through.layers and all(np.array_equal(through.experts(x.index), alone.experts(x.index)) for x in through.layers)
    assert through.tokens["loss"].null_count == 2 and alone.tokens["loss"].null_count == alone.tokens.num_rows  # no language head


def test_a_table_entry_that_does_not_fit_its_model() -> None:
    model = FAMILIES["jetmoe"].build()
    del model.model.layers[0].mlp.output_linear
    with pytest.raises(RouterError, match="mlp has no output_linear: the entry of JetMoeTopKGating"):
        find_sites(model)


def test_no_routers_is_said_plainly() -> None:
    with pytest.raises(RouterError, match="no router layers"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))


def test_dense_configuration_of_a_moe_family() -> None:
    with pytest.raises(RouterError, match="all its layers are dense"):
        find_sites(FAMILIES["qwen3_moe"].build(mlp_only_layers=[0, 1]))


def test_nllb_is_refused_with_the_reason() -> None:
    from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig

    config = NllbMoeConfig(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=4,
                           encoder_sparse_step=1, decoder_sparse_step=1)  # fmt: skip
    with pytest.raises(RouterError, match="experts 0 and 1 for every token"):
        find_sites(AutoModelForSeq2SeqLM.from_config(config))


def test_an_expert_picked_by_data_set_is_no_routing() -> None:
    from transformers import VitPoseBackbone, VitPoseBackboneConfig

    config = VitPoseBackboneConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=3, part_features=4,
                                   image_size=[32, 32], patch_size=[16, 16])  # fmt: skip
    with pytest.raises(RouterError, match="picked by the dataset index"):
        find_sites(VitPoseBackbone(config))


def test_experts_without_a_router_beside_them() -> None:
    model = tiny.build("olmoe")
    block = model.model.layers[0].mlp
    block.gate_moved, block.gate = nn.Identity(), nn.Identity()
    with pytest.raises(RouterError, match="0 routers beside them.*Identity"):
        find_sites(model)


def compile_wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compile_in_place(model: Any) -> Any:
    model.model.layers[1].compile(backend="eager")
    return model


def compile_forward(model: Any) -> Any:
    block = model.model.layers[1].mlp
    block.forward = torch.compile(block.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compile_wrapped, compile_in_place, compile_forward])
def test_compiled_model_is_refused(compiled: Any) -> None:
    with pytest.raises(RouterError, match="compiled: load the model again and capture before torch.compile"):
        find_sites(compiled(tiny.build("olmoe")))
