"""What ships: the model loads, is what its card says, specialises; the training script runs at toy size."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.models import load_model
from analysis.store import open_run
from analysis.verifying import verify_run
from data.fast_olmoe import forward, orthogonalised
from data.model_card import information
from data.train_demo import balance_at, model_config, plan, prepare, run

HOME = Path(__file__).parent.parent / "data"
CARD = (HOME / "demo-model" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_files_are_those_of_the_card_and_small() -> None:
    listed = dict(re.findall(r"\| (\S+) \| \d+ \| ([0-9a-f]{64}) \|", CARD))
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (HOME / "demo-model").iterdir() if p.suffix != ".md"}
    assert files == listed
    assert sum(p.stat().st_size for p in (HOME / "demo-model").iterdir()) <= 25_000_000


def test_tokenizer_round_trips_any_text() -> None:
    _, tokenizer = load_model(HOME / "demo-model")
    for text in ("def f(x):\n\treturn x", "选择 café 🎉", "سلام \u202e\u200b\0", "  two  spaces ", "<|endof", "a\r\nb"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_recorded_run_is_sound_and_of_this_model() -> None:
    assert verify_run(HOME / "demo-run") == ()
    trace = open_run(HOME / "demo-run")
    prompts = [json.loads(line) for line in (HOME / "demo-prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(trace.labels) >= 8 and [r["label"] for r in trace.documents.to_pylist()] == [p["label"] for p in prompts]
    weights = re.search(r"\| model.safetensors \| \d+ \| ([0-9a-f]{64})", CARD)
    assert weights and len(trace.model.digest) == 64 and trace.model.name == "demo-model"


def test_experts_specialise_and_none_is_dead() -> None:
    """On the shipped prompts, held out from training: 1.2 bits and more in the last layer, every expert in use in every layer."""
    trace = open_run(HOME / "demo-run")
    assert information(trace, len(trace.layers) - 1) > 1.2
    assert all((trace.stats.load(x.index) > 0).all() for x in trace.layers)
    losses = trace.stats.losses()
    assert np.mean([loss for _, loss in losses.values()]) < 2.4


def test_fast_forward_equals_the_stock_model() -> None:
    from transformers import OlmoeForCausalLM

    torch.manual_seed(0)
    model = OlmoeForCausalLM(model_config(300)).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mlp.gate" in name:
                p.normal_(0, 0.5)
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        stock = model(ids).logits
        fast, balance, _ = forward(model, ids, torch.float32)
    assert (stock - fast).abs().max() < 1e-5 * stock.abs().max() + 1e-6
    assert 6 <= balance < 6 * 16


def test_orthogonalised_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20), (3, 20, 50)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.filterwarnings("ignore")
def test_training_at_toy_size_learns_and_saves(tmp_path: Path) -> None:
    from data.corpora import Document

    texts = {"a": "the cat sat on the mat. ", "b": "le chat est sur le tapis. "}
    documents = [Document(t * 40 + str(i), d, "made up", "held-out" if i == 0 else "train") for d, t in texts.items() for i in range(6)]
    small = {"tokens_per_step": 256, "length": 32, "last_length": 64, "vocabulary": 300}
    phases = [replace(p, **small) for p in plan(minutes=0.17, processes=1)]
    prepare(tmp_path, phases[0], documents)
    for recipe in phases:
        run(tmp_path, recipe)
    done = json.loads((tmp_path / "recipe.json").read_text())
    assert [p["goes_on"] for p in done] == [False, True] and sum(p["minutes"] for p in done) == pytest.approx(0.17)
    assert all(p["steps"] >= 1 and p["tokens"] == p["steps"] * 256 for p in done)
    model, tokenizer = load_model(tmp_path / "model")
    ids = torch.tensor([tokenizer(texts["a"] * 4)["input_ids"]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 0.9 * np.log(len(tokenizer))


def test_the_balance_loss_falls_from_phase_to_phase() -> None:
    weights = [balance_at(done, recipe) for recipe in plan(10, 1) for done in (0.0, 0.5, 1.0)]
    assert weights == sorted(weights, reverse=True) and weights[0] == 0.01 and weights[-1] == pytest.approx(0.0003)
