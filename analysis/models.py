"""Load a model safely from a local folder (or one commit of a hub model), and describe it.

Safe means: no code from the checkpoint runs, weights come from safetensors only, nothing is fetched unless asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Mxfp4Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .checkpoints import ModelError, find_checkpoint, hub_name, read_config, weights_digest
from .files import folder_digest
from .routers import BIASES, Site, find_sites
from .trace import ModelCard


def load_model(
    path: str | Path,
    *,
    hub: bool = False,
    revision: str | None = None,
    dtype: str = "auto",
    download: bool = False,
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer) from a local folder, or a hub id at one commit (see ``find_checkpoint``).

    ``dtype`` is "auto" (as stored) or a torch name. Transformers shows the progress of loading on stderr.
    ``device_map`` "auto" spreads a model larger than a device over GPUs, memory and the disk (``offload_folder``), at most ``max_memory``
    of each (``{0: "20GiB", "cpu": "60GiB"}``), as transformers documents it; needs accelerate. None is the CPU.
    Raises ModelError for anything that is not a plain safetensors checkpoint with a tokenizer.
    """
    folder = find_checkpoint(path, hub=hub, revision=revision, download=download)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    method = _quantisation(folder)
    try:
        with errors_only():
            config = AutoConfig.from_pretrained(folder, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            kind = model_class(config)
            options |= {"use_safetensors": True, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
            options |= _placement(device_map, max_memory, offload_folder)
            if method == "mxfp4":
                # Its packed form bypasses router and experts with a kernel, fetched as code from the hub where one fits.
                options["quantization_config"] = Mxfp4Config(dequantize=True)
            model, report = kind.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        what = f", quantised with {method}," if method else ""
        raise ModelError(f"transformers cannot load {str(folder)!r}{what} here: {_sentence(error)}") from error
    # Transformers would fill these with random numbers and a warning: random routers, shown as if they were the model's.
    for problem, keys in (("lacks", report["missing_keys"]), ("has another shape of", report["mismatched_keys"])):
        if keys:
            first = sorted(str(k[0] if isinstance(k, tuple) else k) for k in keys)[0]
            raise ModelError(
                f"{str(folder)!r} {problem} {len(keys)} weights of its {type(model).__name__}, {first!r} among them: copy it again"
            )
    _restore_biases(model, folder)
    return model.eval(), tokenizer


def _placement(device_map: Any, max_memory: Any, offload_folder: Any) -> dict[str, Any]:
    """Options of from_pretrained for where the weights go. Raises ModelError where accelerate is absent or the map is missing."""
    if device_map is None:
        if max_memory is not None or offload_folder is not None:
            raise ModelError("max_memory and offload_folder say nothing without a device map: give device_map (--device-map auto) too")
        return {}
    if find_spec("accelerate") is None:
        raise ModelError("a device map needs accelerate: pip install -r requirements-cluster.txt")
    return {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}


def _restore_biases(model: PreTrainedModel, folder: Path) -> None:
    """Selection biases as the checkpoint has them: transformers 5.23 overwrites that of ZAYA's skip class with -1 after loading."""
    held = {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in {b.rpartition(".")[2] for b in BIASES} and not b.is_meta}
    for file in folder.glob("*.safetensors") if held else ():
        with safe_open(file, "pt") as tensors:
            for name in held.keys() & set(tensors.keys()):
                if (stored := tensors.get_tensor(name)).shape == held[name].shape:
                    held[name].copy_(stored)


def model_class(config: Any) -> Any:
    """What builds the model of a transformers ``config``: the class its ``architectures`` names, else an auto class.

    Only classes of transformers' own module of that family count as named. Raises ModelError where there is none.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    if module.startswith("transformers.models.") and isinstance(named, str):
        kind = getattr(import_module(module), named, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and getattr(kind, "config_class", None) is type(config):
            return kind
    two = getattr(config, "is_encoder_decoder", False)
    order = (AutoModelForSeq2SeqLM,) if two else (AutoModelForCausalLM, AutoModelForImageTextToText)
    for auto in (*order, AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise ModelError(f"transformers has no model to build from a {type(config).__name__}")


@contextmanager
def errors_only() -> Iterator[None]:
    """Keep transformers from logging names out of a checkpoint, which may hold terminal escapes; progress bars stay."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _quantisation(folder: Path) -> str:
    """How a checkpoint is quantised, as its config says ("mxfp4", "fp8", "gptq", ...); "" where it is not."""
    stated = read_config(folder / "config.json").get("quantization_config")
    return str(stated.get("quant_method") or "unknown")[:40] if isinstance(stated, dict) else ""


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def model_card(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None,
               path: str | Path | None = None) -> ModelCard:  # fmt: skip
    """What a trace keeps of its model. Active parameters = total less the routed experts a token does not use.

    Counts include the input embedding, but no rows for classes that compute nothing. Raises RouterError as find_sites does.
    """
    sites = find_sites(model)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    total = sum(p.numel() for p in model.parameters()) - sum(unused_parameters(s, p) for s in sites for p in s.experts.parameters())
    idle = sum(_expert_parameters(s) * (1 - s.info.top_k / s.info.n_experts) for s in sites)
    folder = Path(path) if path is not None and Path(path).is_dir() else None
    hub_id, commit = hub_name(folder) if folder else ("", "")
    name = hub_id or (folder.resolve().name if folder else str(path or getattr(config, "_name_or_path", "") or config.model_type))
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
        digest=weights_digest(folder) if folder else _weights_digest(model),
        tokenizer_digest=folder_digest(folder, "tokenizer*") if folder else "",
        revision=commit,
    )


def unused_parameters(site: Site, p: Tensor) -> int:
    """Of parameter ``p``, the rows for router classes that compute nothing (LongCat's zero experts): never used, never published."""
    info = site.info
    return p.numel() // info.n_classes * info.n_special if p.shape[0] == info.n_classes else 0


def _expert_parameters(site: Site) -> int:
    return sum(p.numel() - unused_parameters(site, p) for p in site.experts.parameters())


def _weights_digest(model: PreTrainedModel) -> str:
    """sha256 over parameters by name, for a model that came from no folder."""
    whole = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        values = _offloaded(model, name) if p.is_meta else p.detach().cpu()
        whole.update(name.encode() + b"\0" + values.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _offloaded(model: PreTrainedModel, name: str) -> Tensor:
    """Values of a parameter that a device map left on disk or out of its device, read for this moment."""
    if find_spec("accelerate") is not None:
        from accelerate.utils import align_module_device, has_offloaded_params

        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if has_offloaded_params(module):
            with align_module_device(module, "cpu"):
                return getattr(module, leaf).detach().clone()
    raise ModelError(f"the values of {name} are offloaded where they cannot be read: give the model's folder (model_path)")
