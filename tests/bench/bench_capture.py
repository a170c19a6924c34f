"""What capture costs: time against a bare forward and against router logits, bytes kept, memory: python -m tests.bench.bench_capture"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis.capture import _written_behind, capture, capture_parts, recording
from analysis.models import model_card
from analysis.routers import find_sites
from analysis.writing import RunWriter
from tests import tiny
from tests.families import FAMILIES

ROUNDS = 15
LAYERS, EXPERTS, TOP_K = 16, 64, 8
TOKENS = (4, 256)


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def model_of_issue() -> Any:
    """16 layers, 64 experts, top 8; small hidden size, so that the model itself hides little of what hooks cost."""
    small = {"hidden_size": 64, "intermediate_size": 64}
    return FAMILIES["olmoe"].build(num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=TOP_K, **small)


def overhead() -> None:
    """Ratios of process CPU time, alternating, medians over pairs: a bare forward, router logits asked for, captured."""
    model = model_of_issue()
    sites = find_sites(model)
    ids = torch.randint(4, tiny.VOCABULARY, TOKENS)

    def forward(**asked: bool) -> None:
        model(ids, use_cache=False, **asked)

    def captured() -> None:
        with recording(model, sites) as recorder:
            forward()
            recorder.take()

    ways = (forward, partial(forward, output_router_logits=True), captured)
    with torch.inference_mode():
        rounds = [[seconds(way) for way in ways] for _ in range(ROUNDS + 2)][2:]
    bare = statistics.median(r[0] for r in rounds)
    against = [statistics.median(r[2] / r[i] for r in rounds) for i in (0, 1)]
    asked = statistics.median(r[1] / r[0] for r in rounds)
    print(
        f"{LAYERS} layers, {EXPERTS} experts, top {TOP_K}, prefill of {TOKENS[0]} x {TOKENS[1]} tokens, one thread: bare {1000 * bare:.1f} ms CPU"
    )
    print(
        f"captured / bare {against[0]:.3f}, captured / router logits {against[1]:.3f}, router logits / bare {asked:.3f} (medians of {ROUNDS})"
    )


def stored(dtype: torch.dtype, length: int = 200) -> None:
    """Bytes on disk of a run, against the logits of all experts in fp32."""
    model, tokenizer = model_of_issue().to(dtype), tiny.tokenizer()
    texts = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        trace = capture(model, tokenizer, [texts[i : i + length] for i in range(0, len(texts), length)], out=Path(folder) / "run")
        sizes = {part: sum(f.stat().st_size for f in (Path(folder) / "run" / part).iterdir()) for part in ("routing", "scores")}
    rows = trace.n_tokens("decoder") * LAYERS
    full = rows * EXPERTS * 4
    shares = ", ".join(f"{name} {size / rows:.1f} bytes ({size / full:.3f})" for name, size in sizes.items())
    print(f"{str(dtype).removeprefix('torch.')}: per token and site on disk {shares}; all logits in fp32 {EXPERTS * 4} bytes")


def behind(rounds: int = 5) -> None:
    """Ratios of wall and CPU time: parts written while the model works on the next, against one after the other; medians over pairs."""
    model, tokenizer = model_of_issue(), tiny.tokenizer()
    texts = [f"{i:03d} " + "x y z " * 40 for i in range(130)]

    def one(way: Callable[[RunWriter, Any], None]) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder, RunWriter.open(Path(folder) / "run", model_card(model, tokenizer), {}) as writer:
            wall, cpu = time.monotonic(), time.process_time()
            way(writer, capture_parts(model, tokenizer, texts, part_tokens=4096))
            return time.monotonic() - wall, time.process_time() - cpu

    def after(writer: RunWriter, parts: Any) -> None:
        for part in parts:
            writer.write(part)

    pairs = [(one(after), one(_written_behind)) for _ in range(rounds + 1)][1:]
    wall, cpu = (statistics.median(b[i] / a[i] for a, b in pairs) for i in (0, 1))
    print(f"written behind / one after the other: wall {wall:.2f}, CPU {cpu:.2f} (medians of {rounds}; gains only where a core is idle)")


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
    behind()
    stored(torch.float32)
    stored(torch.bfloat16)
    memory()
