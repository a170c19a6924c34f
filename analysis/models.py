"""Load a model safely from a local folder (or a pinned hub revision), and describe it.

Safe means: no code from the checkpoint runs, weights come from safetensors only, nothing is fetched unless asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .routers import Site, find_sites
from .trace import ModelCard

CONFIG_LIMIT = 4_000_000


class ModelError(ValueError):
    """A model that will not be loaded; the message is one sentence with the reason and what to do."""


def load_model(
    path: str | Path, *, hub: bool = False, revision: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer) from a local folder.

    ``hub`` allows a hub id, which needs ``revision`` as 40 hex digits. ``dtype`` is "auto" (as stored) or a torch name.
    Raises ModelError for anything that is not a plain, local, safetensors checkpoint with a tokenizer.
    """
    local = not hub
    if hub and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ModelError("a hub model needs --revision with the full commit (40 hex digits), so that runs can be repeated")
    if local:
        check_folder(Path(path))
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local, "revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(path, use_safetensors=True, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot load {str(path)!r}: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), tokenizer


def check_folder(folder: Path) -> None:
    """Raise ModelError unless ``folder`` looks like a checkpoint that may be handed to transformers."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"no model at {str(folder)!r}: a folder with config.json is needed")
    if config.stat().st_size > CONFIG_LIMIT:
        raise ModelError(f"{config.name} in {str(folder)!r} is over {CONFIG_LIMIT:,} bytes: that is no model config")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"config.json in {str(folder)!r} is not valid JSON") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"config.json in {str(folder)!r} names no model_type")
    unwanted = sorted(k for k in values if k == "auto_map" or re.fullmatch(r"_.*_internal", k))
    if unwanted:
        raise ModelError(f"config.json in {str(folder)!r} asks for code from the checkpoint ({unwanted[0]}); refused")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"no .safetensors weights in {str(folder)!r}: convert the checkpoint, other formats can run code")


def model_card(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None,
               path: str | Path | None = None) -> ModelCard:  # fmt: skip
    """What a trace keeps of its model. Active parameters = total less the routed experts a token does not use.

    Counts include the input embedding. Raises RouterError as find_sites does.
    """
    sites = find_sites(model)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    total = sum(p.numel() for p in model.parameters())
    idle = sum(_expert_parameters(s) * (1 - s.info.top_k / s.info.n_experts) for s in sites)
    folder = Path(path) if path is not None and Path(path).is_dir() else None
    name = folder.resolve().name if folder else str(path or getattr(config, "_name_or_path", "") or config.model_type)
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None) or 0
    if getattr(config, "is_encoder_decoder", False):
        layers = config.num_layers + config.num_decoder_layers
    return ModelCard(
        name=name,
        family=config.model_type,
        architecture=type(model).__name__,
        n_layers=layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        parameters=total,
        active_parameters=round(total - idle),
        dtype=str(model.dtype).removeprefix("torch."),
        layers=tuple(s.info for s in sites),
        max_tokens=getattr(config, "max_position_embeddings", None),
        digest=_digest(folder, "*.safetensors", "config.json") if folder else _weights_digest(model),
        tokenizer_digest=_digest(folder, "tokenizer*") if folder else "",
    )


def _expert_parameters(site: Site) -> int:
    return sum(p.numel() for p in site.experts.parameters())


def _digest(folder: Path, *patterns: str) -> str:
    whole = hashlib.sha256()
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern)):
        whole.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _weights_digest(model: PreTrainedModel) -> str:
    """sha256 over parameters by name, for a model that came from no folder."""
    whole = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        whole.update(name.encode() + b"\0" + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
