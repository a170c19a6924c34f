"""What a cluster of two one-CPU nodes gains over one process: python -m tests.bench.bench_cluster (needs requirements-cluster.txt)"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from analysis.capture import capture
from analysis.cluster import Cluster, capture_on_cluster
from analysis.models import load_model
from tests import tiny
from tests.bench.bench_capture import model_of_issue
from tests.raylets import documents, two_nodes

ROUNDS, DOCUMENTS = 3, 320
OPTIONS: dict[str, Any] = {"batch_size": 8, "part_tokens": 4096}


def rate(work: Callable[..., Any], out: Path) -> tuple[float, float]:
    """(tokens a second between the first report after every process had loaded and the last, wall seconds of the whole)."""
    seen: list[Any] = []
    began = time.monotonic()
    work(out=out, progress=seen.append, **OPTIONS)
    half = [p for p in seen if p.documents >= DOCUMENTS // 2]  # by then both replicas are at work
    return (half[-1].tokens - half[0].tokens) / (half[-1].seconds - half[0].seconds), time.monotonic() - began


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, two_nodes():
        path = Path(folder) / "model"
        model_of_issue().save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        loaded, texts = load_model(path), documents(DOCUMENTS, 160)

        def alone(**given: Any) -> None:
            capture(*loaded, texts, model_path=path, **given)

        def spread(replicas: int) -> Callable[..., None]:
            return lambda **given: capture_on_cluster(path, texts, cluster=Cluster(replicas=replicas), **given) and None

        ways = {"one process, model loaded": alone, "1 worker": spread(1), "2 workers": spread(2)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for i in range(ROUNDS):
            for name, work in ways.items():
                found[name].append(rate(work, Path(folder) / f"run-{i}-{len(found[name])}-{name[0]}"))
    one = statistics.median(r for r, _ in found["1 worker"])
    for name, pairs in found.items():
        tokens, wall = (statistics.median(x) for x in zip(*pairs, strict=True))
        print(f"{name}: {tokens:,.0f} tokens/s ({tokens / one:.2f} of 1 worker), {wall:.1f} s in all with starting and loading")


if __name__ == "__main__":
    main()
