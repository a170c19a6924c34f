"""What a second worker gains on a cluster of two one-CPU nodes: python -m tests.bench.bench_cluster (needs requirements-cluster.txt)

Workers share this machine with each other and with whatever else runs on it. So the same work is also done by one and by two processes
that know nothing of each other: what two of them gain is what this machine has to give, and the cluster is measured against that.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from analysis.capture import CaptureCancelled, plan_parts
from analysis.cluster import Cluster, Replica, capture_on_cluster
from analysis.writing import RunWriter
from tests import tiny
from tests.bench.bench_capture import EXPERTS, LAYERS, TOP_K, model_of_issue
from tests.raylets import documents, two_nodes

ROUNDS, SECONDS = 2, 15.0  # of a measurement, from when every worker has loaded and written a part
OPTIONS: dict[str, Any] = {"batch_size": 8, "part_tokens": 2048}  # small, for whole parts are counted


class Rate(NamedTuple):
    """Tokens per wall second and per CPU second of the workers, cores that they got, cores that everything around them took."""

    wall: float
    cpu: float
    cores: float
    around: float


def texts() -> list[str]:
    return documents(3000, 160)


def alone(model: Path, out: Path) -> None:
    """One process without a cluster: capture a part, wait for a line, capture for SECONDS; prints tokens, wall and CPU seconds."""
    replica, given = Replica(model, {}, 1), texts()
    card, planned = replica.plan(given)
    plan = plan_parts(planned, OPTIONS["part_tokens"])
    with RunWriter.open(out, card, OPTIONS):
        tokens, wall, cpu = 0, 0.0, 0.0
        for part in plan:
            replica.capture(part, card, given[part.first_document : part.first_document + len(part.documents)], str(out), OPTIONS)
            if not part.index:
                print("loaded", flush=True)
                sys.stdin.readline()
                began, spent = time.monotonic(), time.process_time()
                continue
            tokens, wall, cpu = tokens + part.rows["decoder"], time.monotonic() - began, time.process_time() - spent
            if wall > SECONDS:
                break
        else:
            raise SystemExit("the texts are too few for this machine")
    print(tokens, wall, cpu)


def processes(model: Path, out: Path, n: int) -> Rate:
    """``n`` processes at once, each with its own folder."""
    command = [sys.executable, "-m", "tests.bench.bench_cluster", "alone", str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as Ray has it for a worker of one CPU
    running = [subprocess.Popen([*command, f"{out}-{i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
               for i in range(n)]  # fmt: skip
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "loaded\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [[float(x) for x in process.communicate()[0].split()] for process in running]
    tokens, cpu = sum(t for t, _, _ in found), sum(c for _, _, c in found)
    return Rate(sum(t / w for t, w, _ in found), tokens / cpu, sum(c / w for _, w, c in found), 0.0)


def workers(model: Path, out: Path, n: int) -> Rate:
    """``n`` workers of the cluster. Each has one of the first ``n`` parts: once those are there, all have loaded."""
    seen: list[tuple[float, int, float, float]] = []
    others: dict[bool, list[psutil.Process]] = {True: [], False: []}  # by whether they are workers

    def note(progress: Any) -> None:
        if not all((out / f"progress/part-{i:05d}.json").exists() for i in range(n)):
            return
        if not seen:
            for process in psutil.Process().children(recursive=True):
                others[process.name().startswith("ray::Replica")].append(process)
        spent = {kind: sum(sum(p.cpu_times()[:2]) for p in found if p.is_running()) for kind, found in others.items()}
        seen.append((time.monotonic(), progress.tokens, spent[True], spent[False] + time.process_time()))

    with suppress(CaptureCancelled):
        capture_on_cluster(model, texts(), out=out, cluster=Cluster(replicas=n), progress=note,
                           cancelled=lambda: bool(seen) and seen[-1][0] - seen[0][0] > SECONDS, **OPTIONS)  # fmt: skip
    wall, tokens, cpu, around = (b - a for a, b in zip(seen[0], seen[-1], strict=True))
    return Rate(tokens / wall, tokens / cpu, cpu / wall, around / wall)


def measured(folder: Path) -> dict[tuple[str, int], Rate]:
    """Medians over ROUNDS, in each of which every way has its turn."""
    ways = [(name, way, n) for n in (1, 2) for name, way in (("process", processes), ("worker", workers))]
    found: dict[tuple[str, int], list[Rate]] = {(name, n): [] for name, _, n in ways}
    for i in range(ROUNDS):
        for name, way, n in ways:
            found[name, n].append(rate := way(folder / "model", folder / f"{name}-{i}-{n}", n))
            print(f"{n} {name}: {rate.wall:,.0f} tokens/s, {rate.cores:.2f} cores got, load {os.getloadavg()[0]:.1f}", flush=True)
    return {key: Rate(*(statistics.median(x) for x in zip(*rates, strict=True))) for key, rates in found.items()}


def report(found: dict[tuple[str, int], Rate], loads: Sequence[float]) -> None:
    print(f"{LAYERS} layers, {EXPERTS} experts, top {TOP_K}; medians of {ROUNDS} times {SECONDS:.0f} s after loading; {os.cpu_count()} cores,"
          f" load {min(loads):.1f} to {max(loads):.1f}")  # fmt: skip
    for (name, n), rate in found.items():
        plural = "" if n == 1 else "es" if name == "process" else "s"
        print(f"{n} {name}{plural}: {rate.wall:,.0f} tokens/s, {rate.cpu:,.0f} per CPU second,"
              f" {rate.cores:.2f} cores got, {rate.around:.2f} cores around them")  # fmt: skip
    gain = {name: found[name, 2].wall / found[name, 1].wall for name in ("process", "worker")}
    print(f"a second process gains {gain['process']:.2f}x: what this machine has to give (efficiency {gain['process'] / 2:.2f})")
    print(f"a second worker gains {gain['worker']:.2f}x: efficiency {gain['worker'] / 2:.2f}, {gain['worker'] / gain['process']:.2f} of the"
          f" machine's; per CPU second {found['worker', 2].cpu / found['worker', 1].cpu:.2f} of one worker's")  # fmt: skip
    print("a worker against a process without a cluster: " + ", ".join(
        f"{n}: {found['worker', n].wall / found['process', n].wall:.2f} in wall time, {found['worker', n].cpu / found['process', n].cpu:.2f}"
        " per CPU second" for n in (1, 2)))  # fmt: skip


def main() -> None:
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder, two_nodes():
        model_of_issue().save_pretrained(Path(folder) / "model")
        tiny.tokenizer().save_pretrained(Path(folder) / "model")
        found = measured(Path(folder))
        report(found, [*loads, os.getloadavg()[0]])


if __name__ == "__main__":
    if sys.argv[1:2] == ["alone"]:
        alone(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
