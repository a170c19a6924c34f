"""What a second worker gains on a cluster of two one-CPU nodes: python -m tests.bench.bench_cluster (needs requirements-cluster.txt)

Both workers share this machine, so what else runs on it counts: CPU seconds say what the work costs, wall seconds what it was given.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from analysis.capture import CaptureCancelled
from analysis.cluster import Cluster, capture_on_cluster
from tests import tiny
from tests.bench.bench_capture import EXPERTS, LAYERS, TOP_K, model_of_issue
from tests.raylets import documents, two_nodes

ROUNDS, SECONDS = 2, 18.0  # of a run, from when every worker has loaded
OPTIONS: dict[str, Any] = {"batch_size": 8, "part_tokens": 4096}


def rates(model: Path, texts: list[str], out: Path, replicas: int) -> tuple[float, float, float, float]:
    """Tokens per wall second and per CPU second of the workers, workers' CPU seconds per wall second, seconds until all had loaded.

    The first part goes to the worker that was started last: once it is there, all have loaded.
    """
    seen: list[tuple[float, int, float]] = []
    began = time.monotonic()

    def note(progress: Any) -> None:
        if (out / "progress/part-00000.json").exists():
            workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Replica")]
            seen.append((time.monotonic(), progress.tokens, sum(sum(p.cpu_times()[:2]) for p in workers)))

    with suppress(CaptureCancelled):
        capture_on_cluster(model, texts, out=out, cluster=Cluster(replicas=replicas), progress=note,
                           cancelled=lambda: bool(seen) and seen[-1][0] - seen[0][0] > SECONDS, **OPTIONS)  # fmt: skip
    wall, tokens, cpu = (b - a for a, b in zip(seen[0], seen[-1], strict=True))
    return tokens / wall, tokens / cpu, cpu / wall, seen[0][0] - began


def main() -> None:
    found: dict[int, list[tuple[float, float, float, float]]] = {1: [], 2: []}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder, two_nodes():
        path, texts = Path(folder) / "model", documents(1000, 160)
        model_of_issue().save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        for i in range(ROUNDS):
            for replicas, pairs in found.items():
                pairs.append(rates(path, texts, Path(folder) / f"run-{i}-{replicas}", replicas))
                loads.append(os.getloadavg()[0])
                print(
                    f"{replicas} of 2 workers: {pairs[-1][0]:,.0f} tokens/s, {pairs[-1][2]:.2f} cores got, load {loads[-1]:.1f}", flush=True
                )
    print(f"{LAYERS} layers, {EXPERTS} experts, top {TOP_K}; medians of {ROUNDS} runs of {SECONDS:.0f} s after loading; {os.cpu_count()} cores,"
          f" load {min(loads):.1f} to {max(loads):.1f}")  # fmt: skip
    one = [statistics.median(x) for x in zip(*found[1], strict=True)]
    for replicas, pairs in found.items():
        wall, cpu, cores, loading = (statistics.median(x) for x in zip(*pairs, strict=True))
        print(f"{replicas} workers: {wall:,.0f} tokens/s ({wall / one[0]:.2f} of one), {cpu:,.0f} per CPU second ({cpu / one[1]:.2f} of one),"
              f" {cores:.2f} cores got, {loading:.0f} s until loaded")  # fmt: skip


if __name__ == "__main__":
    main()
