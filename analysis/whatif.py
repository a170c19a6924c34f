"""What a mixture of experts weighs: parameters and memory from a handful of numbers, for newcomers and what-ifs.

Arithmetic on integers only. The exact figures of a real model are counted from its config by ``params``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from .trace import ModelCard

BYTES = MappingProxyType({"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "mxfp4": 4.25 / 8})


class WhatIfError(ValueError):
    """Numbers that describe no model; the message says which and why."""


@dataclass(frozen=True)
class Mixture:
    """A model in a few numbers. Counts of parameters, unless said.

    expert   one expert in one layer, or, with ``layers`` = 1, its share of the whole model.
    shared   what every token of a layer uses besides its experts: shared experts, router.
    other    outside the MoE layers: attention, norms, embeddings, dense layers.
    """

    experts: int
    top_k: int
    expert: int
    layers: int = 1
    shared: int = 0
    other: int = 0

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "expert", "layers"):
            if getattr(self, name) < 1:
                raise WhatIfError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in ("shared", "other"):
            if getattr(self, name) < 0:
                raise WhatIfError(f"{name} is {getattr(self, name)}: less than nothing")
        if self.top_k > self.experts:
            raise WhatIfError(f"top_k is {self.top_k}, but there are only {self.experts} experts to choose from")


@dataclass(frozen=True)
class Weight:
    """Parameters of a mixture: held, and used by one token. ``bytes`` maps a number format to the memory of the weights."""

    total: int
    active: int
    experts_total: int
    experts_active: int
    per_layer: int
    bytes: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def weigh(mixture: Mixture) -> Weight:
    """Total and active parameters, and memory of the weights alone (no KV cache, no activations).

    total = other + layers * (shared + experts * expert); active has top_k in place of experts.
    """
    m = mixture
    held, used = m.layers * m.experts * m.expert, m.layers * m.top_k * m.expert
    common = m.other + m.layers * m.shared
    total = common + held
    sizes = {name: round(total * each) for name, each in BYTES.items()}
    return Weight(total, common + used, held, used, m.experts * m.expert, sizes)


def gated_expert(hidden: int, intermediate: int) -> int:
    """Parameters of one gated feed-forward expert without biases: gate, up and down, [intermediate, hidden] each."""
    return 3 * hidden * intermediate


@dataclass(frozen=True)
class Example:
    """A mixture worth knowing, with what kind of knowledge it is; ``status`` stands beside every figure made of it."""

    name: str
    title: str
    status: str
    note: str
    mixture: Mixture


EXAMPLES: Mapping[str, Example] = MappingProxyType(
    {
        e.name: e
        for e in (
            Example(
                "gpt-4-rumour",
                "GPT-4 as rumoured: 8 x 220B",
                "RUMOUR: never confirmed by OpenAI",
                "8 x 220B = 1.76T, quoted as 1.8T. Two per token is an assumption of ours. The product counts what experts"
                " share (attention, embeddings) once per expert, so a real model of that kind would hold less.",
                Mixture(experts=8, top_k=2, expert=220_000_000_000),
            ),
            Example(
                "64x16b",
                "64 experts of 16B, 8 active",
                "EXAMPLE: round numbers, no real model",
                "A token uses an eighth of the experts: 128B of 1024B. All of them must be in memory all the same.",
                Mixture(experts=64, top_k=8, expert=16_000_000_000),
            ),
            Example(
                "8x7b",
                "Mixtral-8x7B: why 8 x 7B is 46.7B, not 56B",
                "PUBLISHED config (Mixtral-8x7B-v0.1)",
                "Only the feed-forward blocks are there eight times; attention and embeddings are shared by all experts.",
                Mixture(experts=8, top_k=2, expert=gated_expert(4096, 14336), layers=32, shared=8 * 4096, other=1_604_587_520),
            ),
        )
    }
)


def card_bytes(card: ModelCard) -> int | None:
    """Memory of a run's model at the format of its weights; None for a format whose size is not known here."""
    return round(card.parameters * BYTES[card.dtype]) if card.dtype in BYTES else None


def card_expert(card: ModelCard) -> int | None:
    """Parameters of one routed expert, from what a token leaves out: (total - active) over its unvisited experts.

    None where that is no whole number, so that experts cannot be alike, or where nothing is left out.
    """
    left = sum(x.n_experts - min(x.top_k, x.n_experts) for x in card.layers)
    apart = card.parameters - card.active_parameters
    return apart // left if left and apart > 0 and apart % left == 0 else None
