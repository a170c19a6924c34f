"""Small random models of every family recorded exactly today, and a byte-level tokenizer that fits them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 260
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = COMMON | {
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "num_hidden_layers": 3, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 4, "topk_group": 2,
}  # fmt: skip

FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mixtral": (t.MixtralConfig, COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": (t.OlmoeConfig, COMMON | {"num_experts": 8, "num_experts_per_tok": 3}),
    "qwen2_moe": (t.Qwen2MoeConfig, COMMON | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                              "shared_expert_intermediate_size": 16}),
    "qwen3_moe": (t.Qwen3MoeConfig, COMMON | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}),
    "deepseek_v2": (t.DeepseekV2Config, DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": (t.DeepseekV3Config, DEEPSEEK),
    "gpt_oss": (t.GptOssConfig, COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}),
    "switch_transformers": (t.SwitchTransformersConfig, {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 3,
        "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}),
}  # fmt: skip
SITES = {"deepseek_v2": 2, "deepseek_v3": 2, "switch_transformers": 2}


def build(family: str, seed: int = 0) -> Any:
    """A small model in float32 whose routers are random, so that no check passes because all scores are equal."""
    config_class, values = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**values)
    kind = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
    model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "router" in name or ".gate." in name or "e_score" in name:
                tensor.normal_(0, 0.5)
            elif tensor.ndim >= 2 and tensor.is_floating_point():
                tensor.normal_(0, 0.2)
    return model


def tokenizer() -> Any:
    """Byte-level, one token per byte: ids 4 to 259; 0 to 3 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return t.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
