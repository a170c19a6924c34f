"""Capture against a bare forward, alternating, medians; and memory of a long capture: python -m tests.bench.bench_capture"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from analysis.capture import capture_parts, recording
from analysis.models import load_model
from analysis.routers import find_sites
from tests import tiny

MODEL = Path(__file__).parent.parent.parent / "data" / "demo-model"
ROUNDS = 15


def seconds(work: object) -> float:
    start = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - start


def overhead() -> None:
    """Ratio of process CPU time: hooks that copy ids, weights and logits, over nothing at all; 4 x 256 tokens."""
    model, _ = load_model(MODEL, dtype="float32")
    sites = find_sites(model)
    ids = torch.randint(0, 8_000, (4, 256))

    def bare() -> None:
        model(ids, use_cache=False)

    def captured() -> None:
        with recording(model, sites) as recorder:
            model(ids, use_cache=False)
            recorder.take()

    with torch.inference_mode():
        pairs = [(seconds(bare), seconds(captured)) for _ in range(ROUNDS + 2)][2:]
    bare_time, ratio = statistics.median(b for b, _ in pairs), statistics.median(c / b for b, c in pairs)
    print(f"forward of 4 x 256 tokens: bare {1000 * bare_time:.1f} ms CPU, captured / bare {ratio:.3f} (median of {ROUNDS} pairs)")


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def memory(tokens: int = 1_000_000) -> None:
    """Resident memory after the first part and at the end of a capture of ``tokens`` tokens."""
    model, tokenizer = tiny.build("olmoe"), tiny.tokenizer()
    texts = ("x" * 250 for _ in range(tokens // 250))
    marks, start = [], time.monotonic()
    for part in capture_parts(model, tokenizer, texts, batch_size=16):
        del part
        marks.append(resident())
    rate = tokens / (time.monotonic() - start)
    print(f"{tokens:,} tokens in {len(marks)} parts: {marks[0]:.0f} MB after the first, {max(marks):.0f} MB at most, {rate:,.0f} tokens/s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    overhead()
    memory()
