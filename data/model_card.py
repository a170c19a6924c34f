"""Measure the trained demo model on held-out text and write what ships: model, prompts, card.

    python -m data.model_card --work data/build

Every figure in the card comes from one capture of held-out documents, which are also checked by the product's own
invariants; nothing is typed in by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeForCausalLM

from analysis.balance import relative_load
from analysis.capture import capture
from analysis.models import load_model
from analysis.trace import Trace, by_document

HOME = Path(__file__).parent
PROMPTS_PER_DOMAIN = 9
PROMPT_TOKENS = 1_500
EVALUATION_TOKENS = 12_000  # per domain, in whole documents
SAMPLES = ("Elizabeth", "The king", "Vous pouvez", "import os", "static int", "Выберите", "选择", "\\begin{", "17 + 25 =")


def information(trace: Trace, site: int) -> float:
    """I(expert; domain) in bits over assignments, every domain with the same weight; 0 to log2 of the domains."""
    _, counts = trace.stats.label_load(site)
    given = counts / counts.sum(1, keepdims=True)
    overall = given.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(given > 0, given * np.log2(given / overall), 0.0)
    return float(terms.sum(1).mean())


def dropped_share(trace: Trace, factor: float, batches: Sequence[Sequence[tuple[int, int]]]) -> float:
    """Share of assignments beyond capacity ceil(T k / E x factor), over all layers and batches of row ranges."""
    over = whole = 0
    for layer in trace.layers:
        experts = trace.experts(layer.index)
        for batch in batches:
            ids = np.concatenate([experts[a:b] for a, b in batch])
            capacity = math.ceil(len(ids) * layer.top_k / layer.n_experts * factor)
            load = np.bincount(ids.ravel(), minlength=layer.n_experts)
            over += np.maximum(load - capacity, 0).sum()
            whole += load.sum()
    return float(over / whole)


def unigram_losses(streams: dict[str, np.ndarray], trace: Trace, vocabulary: int) -> dict[str, float]:
    """Nats per token of a unigram model of each domain's own training text (add-one), on the same held-out tokens."""
    tokens = trace.stream_tokens("decoder")
    ids, loss = tokens["token_id"].to_numpy(), tokens["loss"].to_numpy(zero_copy_only=False)
    labels = np.array(tokens["label"].to_pylist())
    predicted = np.append(np.isfinite(loss)[:-1], False)
    out = {}
    for domain, stream in streams.items():
        counts = np.bincount(stream, minlength=vocabulary) + 1.0
        targets = ids[1:][(predicted & (labels == domain))[:-1]]
        out[domain] = float(-np.log(counts / counts.sum())[targets].mean())
    return out


