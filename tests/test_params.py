"""Sizes from configs alone against the counts their publishers state, against live models, and over broken configs."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from analysis import params
from analysis.checkpoints import ModelError
from analysis.models import model_card, unused_parameters
from analysis.params import model_size, read_size
from analysis.routers import RouterError, find_sites
from analysis.whatif import EXAMPLES, weigh

from . import tiny
from .families import FAMILIES, Family

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1}
V2 = MLA | {"model_type": "deepseek_v2", "vocab_size": 102400, "num_experts_per_tok": 6, "n_shared_experts": 2}
SWITCH = {
    "model_type": "switch_transformers", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12,
    "num_decoder_layers": 12, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {"model_type": "qwen3_moe", "vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
         "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
OSS = {"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
       "num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4}  # fmt: skip

# The values of the released config.json files that decide sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Mixtral-8x22B": {"model_type": "mixtral", "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
                      "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "OLMoE-1B-7B": {"model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
                    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
    "Qwen1.5-MoE-A2.7B": {"model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
                          "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "Qwen3-30B-A3B": QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
                              "moe_intermediate_size": 768},
    "Qwen3-235B-A22B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
                                "moe_intermediate_size": 1536},
    "DeepSeek-V3": MLA | {"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "q_lora_rank": 1536,
                          "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
                          "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
                          "num_nextn_predict_layers": 1},
    "gpt-oss-120b": OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20b": OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "Phi-3.5-MoE": {"model_type": "phimoe", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
                    "attention_bias": True, "lm_head_bias": True},
    "Switch-base-8": SWITCH | {"num_experts": 8},
    "Switch-base-128": SWITCH | {"num_experts": 128},
    "DeepSeek-V2-Lite": V2 | {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
                              "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64},
    "DeepSeek-V2": V2 | {"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
                         "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160},
    "Kimi-K2": MLA | {"model_type": "deepseek_v3", "vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432, "q_lora_rank": 1536,
                      "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
                      "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "Qwen2-57B-A14B": {"model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                       "num_attention_heads": 28, "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8,
                       "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480},
    "GLM-4.5-Air": {"model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
                    "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128,
                    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "attention_bias": True},
}  # fmt: skip
# (total, active with the input embedding), to the parameter
PUBLISHED = {
    "Mixtral-8x7B": (46_702_792_704, 12_879_925_248),
    "Mixtral-8x22B": (140_630_071_296, 39_161_468_928),
    "OLMoE-1B-7B": (6_919_161_856, 1_282_017_280),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, 2_689_173_504),
    "Qwen3-30B-A3B": (30_532_122_624, 3_353_032_704),
    "Qwen3-235B-A22B": (235_093_634_560, 22_190_763_520),
    "DeepSeek-V3": (671_026_404_352, 37_552_282_624),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704),
    "Phi-3.5-MoE": (41_873_153_344, 6_640_999_744),
}
# (total, active, active without the input embedding) in billions, to three decimals
BILLIONS = {
    "gpt-oss-120b": (116.829, 5.712, 5.133),
    "gpt-oss-20b": (20.915, 4.187, 3.608),
    "Switch-base-8": (0.619, 0.223, 0.223),
    "Switch-base-128": (7.415, 0.224, 0.224),
    "Mixtral-8x7B": (46.703, 12.880, 12.749),
    "DeepSeek-V3": (671.026, 37.552, 36.626),
    "DeepSeek-V2-Lite": (15.706, 2.661, 2.451),
    "DeepSeek-V2": (235.741, 21.376, 20.852),
    "Kimi-K2": (1026.408, 32.861, 31.687),
    "Qwen2-57B-A14B": (57.409, 14.249, 13.705),
    "GLM-4.5-Air": (106.852, 13.424, 12.803),
}


def config(name: str) -> Any:
    return AutoConfig.for_model(**CONFIGS[name] | {"dtype": "bfloat16"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_and_active_equal_the_published_counts(name: str) -> None:
    size = model_size(config(name))
    assert (size.total, size.active) == PUBLISHED[name]


def test_switch_base_8_equals_its_published_total() -> None:
    assert model_size(config("Switch-base-8")).total == 619_339_008


@pytest.mark.parametrize("name", BILLIONS)
def test_both_conventions_of_active(name: str) -> None:
    size = model_size(config(name))
    found = (size.total, size.active, size.active_without_embedding)
    assert tuple(round(n / 1e9, 3) for n in found) == pytest.approx(BILLIONS[name], abs=1.01e-3)


def test_experts_and_bytes_of_a_layer_by_hand() -> None:
    size = model_size(config("DeepSeek-V3"))
    assert (size.n_layers, len(size.sites), [s.layer for s in size.sites]) == (61, 58, list(range(3, 61)))
    expert = 3 * 7168 * 2048  # gate, up, down
    for s in size.sites:
        assert (s.n_experts, s.top_k, s.n_shared, s.expert, s.experts, s.shared) == (256, 8, 1, expert, 256 * expert, expert)
        assert (s.expert_bytes, s.experts_bytes) == (2 * expert, 512 * expert)
    assert size.dtype == "bfloat16" and any("prediction" in n for n in size.notes)
    qwen = model_size(config("Qwen1.5-MoE-A2.7B")).sites[0]
    assert (qwen.expert, qwen.shared) == (3 * 2048 * 1408, 3 * 2048 * 5632)


def test_an_expert_with_biases_by_hand() -> None:
    expert = 2 * 2880 * 2880 + 2 * 2880 + 2880 * 2880 + 2880
    assert model_size(config("gpt-oss-20b")).sites[0].expert == expert


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_config_alone_says_what_the_live_model_holds(family: Family, tmp_path: Path) -> None:
    model = family.build()
    model.config.architectures = [type(model).__name__]  # as save_pretrained writes it
    card, size = model_card(model), model_size(model.config)
    spare = sum(unused_parameters(s, p) for s in find_sites(model) for p in s.experts.parameters())
    assert (spare > 0) == (family.name == "longcat_flash")
    assert (size.total, size.active) == (card.parameters, card.active_parameters)
    assert size.total == sum(p.numel() for p in model.parameters()) - spare
    assert (size.architecture, size.dtype, size.bytes) == (family.model, "float32", 4 * (size.total + spare))
    for site, row in zip(find_sites(model), size.sites, strict=True):
        info, held = site.info, sum(p.numel() - unused_parameters(site, p) for p in site.experts.parameters())
        assert (row.name, row.n_experts, row.n_special, row.top_k) == (info.name, info.n_experts, info.n_special, info.top_k)
        assert (row.experts, row.expert * row.n_experts, row.n_shared) == (held, held, info.n_shared)
        assert (row.shared > 0) == (info.n_shared > 0)
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = 0 if outer is not None and inner.weight is outer.weight else inner.weight.numel()
    assert size.active - size.active_without_embedding == embedding
    model.config.save_pretrained(tmp_path)
    assert replace(read_size(tmp_path), notes=()) == replace(size, notes=())


def test_rows_that_compute_nothing_are_not_counted() -> None:
    """LongCat holds rows for its 256 zero-compute experts; published are 560B in total and 31.3B active at most."""
    size = model_size(AutoConfig.for_model("longcat_flash", dtype="bfloat16"))
    assert [round(n / 1e9, 3) for n in (size.total, size.active, size.active_without_embedding)] == [560.665, 32.183, 31.377]
    assert (size.sites[0].n_experts, size.sites[0].n_special, size.sites[0].expert) == (512, 256, 3 * 6144 * 2048)
    assert size.active - size.active_least == 28 * 12 * size.sites[0].expert
    assert any("compute nothing" in n for n in size.notes)


def test_rows_for_experts_no_router_knows_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda model: tuple(replace(s, info=replace(s.info, n_experts=4)) for s in find_sites(model))  # noqa: E731
    monkeypatch.setattr(params, "find_sites", wrong)
    with pytest.raises(ModelError, match="weights for 8 experts where its router knows 4"):
        model_size(tiny.build("olmoe").config)


def test_the_example_of_newcomers_is_the_real_mixtral() -> None:
    size, example = model_size(config("Mixtral-8x7B")), weigh(EXAMPLES["8x7b"].mixture)
    assert (example.total, example.active) == (size.total, size.active)
    assert (example.per_layer, example.bytes["bfloat16"]) == (size.sites[0].experts, size.bytes)


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["OLMoE-1B-7B"]))
    assert read_size(tmp_path) == read_size(tmp_path / "config.json")
    assert read_size(tmp_path).total == PUBLISHED["OLMoE-1B-7B"][0]
    assert read_size(tmp_path).notes == ("the config names no dtype: bytes are at torch's default, float32",)


def test_a_quantised_config_says_so(tmp_path: Path) -> None:
    values = CONFIGS["gpt-oss-20b"] | {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    size = read_size(tmp_path)
    assert size.total == PUBLISHED["gpt-oss-20b"][0] and "quantised (mxfp4)" in size.notes[0]


BASE = CONFIGS["Mixtral-8x7B"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BASE | {"num_hidden_layers": 10**9}, "more than any model has"),
        (BASE | {"num_hidden_layers": 1001}, "more than any model has"),
        (BASE | {"num_hidden_layers": 1000, "num_local_experts": 10**6}, "more than any model has"),
        (BASE | {"hidden_size": -8}, "cannot build"),
        (BASE | {"num_attention_heads": 0}, "cannot build"),
        (BASE | {"hidden_size": "wide"}, "no valid 'mixtral' config"),
        (BASE | {"hidden_size": 2**62}, "cannot build"),
        (BASE | {"model_type": "no_such_family"}, "unknown to this release"),
        (BASE | {"model_type": ["mixtral"]}, "names no model_type"),
        (BASE | {"auto_map": {"AutoConfig": "x.Y"}}, "asks for code"),
    ],
)
def test_a_config_that_describes_no_model(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    began = time.monotonic()
    with pytest.raises(ModelError, match=message):
        read_size(tmp_path)
    assert time.monotonic() - began < 20


def test_a_dense_model_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64}))
    with pytest.raises(RouterError, match="no router layers"):
        read_size(tmp_path)


def test_lines_hold_every_figure() -> None:
    size = model_size(config("DeepSeek-V3"))
    text = "\n".join(size.lines())
    for figure in (size.total, size.active, size.active_without_embedding, size.sites[0].expert, size.sites[0].experts_bytes):
        assert f"{figure:,}" in text
    assert "decoder 3 to 60" in text and json.loads(json.dumps(size.to_json()))["sites"][0]["top_k"] == 8
