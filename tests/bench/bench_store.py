"""Bytes per decision, and millions of decisions per second of writing, reading and counting. ``python -m tests.bench.bench_store``

OLMoE's shape: 16 sites, 64 experts, top-8; Zipf tokens, experts that depend on the token, bfloat16 weights. One process;
wall seconds of reading, CPU seconds of the rest; the best of three.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis.layout import read_routing, room_for, write_routing, write_scores
from analysis.stats import part_statistics
from analysis.trace import LayerInfo, Part, SiteRouting
from tests.synthetic import make_part, site

SITES, EXPERTS, TOP_K, TOKENS = 16, 64, 8, 65_536


def zipf_part(layers: tuple[LayerInfo, ...], n: int, seed: int = 0) -> Part:
    """One part of n tokens in documents of 512, with weights that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.zipf(1.3, n), 4_000)
    routing = []
    for layer in layers:
        affinity = rng.normal(0, 1.5, (4_001, layer.n_experts)).astype(np.float32)
        logits = affinity[tokens] + rng.normal(0, 1, (n, layer.n_experts)).astype(np.float32)
        experts = np.argsort(-logits, 1)[:, : layer.top_k]
        p = np.exp(np.take_along_axis(logits, experts, 1) - logits.max(1, keepdims=True))
        weights = ((p / p.sum(1, keepdims=True)).view(np.uint32) & 0xFFFF0000).view(np.float32)
        routing.append(SiteRouting(experts.astype(np.int16), weights, experts.astype(np.int16)))
    routing = [replace(r, chosen=r.experts) for r in routing]
    return replace(make_part(layers, [512] * (n // 512)), routing=tuple(routing))


def best(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Least seconds of three runs of ``work``."""
    seconds = []
    for _ in range(3):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


def main() -> None:
    layers = tuple(site(i, EXPERTS, TOP_K) for i in range(SITES))
    part = zipf_part(layers, TOKENS)
    decisions = TOKENS * SITES * TOP_K
    with tempfile.TemporaryDirectory() as folder:
        routing, scores = Path(folder) / "routing.parquet", Path(folder) / "scores.parquet"
        write = best(lambda: write_routing(part, layers, routing), time.process_time)
        score = best(lambda: write_scores(part, layers, scores), time.process_time)
        read = best(lambda: read_routing(routing, layers, 0, TOKENS, [room_for(x, TOKENS, False) for x in layers]))
        one = best(lambda: read_routing(routing, layers[7:8], 1_000, 1_500, [room_for(layers[7], 500, False)]))
        print(f"{TOKENS} tokens x {SITES} sites x top-{TOP_K} of {EXPERTS} = {decisions / 1e6:.1f} M decisions")
        print(f"routing      {routing.stat().st_size / decisions:.3f} bytes per decision")
        print(f"scores       {scores.stat().st_size / decisions:.3f} bytes per decision (random float32 scores: an upper bound)")
        print(
            f"write        {decisions / write / 1e6:.1f} M decisions per CPU second, their scores {decisions / score / 1e6:.1f}, without fsync and digests"
        )
        print(f"read all     {decisions / read / 1e6:.1f} M decisions per second of wall time, warm")
        print(f"read 500     {one * 1e3:.1f} ms for 500 rows of one site")
    count = best(lambda: part_statistics(part, layers), time.process_time)
    print(f"statistics   {decisions / count / 1e6:.2f} M decisions per CPU second, all statistics")


if __name__ == "__main__":
    main()
