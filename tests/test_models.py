import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from analysis.capture import capture
from analysis.checkpoints import find_checkpoint
from analysis.models import ModelError, _weights_digest, load_model, model_card
from analysis.proofs import verify_model
from analysis.trace import ModelCard

from . import tiny
from .families import FAMILIES, Family
from .hub import COMMIT, NAME, local_hub
from .synthetic import differences
from .test_recorder import offloaded


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny.build("olmoe")
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_saved_model_loads_with_equal_weights(saved: Path) -> None:
    model, tokenizer = load_model(saved)
    original = tiny.build("olmoe")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), original.parameters(), strict=True))
    assert not model.training and tokenizer("é")["input_ids"] == tiny.tokenizer()("é")["input_ids"]


@pytest.mark.parametrize("change", [{"auto_map": {"AutoConfig": "mod.C"}}, {"_attn_implementation_internal": "x/y"}, {"model_type": None}])
def test_config_that_asks_for_code_is_refused(saved: Path, change: dict[str, object]) -> None:
    (saved / "mod.py").write_text("open('pwned', 'w')")
    values = json.loads((saved / "config.json").read_text()) | change
    if change.get("model_type", 0) is None:
        del values["model_type"]
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError):
        load_model(saved)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", ["", "[" * 100_000, "null", "{"])
def test_broken_config(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config.json"):
        load_model(saved)


def test_pickle_weights_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(saved)


def test_missing_folder_and_unpinned_hub_model() -> None:
    with pytest.raises(ModelError, match="no model at"):
        load_model("/nowhere/at/all")
    with pytest.raises(ModelError, match="40 hex"):
        load_model("some/model", hub=True, revision="main")


def test_hub_model_carries_its_name_and_commit(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_hub(tmp_path / "cache", monkeypatch) as hub:
        hub.files = {p.name: p.read_bytes() for p in saved.iterdir()}
        with pytest.raises(ModelError, match="--allow-download"):
            load_model(NAME, hub=True, revision=COMMIT)
        model, tokenizer = load_model(NAME, hub=True, revision=COMMIT, download=True)
        card = model_card(model, tokenizer, find_checkpoint(NAME, hub=True, revision=COMMIT))
    assert (card.name, card.revision) == (NAME, COMMIT)
    local = model_card(*load_model(saved), saved)
    assert (local.name, local.revision) == ("model", "") and local.digest == card.digest
    assert ModelCard.from_json(json.loads(json.dumps(card.to_json()))) == card


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = tiny.build("olmoe")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    loaded, tokenizer = load_model(tmp_path / "model")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    before = model_card(loaded, tokenizer, tmp_path / "model").digest
    raw = bytearray(shards[-1].read_bytes())
    raw[-1] ^= 1
    shards[-1].write_bytes(raw)
    assert model_card(loaded, tokenizer, tmp_path / "model").digest != before
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"'{shards[1].name}' and 0 more of the shards"):
        load_model(tmp_path / "model")


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_weights_a_checkpoint_lacks_are_not_made_up(saved: Path) -> None:
    """Transformers fills them with random numbers: a random router would be shown as the model's."""
    rewritten(saved, lambda t: t.__delitem__("model.layers.1.mlp.gate.weight"))
    with pytest.raises(ModelError, match="lacks 1 weights of its OlmoeForCausalLM, 'model.layers.1.mlp.gate.weight'"):
        load_model(saved)


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    rewritten(saved, lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.zeros(6, 32)}))
    with pytest.raises(ModelError, match="another shape of 1 weights of its OlmoeForCausalLM, 'model.layers.1.mlp.gate.weight'"):
        load_model(saved)


def test_names_in_a_checkpoint_cannot_steer_the_terminal(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    rewritten(saved, lambda t: t.update({"\x1b[2Jevil": torch.zeros(1)}))
    before = logging.get_verbosity()
    load_model(saved)
    assert "evil" not in caplog.text and logging.get_verbosity() == before
    AutoModelForCausalLM.from_pretrained(saved)
    assert "evil" in caplog.text  # what would have been shown


def test_loading_shows_its_progress(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(saved)
    assert "Loading weights: 100%" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "no-such-method"])
def test_quantised_checkpoint_that_cannot_be_loaded_here(saved: Path, method: str) -> None:
    values = json.loads((saved / "config.json").read_text())
    values["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True, "group_size": 32, "weight_block_size": [8, 8]}
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=f"quantised with {method}, here: ") as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MXFP4 of the OCP microscaling standard: (blocks, scales, values): 32 four-bit values share an exponent, low nibble first."""
    blocks = torch.randint(256, (*shape[:-1], shape[-1] // 32, 16), dtype=torch.uint8)
    scales = torch.randint(121, 125, blocks.shape[:-1], dtype=torch.uint8)
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = FP4[nibbles] * torch.exp2(scales.float() - 127)[..., None]
    return blocks, scales, values.flatten(-2)


def test_mxfp4_is_unpacked_and_captured_exactly(tmp_path: Path) -> None:
    model = FAMILIES["gpt_oss"].build(intermediate_size=32).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    expected = {}

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
                key = f"model.layers.{layer}.mlp.experts.{name}"
                tensors.pop(key)
                tensors[f"{key}_blocks"], tensors[f"{key}_scales"], unpacked = packed(8, rows, 32)
                expected[key] = unpacked.transpose(1, 2)

    rewritten(tmp_path, pack)
    stated = json.loads((tmp_path / "config.json").read_text())
    stated["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    loaded, tokenizer = load_model(tmp_path)
    held = dict(loaded.named_parameters())
    assert len(expected) == 4 and all(torch.equal(held[k].float(), v) for k, v in expected.items())
    assert {p.verdict for p in verify_model(loaded, tokenizer)} == {"pass"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_loads_as_it_was_saved(family: Family, tmp_path: Path) -> None:
    """Text towers without an auto class, heads that are no language head, biases that transformers overwrites (ZAYA's)."""
    model = family.build()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert type(loaded) is type(model) and before.keys() == after.keys()
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def test_card_counts_parameters(saved: Path) -> None:
    model, tokenizer = load_model(saved)
    card = model_card(model, tokenizer, saved)
    expert = 32 * 24 * 3
    assert card.parameters == sum(p.numel() for p in model.parameters())
    assert card.parameters - card.active_parameters == 2 * (8 - 3) * expert
    assert ModelCard.from_json(json.loads(json.dumps(card.to_json()))) == card
    assert card.max_tokens == 256 and len(card.digest) == 64


def test_digest_follows_the_weights(saved: Path) -> None:
    model, tokenizer = load_model(saved)
    before = model_card(model, tokenizer, saved).digest
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (saved / "model.safetensors").write_bytes(raw)
    assert model_card(model, tokenizer, saved).digest != before


# ---- larger than a device ---------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(saved: Path, tmp_path: Path) -> Any:
    """The model with one layer in memory and the rest on disk."""
    pytest.importorskip("accelerate", reason="no accelerate: pip install -r requirements-cluster.txt")
    model, tokenizer = load_model(saved, device_map="auto", max_memory={"cpu": "220KB"}, offload_folder=tmp_path / "offload")
    places = {str(p.device) for p in model.parameters()}
    assert places == {"cpu", "meta"}, "the map must use both memory and disk"
    return model, tokenizer


def test_a_model_on_cpu_and_disk_routes_the_same(saved: Path, on_disk: Any) -> None:
    texts = ["def f(x):", "Il pleut."]
    spread, whole = capture(*on_disk, texts, model_path=saved), capture(*load_model(saved), texts, model_path=saved)
    assert differences(spread, whole) == [] and spread.model == whole.model


def test_digest_of_offloaded_weights_is_that_of_the_weights(saved: Path, on_disk: Any) -> None:
    model, tokenizer = on_disk
    model.name_or_path = ""
    assert model_card(model, tokenizer).digest == _weights_digest(load_model(saved)[0])
    offloaded(tiny_one := tiny.build("olmoe"))
    with pytest.raises(ModelError, match="offloaded where they cannot be read"):
        _weights_digest(tiny_one)


def test_device_map_errors_are_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="say nothing without a device map"):
        load_model(saved, max_memory={"cpu": "1GB"})
    monkeypatch.setattr("analysis.models.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs accelerate: pip install -r requirements-cluster.txt"):
        load_model(saved, device_map="auto")
