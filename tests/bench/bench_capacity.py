"""Millions of assignments per CPU second for a whole capacity curve, and how the frameworks' own methods compare.

OLMoE's shape: 65,536 tokens, 64 experts, top-8, batches of 2,048 tokens; 76 capacity factors; one thread; CPU seconds, the
best of several. A framework's method answers one factor (which assignments are kept); its curve is 76 times that. Every
method's answer is checked against ours at that factor before it is timed. ``python -m tests.bench.bench_capacity``
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from analysis.capacity import capacity_curves, rank_trace
from analysis.overflow import FACTORS
from analysis.policies import rank_site, site_curve, warm_up
from analysis.slots import expert_capacity, make_batches
from tests.synthetic import make_part, make_trace, site

TOKENS, EXPERTS, TOP_K, BATCH, FACTOR = 65_536, 64, 8, 2_048, 1.0
CAPACITY = expert_capacity(BATCH, EXPERTS, TOP_K, FACTOR)


def routed(tokens: int = TOKENS, bfloat16: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(experts int16, softmax weights) of skewed routing, first choice first."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (tokens, EXPERTS)) + rng.normal(0, 0.7, EXPERTS)
    experts = np.argsort(-logits, 1)[:, :TOP_K]
    p = np.exp(logits)
    weights = np.take_along_axis(p / p.sum(1, keepdims=True), experts, 1).astype(np.float32)
    return experts.astype(np.int16), (weights.view(np.uint32) & 0xFFFF0000).view(np.float32) if bfloat16 else weights


def best(work: Callable[[], object], seconds: float = 2.0) -> float:
    """Least CPU seconds of one call, over calls that take about ``seconds`` together, at least three."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def megatron(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Megatron-LM "probs": scatter to [S, E], top C of each expert. bool [S, k]."""
    dense = torch.zeros(len(experts), EXPERTS).scatter(1, experts, weights)
    _, top = torch.topk(dense, k=CAPACITY, dim=0, sorted=False)
    mask = torch.zeros(len(experts), EXPERTS).scatter(0, top, 1.0).bool()
    return mask.gather(1, experts)


def gshard(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """GShard and DeepSpeed: one-hot and cumulative sum per choice, each from the loads before it. bool [S, k]."""
    kept, load = [], torch.zeros(EXPERTS, dtype=torch.int64)
    for choice in range(TOP_K):
        mask = torch.nn.functional.one_hot(experts[:, choice], EXPERTS)
        locations = torch.cumsum(mask, dim=0) - 1 + load
        load = load + mask.sum(0)
        kept.append((mask * torch.lt(locations, CAPACITY)).sum(1).bool())
    return torch.stack(kept, 1)


def switch(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """transformers' Switch router, for k choices: one-hot and cumulative sum over tokens and choices. bool [S, k]."""
    hot = torch.nn.functional.one_hot(experts.flatten(), num_classes=EXPERTS)
    return (hot * (torch.cumsum(hot, dim=-2) <= CAPACITY)).sum(-1).bool().reshape(experts.shape)


def agreement(mine: np.ndarray, theirs: np.ndarray, weights: np.ndarray, policy: str) -> str:
    """Equal, or for torch.topk, whose order among ties is its own: equal in number and in gate weight per policy."""
    if np.array_equal(mine, theirs):
        return "kept mask equal"
    same = policy == "probability" and mine.sum() == theirs.sum() and abs(weights[mine].sum() / weights[theirs].sum() - 1) < 1e-6
    if not same:
        raise AssertionError(f"{policy}: the framework's method keeps others than ours")
    return "equal in number and weight; torch.topk orders ties otherwise"


def compare(experts: np.ndarray, weights: np.ndarray) -> None:
    """Frameworks' methods at one factor, batch by batch, against our whole curve under the same policy."""
    batches = make_batches([BATCH] * (TOKENS // BATCH))
    n, cheapest = experts.size, best(lambda: site_curve(experts, weights, EXPERTS, batches))
    for name, policy, method in (("Megatron-LM top-k per expert", "probability", megatron),
                                 ("GShard, DeepSpeed one-hot cumulative sum", "choice", gshard),
                                 ("transformers' Switch, for k choices", "position", switch)):  # fmt: skip
        split = [(torch.from_numpy(experts[i : i + BATCH].astype(np.int64)), torch.from_numpy(weights[i : i + BATCH]))
                 for i in range(0, TOKENS, BATCH)]  # fmt: skip
        theirs = torch.cat([method(e, w) for e, w in split]).numpy()
        said = agreement(rank_site(experts, weights, EXPERTS, batches, policy).at(FACTOR).kept, theirs, weights, policy)
        one = best(lambda method=method, split=split: [method(e, w) for e, w in split])
        curve = best(lambda policy=policy: site_curve(experts, weights, EXPERTS, batches, policy))
        ratios = [len(FACTORS) * one / ours for ours in (curve, cheapest)]
        print(f"{name}: {n / one / 1e6:.1f} M/s for one factor, so its curve takes {ratios[0]:,.0f} x ours under the same policy "
              f"({policy}), {ratios[1]:,.0f} x ours by position ({said})")  # fmt: skip


def interaction() -> None:
    """A run of a million tokens, one site: what a moved slider asks for."""
    layers = (site(0, EXPERTS, TOP_K),)
    part = make_part(layers, [500] * 2_000)
    trace = make_trace(layers, [part])
    start = time.process_time()
    ranked = rank_trace(trace, scope="documents", size=4, mixed=0)
    print(f"1,000,000 tokens, one site, ranked once: {time.process_time() - start:.2f} s")
    for name, work in (("totals and experts", lambda: (ranked.at(1.25).by_layer(), ranked.at(1.25).by_expert())),
                       ("labels", lambda: ranked.at(1.25).by_label()), ("positions", lambda: ranked.at(1.25).by_position()),
                       ("curve, 76 factors, with chance", lambda: capacity_curves(trace, scope="documents", size=4, mixed=0))):  # fmt: skip
        print(f"  another factor: {name}: {best(work, 1) * 1e3:.0f} ms")


def main() -> None:
    torch.set_num_threads(1)
    fresh = "import time; a = time.process_time(); import numba; print(time.process_time() - a)"
    spent = float(subprocess.run([sys.executable, "-c", "import numpy\n" + fresh], capture_output=True, text=True, check=True).stdout)
    start = time.process_time()
    warm_up()
    print(f"import of numba {spent:.2f} s; kernels loaded or compiled in {time.process_time() - start:.2f} s")
    experts, weights = routed()
    full = routed(bfloat16=False)[1]
    for size in (BATCH, TOKENS):
        batches = make_batches([size] * (TOKENS // size))
        for policy, w in (
            ("position", weights),
            ("choice", weights),
            ("probability", weights),
            ("probability", full),
            ("batch_priority", weights),
        ):
            rate = experts.size / best(lambda p=policy, w=w, b=batches: site_curve(experts, w, EXPERTS, b, p)) / 1e6
            print(
                f"curve of {len(FACTORS)} factors, batches of {size}, {policy}{' (float32 weights)' if w is full else ''}: {rate:.0f} M/s"
            )
    compare(experts, weights)
    interaction()


if __name__ == "__main__":
    main()
