"""The small models most tests run, and a byte-level tokenizer that fits every family of families.py."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .families import FAMILIES, VOCABULARY

VALUES = MappingProxyType({"olmoe": {"num_experts_per_tok": 3}, "switch_transformers": {"num_experts": 4}})
__all__ = ["VOCABULARY", "build", "tokenizer"]


def build(family: str, seed: int = 0) -> Any:
    """A small model in float32 whose routers are random, so that no check passes because all scores are equal."""
    return FAMILIES[family].build(seed, **VALUES.get(family, {}))


def tokenizer() -> Any:
    """Byte-level, one token per byte: ids 4 to 259; 0 to 3 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return t.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
