import json
from pathlib import Path

import pytest
import torch

from analysis.models import ModelError, load_model, model_card
from analysis.trace import ModelCard

from . import tiny


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
