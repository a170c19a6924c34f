"""Every family of the pinned transformers whose language model routes tokens to experts, small enough for a unit test.

One line per family: the class of its model and what its config needs beyond SMALL. Nothing here knows how it routes.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

VOCABULARY = 260
# Given to a config class where it has such a field, under any of the names families use.
SMALL = MappingProxyType(
    {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
        "moe_num_experts": 8, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 4, "topk_group": 2,
        "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_head_dim": 8, "linear_num_heads": 4,
    }
)  # fmt: skip
MIXED = ["linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
GEMMA = {"top_k_experts": 2, "global_head_dim": 8, "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}}
DENSE_FIRST = ["dense", "sparse"]


@dataclass(frozen=True)
class Family:
    """``model`` is the class in ``transformers.models.<folder>``; ``values`` go to its config over SMALL."""

    name: str
    model: str
    values: dict[str, Any] = field(default_factory=dict)
    folder: str = ""

    @property
    def model_class(self) -> Any:
        folder = self.folder or self.name
        return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), self.model)

    def config(self, **values: Any) -> Any:
        """The small config; ``values`` override the table's."""
        kind = self.model_class.config_class
        named = inspect.signature(kind.__init__).parameters
        renamed = getattr(kind, "attribute_map", {})
        small = {k: v for k, v in SMALL.items() if k in named or (k in renamed and renamed[k] not in SMALL)}
        return kind(**small | self.values | values)

    def build(self, seed: int = 0, **values: Any) -> Any:
        """A small float32 model with random routers, so that no check passes because all scores are equal."""
        torch.manual_seed(seed)
        model = self.model_class._from_config(self.config(**values)).float().eval()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                randomise(name, tensor)
            for name, tensor in model.named_buffers():
                if name.rpartition(".")[2] in (*BIASES, "tid2eid"):  # the rest are rotary tables, decays, constants
                    randomise(name, tensor)
        return model


BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def randomise(name: str, tensor: torch.Tensor) -> None:
    """Routers, biases and hash tables start as zeros or constants in most families: give them values that decide."""
    last = name.rpartition(".")[2]
    if last == "tid2eid":  # a hash table: distinct experts for each token id
        tensor.copy_(torch.rand(tensor.shape[0], 8).argsort(1)[:, : tensor.shape[1]])
    elif last in BIASES:
        tensor.normal_(0, 0.1)
    elif last == "per_expert_scale":
        tensor.uniform_(0.5, 2)
    elif tensor.ndim < 2:
        return
    elif any(part in name for part in ("router", ".gate.", "moe_statics")):
        tensor.normal_(0, 0.5)
    else:
        tensor.normal_(0, 0.2)


def inputs(model: nn.Module, n: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two documents of ``n`` random tokens, and the start of a decoder's text where there is one."""
    torch.manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (2, n))
    if not hasattr(model, "lm_head") and "codec_embedding" in dict(model.named_children()):  # a talker reads embeddings
        return {"inputs_embeds": torch.randn(2, n, model.config.hidden_size)}
    two = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if two else {"input_ids": ids}


def routed_layers(config: Any) -> list[int]:
    """Numbers of the layers that route, by the config alone, one entry per site."""
    n = getattr(config, "num_layers", None) or config.num_hidden_layers
    if (kinds := getattr(config, "mlp_layer_types", None)) is not None:
        return [i for i, kind in enumerate(kinds) if kind != "dense"]
    if (blocks := getattr(config, "layers_block_type", None)) is not None and "moe" in blocks:
        return [i for i, kind in enumerate(blocks) if kind == "moe"]
    if (listed := getattr(config, "moe_layers", None)) is not None:
        return list(listed)
    if (experts := getattr(config, "layers_num_experts", None)) is not None:
        return [i for i, e in enumerate(experts) if e > 1]
    if (alone := getattr(config, "mlp_only_layers", None)) is not None:
        return [i for i in range(n) if i not in alone and (i + 1) % config.decoder_sparse_step == 0]
    if config.model_type == "jetmoe":
        return [i for i in range(n) for _ in ("attention", "mlp")]
    if config.model_type == "switch_transformers":
        every = [(config.num_layers, config.encoder_sparse_step), (config.num_decoder_layers, config.decoder_sparse_step)]
        return [i for count, step in every for i in range(count) if i % step == 1 or step == 1]
    if (start := getattr(config, "moe_layer_start_index", None)) is not None:
        return [i for i in range(start, config.moe_layer_end_index + 1) if (i + 1) % config.moe_layer_interval == 0]
    first = getattr(config, "first_k_dense_replace", None) or getattr(config, "num_dense_layers", None) or 0
    return list(range(first, n))


