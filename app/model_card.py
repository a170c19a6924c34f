"""What a run's model is, in rows: the same on the Model page and in a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import analysis
from analysis.trace import LayerInfo, ModelCard, Trace


def origin(trace: Trace) -> str:
    """Where a figure or a report comes from; what their captions end in."""
    made = trace.options.get("created")
    kept = {"exact": "", "8-bit": " Gate weights rounded to 8 bits.", "none": " Gate weights not stored."}[trace.weights_kept]
    return f"Run {trace.name}{f' of {made}' if made else ''}; Routerscope {analysis.__version__}.{kept}"


def router_rows(layers: Sequence[LayerInfo]) -> list[dict[str, Any]]:
    """One row per stretch of neighbouring layers whose routers are alike."""
    return [_row(list(group)) for _, group in groupby(layers, _alike)]


def facts(card: ModelCard, routed: int) -> dict[str, str]:
    """A model in a few words per fact."""
    return {
        "name": card.name,
        "architecture": f"{card.architecture}, family {card.family}",
        "parameters": f"{card.parameters:,}, of which {card.active_parameters:,} are active per token",
        "routed layers": f"{routed:,} blocks with a router; the model has {card.n_layers:,} layers",
        "weights in": card.dtype,
        "vocabulary": f"{card.vocab_size:,} tokens",
        "sha256 of its files": card.digest or "not known",
    }


def size_in_words(card: ModelCard) -> str:
    """Parameters in all and per token; runs made without a model may have none."""
    if card.parameters < 1:
        return "size not recorded"
    total, active = (f"{n / 1e6:,.1f} million" if n >= 1e5 else f"{n:,}" for n in (card.parameters, card.active_parameters))
    return f"{total} parameters, {active} active per token"


def _row(layers: list[LayerInfo]) -> dict[str, Any]:
    x = layers[0]
    return {
        "layers": x.title if len(layers) == 1 else f"{x.title} to {layers[-1].layer}",
        "experts": x.n_experts,
        "without weights": x.n_special,
        "top-k": x.top_k,
        "shared experts": x.n_shared,
        "scores": x.scoring,
        "chosen by": x.selection,
        "weights sum to 1": {True: "yes", False: "no", None: "not known"}[x.normalised],
        "weights on": x.weights_on,
        "native capacity": "none" if x.native_capacity is None else f"{x.native_capacity:,} tokens",
    }


def _alike(x: LayerInfo) -> tuple[Any, ...]:
    values = _row([x])
    return tuple(v for k, v in values.items() if k != "layers")
