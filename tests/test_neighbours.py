"""Similarities against torch on the same weights, in every way a checkpoint stores them; what cannot be read is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from analysis import neighbours
from analysis.checkpoints import weights_digest
from analysis.models import load_model, model_card
from analysis.neighbours import WeightsError, expert_similarities
from analysis.routers import find_sites
from analysis.store import open_run
from tests import tiny
from tests.synthetic import site

DEMO = Path("data/demo-model")
LAYER = replace(site(0, 4), name="model.layers.0.mlp")


def by_torch(vectors: torch.Tensor) -> np.ndarray:
    """Cosines of rows [E, n]."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).numpy()


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    common = torch.randn(6, 10)
    return {name: (torch.randn(4, *shape) + (common if name == "up_proj" else 0)).to(dtype)
            for name, shape in (("up_proj", (6, 10)), ("down_proj", (10, 6)))}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["single", "stacked", "renamed", "sharded"])
def test_similarities_are_those_of_the_stored_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, how: str
) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 28)  # 7 numbers of each expert at a time
    given, block = weights(dtype), "block_sparse_moe" if how == "renamed" else "mlp"
    tensors = {f"model.layers.0.{block}.experts.{e}.{n}.weight": w[e].clone() for n, w in given.items() for e in range(4)}
    if how == "stacked":
        tensors = {f"model.layers.0.mlp.experts.{n}": w for n, w in given.items()}
    tensors |= {"model.layers.0.mlp.shared_experts.up_proj.weight": torch.randn(6, 10), "model.layers.1.mlp.experts.0.up_proj.weight": torch.randn(6, 10),
                "model.layers.0.mlp.gate.weight": torch.randn(4, 10), "model.layers.0.mlp.experts.0.up_proj.bias": torch.randn(6)}  # fmt: skip
    pieces = [dict(list(tensors.items())[i::2]) for i in (0, 1)] if how == "sharded" else [tensors]
    for i, piece in enumerate(pieces):
        save_file(piece, tmp_path / f"model-{i}.safetensors")
    found = expert_similarities(tmp_path, LAYER)
    assert (found.matrices, found.parameters) == (("down_proj", "up_proj"), (60, 60))
    for name, each in zip(found.matrices, found.each, strict=True):
        np.testing.assert_allclose(each, by_torch(given[name].flatten(1)), atol=1e-6)
    whole = by_torch(torch.cat([given[n].flatten(1) for n in found.matrices], 1))
    np.testing.assert_allclose(found.whole, whole, atol=1e-6)
    assert found.chance == pytest.approx(1 / np.sqrt(120)) and found.mean == pytest.approx(whole[~np.eye(4, dtype=bool)].mean())
    assert found.each[1].mean() > 0.3 > found.each[0][~np.eye(4, dtype=bool)].mean()


def test_random_weights_are_as_alike_as_chance_says(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file({f"model.layers.0.mlp.experts.{n}": torch.randn(40, 20, 30) for n in ("a", "b")}, tmp_path / "model.safetensors")
    found = expert_similarities(tmp_path, replace(LAYER, n_experts=40))
    pairs = found.whole[np.triu_indices(40, 1)]
    assert 0.7 * found.most_by_chance < np.abs(pairs).max() < 1.2 * found.most_by_chance
    layers = (
        np.random.default_rng(0).normal(size=(4_000, 780)) * found.chance
    )  # the largest of all pairs of 40 experts, were they independent
    assert (np.abs(layers).max(1) > found.most_by_chance).mean() == pytest.approx(0.05, abs=0.015)
    assert pairs.std() == pytest.approx(found.chance, rel=0.1) and abs(pairs.mean()) < 4 * found.chance / np.sqrt(780)


def test_the_demo_model_as_torch_has_it() -> None:
    card, (model, _) = open_run("data/demo-run").model, load_model(DEMO)
    assert weights_digest(DEMO) == card.digest
    layer = card.layers[5]
    experts = model.get_submodule(layer.name).experts
    loaded = torch.cat([p.detach().float().flatten(1) for p in experts.parameters()], 1)
    found = expert_similarities(DEMO, layer)
    np.testing.assert_allclose(found.whole, by_torch(loaded), atol=1e-6)
    assert sum(found.parameters) == loaded.shape[1] and found.matrices == ("down_proj", "gate_proj", "up_proj")


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "llama4", "jetmoe", "gpt_oss", "switch_transformers"]
)
def test_saved_models_of_families(tmp_path: Path, family: str) -> None:
    """What transformers writes, under names of its own, holds the weights of the experts that run."""
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    for one in find_sites(model):
        info = model_card(model).layers[one.info.index]
        found = expert_similarities(tmp_path, info)
        matrices = [
            p.detach().reshape(info.n_experts, -1) for p in one.experts.parameters() if p.dim() == 3 and p.shape[0] == info.n_experts
        ]
        if matrices:
            np.testing.assert_allclose(found.whole, by_torch(torch.cat(matrices, 1)), atol=1e-5)
        assert found.whole.shape == (info.n_experts,) * 2


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def stored(**tensors: torch.Tensor) -> Path:
        save_file({f"model.layers.0.mlp.{n.replace('__', '.')}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
        return tmp_path

    with pytest.raises(WeightsError, match="no weights of experts below model.layers.0.mlp"):
        expert_similarities(stored(gate__weight=torch.ones(4, 2)), LAYER)
    with pytest.raises(WeightsError, match="stored as U8, which is quantised"):
        expert_similarities(stored(experts__up_proj=torch.ones(4, 2, 2, dtype=torch.uint8)), LAYER)
    with pytest.raises(WeightsError, match="3 experts of 4"):
        expert_similarities(stored(**{f"experts__{e}__up_proj__weight": torch.ones(2, 2) for e in range(3)}), LAYER)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(WeightsError, match="model.safetensors cannot be read"):
        expert_similarities(tmp_path, LAYER)
    zeros = expert_similarities(stored(experts__up_proj=torch.zeros(4, 2, 2)), LAYER)
    assert np.isnan(zeros.whole).all() and np.isnan(zeros.mean)
