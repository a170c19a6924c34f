"""A model's size from its config alone: layers, experts, total and active parameters, bytes, before any weights.

The model is built on torch's meta device, where tensors have shapes and no memory, so the count is transformers' own
and not a formula of ours. Multi-token-prediction layers are counted where transformers builds them, which it mostly does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checkpoints import ModelError, read_config
from .models import errors_only, model_class, unused_parameters
from .routers import Site, find_sites

# Building is work per module even without memory; no known model comes near (longest 128 layers, widest 16,384 experts).
MOST_LAYERS = 1_000
MOST_MODULES = 1_000_000


@dataclass(frozen=True)
class SiteSize:
    """One routed block. ``expert`` is one routed expert, ``experts`` all of them, ``shared`` its shared experts: parameters."""

    name: str
    layer: int
    stack: str
    n_experts: int
    n_special: int
    top_k: int
    n_shared: int
    expert: int
    experts: int
    shared: int
    expert_bytes: int
    experts_bytes: int


@dataclass(frozen=True)
class ModelSize:
    """What a model weighs. Counts of parameters; bytes at ``dtype``, the config's.

    active              used by one token: total less the routed experts it does not visit; embeddings included.
    active_least        the same where every slot that may go to a class without weights does; equal to active elsewhere.
    active_without_embedding  as some publishers count (gpt-oss); equal to active where input and output embedding are one.
    n_layers            of the language model, encoder and decoder together; ``sites`` are its routed blocks.
    """

    family: str
    architecture: str
    n_layers: int
    dtype: str
    total: int
    active: int
    active_least: int
    active_without_embedding: int
    bytes: int
    sites: tuple[SiteSize, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The size in words and a table, one row per kind of routed block."""
        tied = self.active_without_embedding == self.active
        counted = "the same: the input embedding is also the output matrix" if tied else "as some publishers count"
        head = [
            f"{self.family} ({self.architecture}), {self.n_layers} layers, {len(self.sites)} of their blocks routed, {self.dtype}",
            f"  total parameters    {self.total:>19,}   {self.bytes:,} bytes",
            f"  active per token    {self.active:>19,}   {self.active / self.total:.1%} of the total",
            f"  without embedding   {self.active_without_embedding:>19,}   {counted}",
        ]
        if self.active_least != self.active:
            head.append(f"  at least active     {self.active_least:>19,}   where slots go to classes that compute nothing")
        names = ("blocks", "where", "experts", "k", "shared", "one expert", "all experts", "bytes", "shared experts")
        rows = [names, *(_row(list(group)) for _, group in groupby(self.sites, _alike))]
        widths = [max(len(r[i]) for r in rows) for i in range(len(names))]
        table = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        return [*head, "", *table, "", *(f"note: {n}" for n in self.notes)]


def model_size(config: Any) -> ModelSize:
    """Size of the model that ``config`` (a transformers config) describes; 0.1 to 2 s, no memory for weights.

    Raises ModelError for a config transformers cannot build, RouterError for a model without routing or one not understood.
    """
    model = _on_meta(config)
    sites = find_sites(model)
    rows = tuple(_site_size(s) for s in sites)
    unused = sum(unused_parameters(s, p) for s in sites for p in s.experts.parameters())
    total = sum(p.numel() for p in model.parameters()) - unused
    active = total - sum(r.expert * (r.n_experts - min(r.top_k, r.n_experts)) for r in rows)
    text = config.get_text_config()
    return ModelSize(
        family=str(config.model_type),
        architecture=type(model).__name__,
        n_layers=_layers(text),
        dtype=str(model.dtype).removeprefix("torch."),
        total=total,
        active=active,
        active_least=active - sum(r.expert * min(r.top_k, r.n_experts) for r in rows if r.n_special),
        active_without_embedding=active - _own_embedding(model),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        sites=rows,
        notes=_notes(config, unused),
    )


def read_size(path: Path) -> ModelSize:
    """``model_size`` of a config.json, or of the one in a folder. Raises ModelError, RouterError."""
    file = path / "config.json" if path.is_dir() else path
    values = read_config(file)
    known = values["model_type"] in CONFIG_MAPPING
    if not known:
        raise ModelError(f"model_type {values['model_type']!r} is unknown to this release of transformers, so it cannot be counted")
    try:
        with errors_only():
            kind = CONFIG_MAPPING[values["model_type"]]
            config = kind.from_dict(kind._decode_special_floats(values))  # JSON holds no infinity: it is saved as a word
    except Exception as error:  # config classes raise whatever their checks meet: TypeError, KeyError, dataclass errors, ...
        raise ModelError(f"{file.name} is no valid {values['model_type']!r} config: {_sentence(error)}") from error
    return model_size(config)


