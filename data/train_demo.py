"""Train the demo model from scratch: extract text, train the tokenizer, train, save.

    python -m data.train_demo --minutes 85            # everything; two processes of one thread each
    python -m data.model_card data/build/model        # measure it, write the card and the prompts

The learning rate follows the share of the time budget that has passed, so a run always ends on time with a finished
schedule; what a slower machine loses is tokens, and the card says how many there were.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from .corpora import Document, extract
from .fast_olmoe import Muon, losses

END = "<|endoftext|>"
# Nearly even: a domain with less text than one expert's even share (1/16) cannot claim an expert of its own.
MIXTURE = {"english": 0.13, "python": 0.12, "latex": 0.12, "french": 0.11, "russian": 0.11, "chinese": 0.11, "c": 0.11,
           "json": 0.095, "math": 0.095}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training run; written into the model card."""

    minutes: float = 40.0
    processes: int = 2
    tokens_per_step: int = 8_192
    length: int = 256
    last_length: int = 512  # for the last ``last_share`` of the time
    last_share: float = 0.15
    warm_up: float = 0.02
    decay: float = 0.35
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    # Per layer, over the batch of one process; not transformers' pooled loss. It falls geometrically over the run:
    # strong while experts could still die, weak while they specialise.
    balance: float = 0.01
    last_balance: float = 0.001
    goes_on: bool = False  # from the model of the phase before, instead of from random weights
    z: float = 1e-4
    seed: int = 20_261_121
    vocabulary: int = 8_192
    compute: str = "float32"


def model_config(vocabulary: int) -> OlmoeConfig:
    """The demo model's shape: 6 layers, 16 experts, top-2, about 12 million parameters."""
    return OlmoeConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=112, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True,
        max_position_embeddings=2_048, clip_qkv=None, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and decodes to exactly the same bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    budget = {d: 2_500_000 * MIXTURE.get(d, 0.1) / 0.1 for d in {x.domain for x in documents}}
    texts = []
    for document in documents:
        if document.split == "train" and budget[document.domain] > 0:
            budget[document.domain] -= len(document.text.encode())
            texts.append(document.text)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=2_048,
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def token_streams(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, np.ndarray]:
    """Training tokens per domain: documents in a seeded order, each closed by the end token."""
    streams = {}
    rng = np.random.default_rng(seed)
    end = tokenizer.convert_tokens_to_ids(END)
    for domain in sorted({d.domain for d in documents}):
        texts = [d.text for d in documents if d.domain == domain and d.split == "train"]
        rng.shuffle(texts)
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        streams[domain] = np.concatenate([np.array([*ids, end], dtype=np.uint16) for ids in encoded])
    return streams


