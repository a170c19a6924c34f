"""What a token id stands for: readable text and exact bytes, for the tokenizers transformers loads.

Knows byte-level BPE (GPT-2's byte table) and SentencePiece-like pieces; for anything else the piece is kept as text
and the bytes are null. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


def byte_table() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest starts at U+0100 (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class Pieces:
    """Text and bytes of a tokenizer's pieces. ``kind``: "byte-level", "sentencepiece" or "other"."""

    tokenizer: Any
    kind: str
    table: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Pieces:
        """Tell the kind from the fast tokenizer's own decoder."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
        kind = "byte-level" if "ByteLevel" in decoder else "sentencepiece" if "\\u2581" in decoder else "other"
        return cls(tokenizer, kind, byte_table())

    def exact(self, token_id: int) -> tuple[str, bytes | None]:
        """(readable text, exact bytes or None) of one token id."""
        piece = self.tokenizer.convert_ids_to_tokens(int(token_id))
        if piece is None:
            return f"<id {token_id}>", None
        if token_id in self.tokenizer.added_tokens_decoder:
            return piece, piece.encode()
        if self.kind == "byte-level" and all(c in self.table for c in piece):
            raw = bytes(self.table[c] for c in piece)
        elif self.kind == "sentencepiece":
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
            raw = bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()
        else:
            return piece, None
        return raw.decode("utf-8", errors="backslashreplace"), raw

    def columns(self, ids: np.ndarray) -> tuple[pa.Array, pa.Array]:
        """(text, bytes) as dictionary arrays for token ids int [n]."""
        unique, inverse = np.unique(ids, return_inverse=True)
        pairs = [self.exact(int(i)) for i in unique]
        index = pa.array(inverse.astype(np.int32))
        texts = pa.DictionaryArray.from_arrays(index, pa.array([t for t, _ in pairs], pa.string()))
        known = pa.array([None if r is None else i for i, (_, r) in enumerate(pairs)], pa.int32()).take(index)
        raw = pa.DictionaryArray.from_arrays(known, pa.array([r or b"" for _, r in pairs], pa.binary()))
        return texts, raw


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, special tokens added as the tokenizer does by default. Nothing is truncated."""
    return [list(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