_TABLE = (
    Family("afmoe", "AfmoeForCausalLM"),
    Family("aria", "AriaTextForCausalLM"),
    Family("axk1", "AXK1ForCausalLM"),
    Family("axk2", "AXK2ForCausalLM"),
    Family("bailing_hybrid", "BailingHybridForCausalLM", {"layer_types": MIXED}),
    Family("beam", "BeamForCausalLM", {"mlp_layer_types": DENSE_FIRST}),
    Family("cohere2_moe", "Cohere2MoeForCausalLM"),
    Family("dbrx", "DbrxForCausalLM", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2}}),
    Family("deepseek_ocr2", "DeepseekOcr2TextModel", {"mlp_layer_types": DENSE_FIRST}),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy"}),
    Family("deepseek_v3", "DeepseekV3ForCausalLM"),
    Family("deepseek_v32", "DeepseekV32ForCausalLM"),
    Family("deepseek_v4", "DeepseekV4ForCausalLM", {
        "mlp_layer_types": ["hash_moe", "moe"], "o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1, "head_dim": 16,
        "partial_rotary_factor": 0.5, "qk_rope_head_dim": 8, "index_head_dim": 16, "layer_types": ["sliding_attention"] * 2}),
    Family("diffusion_gemma", "DiffusionGemmaEncoderTextModel", GEMMA),
    Family("doge", "DogeForCausalLM", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3}),
    Family("dots1", "Dots1ForCausalLM"),
    Family("dots3_note", "Dots3NoteForCausalLM", {"head_dim": 16, "shared_experts_intermediate_size": 16}),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    Family("ernie4_5_vl_moe", "Ernie4_5_VLMoeTextModel", {
        "moe_intermediate_size": [24, 16], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}),
    Family("exaone_moe", "ExaoneMoeForCausalLM"),
    Family("flex_olmo", "FlexOlmoForCausalLM"),
    Family("flint", "FlintForCausalLM", {"mlp_only_layers": [0]}),
    Family("gemma4", "Gemma4ForCausalLM", GEMMA | {
        "enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4}),
    Family("glm4_moe", "Glm4MoeForCausalLM"),
    Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    Family("glm4v_moe", "Glm4vMoeTextModel", {
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}),
    Family("glm5_next", "Glm5NextTextModel", {
        "qk_rope_head_dim": 0, "head_dim": 0, "mlp_layer_types": DENSE_FIRST, "layer_types": ["linear_attention", "indexed_attention"]}),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    Family("gpt_oss", "GptOssForCausalLM"),
    Family("granitemoe", "GraniteMoeForCausalLM"),
    Family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", {
        "layer_types": MIXED, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", {"moe_topk": [2, 3]}),
    Family("hy_v3", "HYV3ForCausalLM"),
    Family("hy_v4", "HYV4ForCausalLM"),
    Family("inkling", "InklingForCausalLM"),
    Family("inkling2", "Inkling2ForCausalLM"),
    Family("jamba", "JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    Family("jetmoe", "JetMoeForCausalLM", {"kv_channels": 8}),
    Family("kimi_linear", "KimiLinearForCausalLM", {"layer_types": MIXED}),
    Family("kolibri1", "Kolibri1ForCausalLM"),
    Family("laguna", "LagunaForCausalLM", {"moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 2.0}),
    Family("lfm2_moe", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    Family("llama4", "Llama4ForCausalLM", {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 24}),
    Family("longcat_flash", "LongcatFlashForCausalLM", {
        "num_layers": 2, "moe_topk": 3, "zero_expert_num": 4, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 24}),
    Family("mellum", "MellumForCausalLM"),
    Family("mimo_v2_flash", "MiMoV2FlashForCausalLM", {"num_key_value_heads": 2}),
    Family("minimax", "MiniMaxForCausalLM"),
    Family("minimax_m2", "MiniMaxM2ForCausalLM"),
    Family("minimax_m3_vl", "MiniMaxM3VLForCausalLM", {
        "dense_intermediate_size": 24, "rotary_dim": 4, "mlp_layer_types": DENSE_FIRST}),
    Family("mistral4", "Mistral4ForCausalLM"),
    Family("mistral_large4", "MistralLarge4TextModel"),
    Family("mixtral", "MixtralForCausalLM"),
    Family("muse_spark", "MuseSparkTextModel", {"moe_hidden_size": 16, "mlp_layer_types": DENSE_FIRST}),
    Family("nemotron_h", "NemotronHForCausalLM", {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8, "moe_latent_size": 16}),
    Family("olmoe", "OlmoeForCausalLM"),
    Family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    Family("phimoe", "PhimoeForCausalLM"),
    Family("qwen2_moe", "Qwen2MoeForCausalLM"),
    Family("qwen3_5_moe", "Qwen3_5MoeForCausalLM", {"layer_types": MIXED}),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}),
    Family("qwen3_next", "Qwen3NextForCausalLM", {"layer_types": MIXED}),
    Family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    Family("qwen3_omni_moe_talker", "Qwen3OmniMoeTalkerModel", {"shared_expert_intermediate_size": 16}, "qwen3_omni_moe"),
    Family("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
    Family("qwen4_exp", "Qwen4ExpForCausalLM", {
        "layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}),
    Family("solar_open", "SolarOpenForCausalLM"),
    Family("step3p7", "Step3p7TextModel", {"mlp_layer_types": DENSE_FIRST, "share_expert_dim": 16, "sliding_window": 16}),
    Family("switch_transformers", "SwitchTransformersForConditionalGeneration", {
        "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "expert_capacity": 3,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0}),
    Family("unlimited_ocr", "UnlimitedOcrTextModel", {"mlp_layer_types": DENSE_FIRST, "topk_method": "group_limited_greedy"}),
    Family("zaya", "ZayaForCausalLM", {"num_experts_per_tok": 1, "num_key_value_heads": 2, "router_hidden_size": 16}),
)  # fmt: skip
FAMILIES = MappingProxyType({f.name: f for f in _TABLE})