def windows(streams: Mapping[str, np.ndarray], tokens: int, seed: int) -> Generator[torch.Tensor, int, None]:
    """Endless batches [tokens // T, T + 1] of random windows; send T to the generator (first next() takes none)."""
    rng = np.random.default_rng(seed)
    domains = sorted(streams)
    share = np.array([MIXTURE.get(d, 1 / len(domains)) for d in domains])
    length = yield torch.empty(0)
    while True:
        rows = []
        for domain in rng.choice(domains, size=tokens // length, p=share / share.sum()):
            stream = streams[domain]
            start = rng.integers(0, len(stream) - length - 1)
            rows.append(stream[start : start + length + 1].astype(np.int64))
        length = yield torch.from_numpy(np.stack(rows))


def rate_at(done: float, recipe: Recipe) -> float:
    """Share of the full learning rate when ``done`` of the time (0 to 1) has passed."""
    return min(1.0, done / recipe.warm_up, (1 - done) / recipe.decay)


def balance_at(done: float, recipe: Recipe) -> float:
    """Weight of the balance loss when ``done`` of the time (0 to 1) has passed."""
    return recipe.balance ** (1 - done) * recipe.last_balance**done


def train(rank: int, recipe: Recipe, work: Path) -> None:
    """One process of the training run; process 0 logs and saves to ``work / "model"``."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    dist.init_process_group("gloo", rank=rank, world_size=recipe.processes, init_method=f"file://{work}/rendezvous")
    streams = dict(np.load(work / "streams.npz"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    before = OlmoeForCausalLM.from_pretrained(work / "model") if recipe.goes_on else OlmoeForCausalLM(model_config(len(tokenizer)))
    model = before.float().train()
    named = [(n, p) for n, p in model.named_parameters()]
    matrices = [(n, p) for n, p in named if p.ndim >= 2 and "embed" not in n and "mlp.gate." not in n]
    others = [p for n, p in named if not any(p is q for _, q in matrices)]
    muon = Muon([p for _, p in matrices], ["gate_up_proj" in n for n, _ in matrices])
    adam = torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    shares = np.array_split(np.arange(len(matrices)), recipe.processes)
    batches = windows(streams, recipe.tokens_per_step // recipe.processes, recipe.seed + 1 + rank + 100 * recipe.goes_on)
    next(batches)
    log = (work / "history.jsonl").open("a" if recipe.goes_on else "w") if rank == 0 else None
    began, saved, step, tokens = time.monotonic(), time.monotonic(), 0, 0
    while True:
        clock = torch.tensor([(time.monotonic() - began) / (60 * recipe.minutes)])
        dist.broadcast(clock, 0)
        done = clock.item()
        if done >= 1:
            break
        length = recipe.last_length if done > 1 - recipe.last_share else recipe.length
        loss = losses(model, batches.send(length), getattr(torch, recipe.compute))
        (loss.cross_entropy + balance_at(done, recipe) * loss.balance + recipe.z * loss.z).backward()
        _share_gradients([p for _, p in named], recipe.processes)
        rate = rate_at(done, recipe)
        muon.step(recipe.muon_rate * rate, range(shares[rank][0], shares[rank][-1] + 1))
        for group in adam.param_groups:
            group["lr"] = recipe.adam_rate * rate
        adam.step()
        for owner, share in enumerate(shares):
            flat = torch.nn.utils.parameters_to_vector([matrices[i][1] for i in share]).detach()
            dist.broadcast(flat, owner)
            torch.nn.utils.vector_to_parameters(flat, [matrices[i][1] for i in share])
        model.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + recipe.tokens_per_step
        if log and step % 10 == 0:
            log.write(json.dumps({"step": step, "tokens": tokens, "seconds": round(time.monotonic() - began, 1),
                                  "loss": round(loss.cross_entropy.item(), 4),
                                  "balance": round(loss.balance.item(), 4)}) + "\n")  # fmt: skip
            log.flush()
        if rank == 0 and time.monotonic() - saved > 240:
            save(model, tokenizer, work / "model")
            saved = time.monotonic()
    if rank == 0:
        save(model, tokenizer, work / "model")
        phases = json.loads((work / "recipe.json").read_text()) if recipe.goes_on else []
        phases.append({**recipe.__dict__, "steps": step, "tokens": tokens})
        (work / "recipe.json").write_text(json.dumps(phases, indent=2))
    dist.destroy_process_group()


def _share_gradients(parameters: Sequence[torch.Tensor], processes: int) -> None:
    """Mean of the gradients over processes, clipped to norm 1."""
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= processes
    flat *= min(1.0, 1.0 / (flat.norm().item() + 1e-6))
    at = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bfloat16 safetensors, configuration and tokenizer as transformers does."""
    state = {n: p.detach().to(torch.bfloat16) for n, p in model.state_dict().items()}
    copy = OlmoeForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(work: Path, recipe: Recipe, documents: Sequence[Document]) -> None:
    """Tokenizer and token streams of the training split, written below ``work``."""
    tokenizer = train_tokenizer(documents, recipe.vocabulary)
    tokenizer.save_pretrained(work / "tokenizer")
    streams: Mapping[str, Any] = token_streams(documents, tokenizer, recipe.seed)
    np.savez(work / "streams.npz", **streams)
    held_out = [d.__dict__ for d in documents if d.split == "held-out"]
    (work / "held-out.jsonl").write_text("\n".join(json.dumps(d, ensure_ascii=False) for d in held_out) + "\n")


def plan(minutes: float, processes: int) -> tuple[Recipe, ...]:
    """Two phases: a full schedule, then 5/17 of the time with the balance loss nearly off, in which late layers specialise."""
    first = Recipe(minutes=minutes * 12 / 17, processes=processes)
    return first, replace(first, minutes=minutes * 5 / 17, balance=0.0006, last_balance=0.0003, goes_on=True, muon_rate=0.012,
                          adam_rate=2e-3, decay=0.7, last_share=0.3)  # fmt: skip


def run(work: Path, recipe: Recipe) -> None:
    """Train on what ``prepare`` wrote, in ``recipe.processes`` processes."""
    (work / "rendezvous").unlink(missing_ok=True)
    multiprocessing.spawn(train, args=(recipe, work), nprocs=recipe.processes, join=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/build"), help="folder for downloads and results")
    parser.add_argument("--minutes", type=float, default=85.0, help="time to train")
    parser.add_argument("--processes", type=int, default=min(Recipe.processes, os.cpu_count() or 1))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    phases = plan(arguments.minutes, arguments.processes)
    print(f"extracting text into {work}", flush=True)
    documents, records = extract(work)
    (work / "sources.json").write_text(json.dumps(records, indent=2))
    print(f"{len(documents)} documents; training the tokenizer", flush=True)
    prepare(work, phases[0], documents)
    for recipe in phases:
        print(f"training for {recipe.minutes:.1f} minutes; progress in {work / 'history.jsonl'}", flush=True)
        run(work, recipe)
    print(f"saved {work / 'model'}; next: python -m data.model_card --work {work}", flush=True)


if __name__ == "__main__":
    main()
