"""The proofs of every family on another device, and what capture costs there: python -m tests.bench.check_device cuda.

Exit status 1 if a proof fails. ``python -m tests.bench.check_device cuda --speed`` measures alone: prefill tokens per second of a model shaped
as OLMoE-1B-7B (random bfloat16 weights) bare, recorded and captured; on the CPU of a small one, to see that it works.
"""

from __future__ import annotations

import random
import statistics
import string
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from analysis.capture import capture_parts
from analysis.recorder import recording
from analysis.routers import find_sites
from tests import tiny
from tests.families import FAMILIES, Family
from tests.proofs import of_experts, prove_perturbed, prove_recomputed, record, relative, rows, run, watching

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# dtype: (largest error of a recomputation, smallest of a broken one, factor of a perturbation)
TOLERANCES = {torch.float32: (1e-4, 1e-4, 3.0), torch.bfloat16: (0.03, 0.06, 50.0), torch.float16: (0.03, 0.06, 50.0)}
BIG = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
       "head_dim": 128, "vocab_size": 50_304, "num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 4096}  # fmt: skip


def prove(family: Family, device: str, dtype: torch.dtype) -> None:
    """Both proofs, and outputs that do not depend on the hooks, under each implementation of the experts the family has."""
    tolerance, broken, factor = TOLERANCES[dtype]
    model = family.build().to(device)
    for module in model.modules():  # as a loader does: a router that wants float32 keeps it
        keep = dtype != torch.float32 and type(module).__name__ == "Inkling2TopKRouter"
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(p.float() if keep else p.to(dtype), requires_grad=False))
    switchable = all(hasattr(s.experts, "has_gate") for s in find_sites(model))
    for name in IMPLEMENTATIONS if switchable else IMPLEMENTATIONS[:1]:
        if switchable:
            model.set_experts_implementation(name)
        bare = run(model)
        with recording(model) as recorder:
            if not torch.equal(run(model), bare):
                raise AssertionError(f"{name}: the output depends on the hooks")
        recorder.take()
        prove_recomputed(model, tolerance, broken)
        prove_perturbed(model, factor)


def big(device: str, **values: int) -> Any:
    """OLMoE-1B-7B in shape, random in bfloat16; ``values`` override its config."""
    with torch.device(device):
        model = FAMILIES["olmoe"].model_class._from_config(FAMILIES["olmoe"].config(**BIG | values), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.5 if ".gate." in name else 0.02)
    return model


def measure(device: str, rounds: int = 7) -> None:
    """Prefill of 32 texts of 1,024 tokens, 8 at a time: medians of alternating rounds after one that is not counted."""
    model = (
        big(device)
        if device != "cpu"
        else big(device, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=4, vocab_size=512)
    )
    tokens, size = (1024, 8) if device != "cpu" else (64, 2)
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.ascii_letters, k=tokens)) for _ in range(4 * size)]  # a token each
    tokenizer, sites = tiny.tokenizer(), find_sites(model)
    batches = torch.tensor(tokenizer(texts)["input_ids"], device=device).split(size)

    def bare() -> None:
        for ids in batches:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    def recorded() -> None:
        for ids in batches:
            with recording(model, sites) as recorder:
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                recorder.hand_over()

    def captured() -> None:
        for _ in capture_parts(model, tokenizer, texts, batch_size=size):
            pass

    def rate(work: Callable[[], None]) -> float:
        start = time.monotonic()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return 4 * size * tokens / (time.monotonic() - start)

    with torch.inference_mode():
        found = [[rate(work) for work in (bare, recorded, captured)] for _ in range(rounds + 1)][1:]
    whole = [statistics.median(r[i] for r in found) for i in range(3)]
    ratio = [statistics.median(r[i] / r[0] for r in found) for i in (1, 2)]
    print(f"prefill tokens/s: bare {whole[0]:,.0f}; recorded {whole[1]:,.0f}, {ratio[0]:.3f} of bare (hooks alone); captured"
          f" {whole[2]:,.0f}, {ratio[1]:.3f} (scores, loss, predictions and parts too). Medians of {rounds}")  # fmt: skip


def prove_big(device: str) -> None:
    """A model of 7 billion random parameters in bfloat16: 1024 tokens, the first and last site recomputed."""
    model = big(device)
    routed, sites = record(model, 512), find_sites(model)
    for at in (0, len(sites) - 1):
        seen: dict[Any, Any] = {}
        with watching([sites[at].experts], seen):
            run(model, 512)
        hidden, ids, weights = seen[sites[at].experts][0]
        if not (torch.equal(ids, routed[at].ids) and torch.equal(weights, routed[at].weights)):
            raise AssertionError(f"site {at}: recorded {routed[at].ids[0].tolist()}, executed {ids[0].tolist()}")
        again = sum(rows(sites[at].experts(hidden, ids[:, [k]], weights[:, [k]])).float() for k in range(ids.shape[1]))
        if relative(again, of_experts(model, sites[at], seen).float()) > 0.03:
            raise AssertionError(f"site {at}: its output does not follow from the recorded ids and weights")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.1f}B parameters, {len(routed[0].ids)} tokens, {len(sites)} sites")


def attempt(what: str, work: Callable[[], None]) -> int:
    """1 if ``work`` fails, after saying how; else 0."""
    start = time.monotonic()
    try:
        work()
    except Exception as error:
        print(f"FAILED {what}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", flush=True)
        return 1
    print(f"exact  {what} ({time.monotonic() - start:.1f} s)", flush=True)
    return 0


def main(device: str, names: list[str]) -> int:
    if names == ["--speed"]:
        measure(device)
        return 0
    failed = 0
    for dtype in TOLERANCES:
        for name in names or list(FAMILIES):
            failed += attempt(f"{name} {dtype}", lambda n=name, d=dtype: prove(FAMILIES[n], device, d))  # type: ignore[misc]
    if not names and device != "cpu":
        failed += attempt("a big model", lambda: prove_big(device))
        measure(device)
    print(f"{failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda", sys.argv[2:]))
