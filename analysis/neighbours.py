"""Which experts of a layer have weights alike? Cosine similarities, read from a checkpoint's safetensors; no model is built.

It says little of function: an expert's neurons may stand in any order, so two experts that compute the same can show 0.
High values tell of a common origin, such as experts copied from one dense layer. Knows nothing of runs on disk or of torch.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError, safe_open

from .trace import LayerInfo

CHUNK = 1 << 22  # numbers held at a time
_TYPES: Mapping[str, str] = MappingProxyType({"F32": "<f4", "F16": "<f2", "BF16": "<u2"})
_SINGLE = re.compile(r"(?:.*\.)?experts\.(?:expert_)?(\d+)\.(.+?)(?:\.weight)?")
_STACKED = re.compile(r"(?:(?:.*\.)?experts\.)?(.+?)(?:\.weight)?")


class WeightsError(ValueError):
    """Experts' weights that cannot be read; the message says what was looked for and what was there."""


@dataclass(frozen=True)
class Similarities:
    """Cosine similarity of the experts of one site, -1 to 1; the diagonal is 1, NaN for an expert of zeros.

    matrices    names of an expert's weight matrices, biases left out.  parameters  numbers in each.
    whole       float64 [E, E]: all matrices of an expert as one vector.  each  float64 [matrices, E, E].
    Independent random matrices of these shapes give 0 with standard deviation ``chance`` = 1 / sqrt(numbers compared).
    """

    site: int
    matrices: tuple[str, ...]
    parameters: tuple[int, ...]
    whole: np.ndarray
    each: np.ndarray

    @property
    def chance(self) -> float:
        """Standard deviation of ``whole`` between experts of independent random weights."""
        return float(1 / np.sqrt(sum(self.parameters)))

    @property
    def most_by_chance(self) -> float:
        """What all similarities between E experts stay below, of either sign, in 19 of 20 layers of independent random weights."""
        return self.chance * NormalDist().inv_cdf(1 - 0.025 / max(len(self.whole) * (len(self.whole) - 1) // 2, 1))

    @property
    def mean(self) -> float:
        """Mean of ``whole`` over all pairs of different experts; NaN for one expert."""
        pairs = self.whole[~np.eye(len(self.whole), dtype=bool)]
        return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else float("nan")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its type, shape, and the byte it starts at."""

    path: Path
    type: str
    shape: tuple[int, ...]
    at: int

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start] of the tensor's numbers in order."""
        raw = np.memmap(self.path, _TYPES[self.type], "r", self.at, int(np.prod(self.shape)))[start:stop]
        return np.asarray((raw.astype(np.uint32) << 16).view(np.float32) if self.type == "BF16" else raw.astype(np.float32))


def expert_similarities(folder: Path, layer: LayerInfo) -> Similarities:
    """Similarities of the experts at one site of the checkpoint in ``folder``. Memory does not grow with the experts' size.

    Knows one tensor per expert and matrix, and matrices stacked over experts. Raises WeightsError.
    """
    found = _matrices(_contents(folder), layer)
    size = {name: int(np.prod(parts[0].shape)) // (1 if len(parts) > 1 else layer.n_experts) for name, parts in found.items()}
    products = np.array([_products(parts, layer.n_experts, size[name]) for name, parts in found.items()])
    return Similarities(
        layer.index, tuple(found), tuple(size.values()), _cosines(products.sum(0)), np.array([_cosines(p) for p in products])
    )


def _contents(folder: Path) -> dict[str, _Stored]:
    """Every tensor of every safetensors file of a folder, by name. The library checks the header before it is read here."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as checked, path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name in checked.keys():  # noqa: SIM118  no mapping
                    told = header[name]
                    out[name] = _Stored(path, told["dtype"], tuple(told["shape"]), 8 + length + told["data_offsets"][0])
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path.name} cannot be read: {error}") from error
    return out


def _matrices(tensors: Mapping[str, _Stored], layer: LayerInfo) -> dict[str, list[_Stored]]:
    """Matrix -> its tensors: one per expert, or a single one that is stacked over experts."""
    for prefix, stacked in ((layer.name, True), (layer.name.rpartition(".")[0], False)):  # a checkpoint may call the block otherwise
        singles: dict[str, dict[int, _Stored]] = defaultdict(dict)
        stacks: dict[str, list[_Stored]] = {}
        for name, tensor in tensors.items():
            rest = name.removeprefix(f"{prefix}.")
            if rest == name or not prefix:
                continue
            if (single := _SINGLE.fullmatch(rest)) and len(tensor.shape) == 2:
                singles[single[2]][int(single[1])] = tensor
            elif len(tensor.shape) == 3 and tensor.shape[0] == layer.n_experts and (stacked or ".experts." in f".{rest}"):
                match = _STACKED.fullmatch(rest)
                stacks[match[1] if match else rest] = [tensor]
        found = {n: [by[e] for e in sorted(by)] for n, by in sorted(singles.items())} or dict(sorted(stacks.items()))
        if found:
            _check(found, layer)
            return found
    raise WeightsError(f"no weights of experts below {layer.name}: this checkpoint names or packs them in a way that is not known here")


def _check(found: Mapping[str, Sequence[_Stored]], layer: LayerInfo) -> None:
    for name, parts in found.items():
        if len(parts) not in (1, layer.n_experts) or len({p.shape for p in parts}) > 1:
            raise WeightsError(f"{layer.name}: {name} is stored for {len(parts)} experts of {layer.n_experts}, or in several shapes")
        if odd := {p.type for p in parts} - _TYPES.keys():
            raise WeightsError(f"{layer.name}: {name} is stored as {min(odd)}, which is quantised: only {', '.join(_TYPES)} are compared")


def _products(parts: Sequence[_Stored], experts: int, size: int) -> np.ndarray:
    """float64 [E, E]: inner products of one matrix of all experts, ``size`` numbers each."""
    total, step = np.zeros((experts, experts)), max(CHUNK // experts, 1)
    for start in range(0, size, step):
        stop = min(start + step, size)
        rows = [
            parts[e].numbers(start, stop) if len(parts) > 1 else parts[0].numbers(e * size + start, e * size + stop) for e in range(experts)
        ]
        block = np.stack(rows)
        total += block @ block.T
    return total


def _cosines(products: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.diag(products))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(products / np.outer(length, length), -1, 1)