def held_out(path: Path) -> list[dict[str, str]]:
    """Held-out documents in a fixed order that mixes sources."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda r: hashlib.sha256(r["text"].encode()).hexdigest())


def write_prompts(documents: Sequence[dict[str, str]], tokenizer: Any, path: Path) -> None:
    """The first PROMPTS_PER_DOMAIN held-out documents of each domain that have at most PROMPT_TOKENS, as JSON lines."""
    prompts = []
    for domain in sorted({d["domain"] for d in documents}):
        fitting = (d for d in documents if d["domain"] == domain and len(tokenizer(d["text"])["input_ids"]) <= PROMPT_TOKENS)
        mine = itertools.islice(fitting, PROMPTS_PER_DOMAIN)
        prompts += [{"text": d["text"], "label": domain, "name": f"{domain} {i}"} for i, d in enumerate(mine, 1)]
    path.write_text("\n".join(json.dumps(p, ensure_ascii=False) for p in prompts) + "\n", encoding="utf-8")


def evaluate(model: Any, tokenizer: Any, documents: Sequence[dict[str, str]]) -> Trace:
    """Capture whole held-out documents, up to EVALUATION_TOKENS per domain."""
    taken, budget = [], {d["domain"]: EVALUATION_TOKENS for d in documents}
    for d in documents:
        if budget[d["domain"]] > 0:
            budget[d["domain"]] -= len(tokenizer(d["text"])["input_ids"])
            taken.append(d)
    taken = [d for d in taken if len(tokenizer(d["text"])["input_ids"]) <= 2_048]
    return capture(model, tokenizer, [d["text"] for d in taken], labels=[d["domain"] for d in taken], batch_size=4)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def samples(model: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """A continuation of each of SAMPLES, at temperature 0.8, top-p 0.92, repetition penalty 1.15, seed 0."""
    out = []
    for text in SAMPLES:
        torch.manual_seed(0)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True, temperature=0.8,
                              top_p=0.92, repetition_penalty=1.15, pad_token_id=0)  # fmt: skip
        out.append((text, tokenizer.decode(made[0, ids.shape[1] :])))
    return out


def card(work: Path, folder: Path, trained: Trace, untrained: Trace, made: Sequence[tuple[str, str]]) -> str:
    """The model card as Markdown, from measured values."""
    phases = json.loads((work / "recipe.json").read_text())
    sources = json.loads((work / "sources.json").read_text())
    base = unigram_losses(dict(np.load(work / "streams.npz")), trained, trained.model.vocab_size)
    losses = trained.stats.losses()
    domains = sorted(base)
    digests = [
        (p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(folder.iterdir()) if p.suffix != ".md"
    ]
    ranges = [(a, b, d) for _, a, b, d in by_document(trained.documents)]
    single = [[(a, b)] for a, b, _ in ranges]
    mixed = [list(batch) for batch in zip(*([(a, b) for a, b, d in ranges if d == domain] for domain in domains), strict=False)]
    quality = [(d, losses[d][0], f"{losses[d][1]:.3f}", f"{math.exp(losses[d][1]):.1f}", f"{math.exp(base[d]):.0f}") for d in domains]
    mean = sum(losses[d][1] for d in domains) / len(domains)
    routing = []
    for layer in trained.layers:
        relative = relative_load(trained.stats.load(layer.index))
        routing.append((layer.index, f"{information(trained, layer.index):.2f}", f"{information(untrained, layer.index):.2f}",
                        f"{relative.max():.2f}", f"{relative.min():.2f}", int((relative == 0).sum())))  # fmt: skip
    loads = [(x.index, *(f"{r:.2f}" for r in relative_load(trained.stats.load(x.index)))) for x in trained.layers]
    drops = [(f, f"{dropped_share(trained, f, mixed):.1%}", f"{dropped_share(trained, f, single):.1%}") for f in (1.0, 1.25, 1.5)]
    n = trained.n_tokens()
    sections = [
        "# Demo model",
        f"A mixture-of-experts decoder trained from scratch for Routerscope by `make demo-model`: stock `OlmoeForCausalLM`, 6 layers, "
        f"16 experts, top-2, {trained.model.parameters / 1e6:.2f} million parameters ({trained.model.active_parameters / 1e6:.2f} "
        "million active per token), byte-level BPE of 8,192 tokens. It exists to show routing. It writes in the style of its "
        "domains and means nothing: do not use it to generate text, or to judge anything but a router.",
        "## Training data",
        table(("domain", "package", "archive", "licence of the text", "characters"),
              [(s["domain"], f"{s['package']} ({s['registry']})", f"`{s['archive']}`", s["licence"], f"{s['characters']:,}") for s in sources]),
        "About 3 % of documents, chosen by digest and deduplicated, are held out. They come from the same books and projects as "
        "the training text, so the figures below are mildly optimistic. `data/demo-prompts.jsonl` holds some of them, under the "
        "licences above (MPL-2.0 for French, Russian and Chinese; LPPL for LaTeX; PSF-2.0 for Python).",
        "## Recipe",
        "\n".join(
            f"{i}. {p['steps']:,} steps, {p['tokens']:,} tokens in {p['minutes']:g} minutes on two CPU cores; Muon ({p['muon_rate']}) on"
            f" matrices, AdamW ({p['adam_rate']}) on embedding, router and norms; balance loss {p['balance']} falling to"
            f" {p['last_balance']} per layer over each process's batch (not pooled over layers), z-loss {p['z']}."
            for i, p in enumerate(phases, 1)
        ),
        f"Seed {phases[0]['seed']}; each phase starts from the model of the one before. Everything else: `plan` in `data/train_demo.py`.",
        "```json\n" + json.dumps(phases, indent=1) + "\n```",
        "## Quality on held-out text",
        table(("domain", "tokens predicted", "loss (nats/token)", "perplexity", "unigram perplexity"), quality),
        f"Mean loss over the {len(domains)} domains: {mean:.3f} nats per token. The unigram baseline is fitted to the domain's own training text.",
        "## Routing on held-out text",
        f"n = {n:,} tokens. I(expert; domain) in bits over assignments, domains weighted equally, at most log2({len(domains)}) = "
        f"{math.log2(len(domains)):.2f}; the untrained column is the same architecture with random weights on the same text. "
        "Sampling alone would give under 0.01 bits at this n.",
        table(("layer", "I(expert; domain)", "untrained", "largest load / even", "smallest load / even", "dead experts"), routing),
        "Load per expert relative to an even share:",
        table(("layer", *range(16)), loads),
        "Share of assignments dropped if capacity were enforced, C = ceil(T k / E x CF). Capacity is a property of the batch: "
        "a batch of one document per domain, against one document alone.",
        table(("CF", "mixed batch", "single document"), drops),
        "## Samples",
        "Temperature 0.8, top-p 0.92, repetition penalty 1.15, seed 0; one try each.",
        table(("prompt", "continuation"), [(f"`{json.dumps(a, ensure_ascii=False)}`", f"`{json.dumps(b, ensure_ascii=False).replace('|', chr(92) + '|').replace('`', chr(39))}`") for a, b in made]),
        "## Files",
        table(("file", "bytes", "sha256"), digests),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HOME / "build")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, folder = arguments.work, HOME / "demo-model"
    folder.mkdir(exist_ok=True)
    for path in (work / "model").iterdir():
        shutil.copyfile(path, folder / path.name)
    documents = held_out(work / "held-out.jsonl")
    model, tokenizer = load_model(folder)
    trained = evaluate(model, tokenizer, documents)
    torch.manual_seed(0)
    blank = OlmoeForCausalLM(model.config).to(model.dtype).eval()
    untrained = evaluate(blank, tokenizer, documents)
    write_prompts(documents, tokenizer, HOME / "demo-prompts.jsonl")
    text = card(work, folder, trained, untrained, samples(model, tokenizer))
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