def _alike(site: SiteSize) -> tuple[Any, ...]:
    return tuple(v for k, v in asdict(site).items() if k not in ("name", "layer"))


def _row(group: list[SiteSize]) -> tuple[str, ...]:
    """A run of equal routed blocks as cells; parameters and bytes are per block."""
    s = group[0]
    where = f"{s.stack} {s.layer}" + (f" to {group[-1].layer}" if len(group) > 1 else "")
    special = f"+{s.n_special}" if s.n_special else ""
    return (str(len(group)), where, f"{s.n_experts:,}{special}", str(s.top_k), str(s.n_shared), f"{s.expert:,}", f"{s.experts:,}",
            f"{s.experts_bytes:,}", f"{s.shared:,}")  # fmt: skip


def _on_meta(config: Any) -> nn.Module:
    text = config.get_text_config()
    layers, experts = _layers(text), max(_positive(text, n) for n in ("num_experts", "num_local_experts", "n_routed_experts"))
    if layers > MOST_LAYERS or layers * experts > MOST_MODULES:
        raise ModelError(f"the config asks for {layers:,} layers of {experts:,} experts: more than any model has, so it is not built")
    kind = model_class(config)
    build = kind._from_config if issubclass(kind, PreTrainedModel) else partial(kind.from_config, trust_remote_code=False)
    try:
        with errors_only(), torch.device("meta"):
            model: nn.Module = build(config)
    except Exception as error:  # model classes check little: ZeroDivisionError, IndexError, assert, RuntimeError of torch, ...
        raise ModelError(f"transformers cannot build a model of this {type(config).__name__}: {_sentence(error)}") from error
    return model.eval()


def _site_size(site: Site) -> SiteSize:
    info = site.info
    kept = [(p.numel() - unused_parameters(site, p), p.element_size()) for p in site.experts.parameters()]
    experts, experts_bytes = sum(n for n, _ in kept), sum(n * size for n, size in kept)
    rows = {p.shape[0] for p in site.experts.parameters(recurse=False) if p.ndim > 2} - {info.n_experts, info.n_classes}
    if rows:
        raise ModelError(
            f"{info.name} has weights for {rows.pop()} experts where its router knows {info.n_classes}: this is not understood"
        )
    if experts % info.n_experts:
        raise ModelError(
            f"{info.name} holds {experts:,} parameters for {info.n_experts} experts: they differ in size, which is not understood"
        )
    return SiteSize(
        name=info.name, layer=info.layer, stack=info.stack, n_experts=info.n_experts, n_special=info.n_special, top_k=info.top_k,
        n_shared=info.n_shared, expert=experts // info.n_experts, experts=experts, expert_bytes=experts_bytes // info.n_experts,
        experts_bytes=experts_bytes, shared=sum(p.numel() for m in site.shared for p in m.parameters()),
    )  # fmt: skip


def _own_embedding(model: Any) -> int:
    """Parameters of the input embedding; 0 where it is also the output matrix, which every token multiplies with."""
    table, out = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(table, "weight", None)
    if weight is None or (out is not None and out.weight is weight):
        return 0
    return int(weight.numel())


def _notes(config: Any, unused: int) -> tuple[str, ...]:
    notes = []
    if getattr(config, "dtype", None) is None:
        notes.append("the config names no dtype: bytes are at torch's default, float32")
    stated = getattr(config, "quantization_config", None)
    if isinstance(stated, dict):
        notes.append(f"the checkpoint is quantised ({str(stated.get('quant_method'))[:40]}): bytes are those of the weights unpacked")
    if unused:
        notes.append(f"{unused:,} parameters are allocated for classes that compute nothing and are not counted")
    if _positive(config.get_text_config(), "num_nextn_predict_layers"):
        notes.append("multi-token-prediction layers are not built by transformers and not counted")
    return tuple(notes)


def _layers(text: Any) -> int:
    if getattr(text, "is_encoder_decoder", False):
        return _positive(text, "num_layers") + _positive(text, "num_decoder_layers")
    return _positive(text, "num_hidden_layers") or _positive(text, "num_layers")


def _positive(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else 0


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
