"""The product's questions on big made-up runs, against a floor, DuckDB and Polars on the same files, and how they grow.

    python -m tests.bench.bench_scale [--decisions 1e7] [--shape 64x8x16] [--folder FOLDER]

Runs of 1e6 decisions and every power of ten up to ``--decisions`` are written to FOLDER (kept, and used again) or to a temporary
one; 1e9 takes 3 GB and an hour. Every question is asked in a process of its own, of one thread, after it was asked once of a tiny
run; from statistics, the run is opened anew for each asking. Answers are compared: one that differs ends the bench. The best of up to three,
CPU seconds, because the machine may be shared. Shapes are experts x k x sites. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from analysis.stats import merge_statistics, part_statistics
from analysis.store import _counted_again, open_run, read_manifest
from analysis.writing import RunWriter
from tests.bench.bench_stats import peak_memory
from tests.bench.rivals import ENGINES, FROM_STATISTICS, QUERIES, Run
from tests.synthetic import card, site, zipf_parts

LIMIT = 900  # seconds of wall time that one question may take
ONE_THREAD = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
Figures = dict[str, float]


def write_run(folder: Path, shape: tuple[int, int, int], decisions: int) -> Figures:
    """A run of about so many decisions; CPU and wall seconds of writing and of committing it, without making it up."""
    experts, k, sites = shape
    layers = tuple(site(i, experts, k) for i in range(sites))
    tokens = max(decisions // (k * sites), 2_000)
    spent: Figures = dict.fromkeys(("write", "write wall", "commit", "commit wall"), 0.0)

    def timed(what: str, work: Callable[[], object]) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        spent[what] += time.process_time() - cpu
        spent[f"{what} wall"] += time.perf_counter() - wall

    part_statistics(next(zipf_parts(layers, 2_000)), layers)  # what was compiled once is loaded
    with RunWriter.open(folder, card(layers, f"made up {'x'.join(map(str, shape))}"), {}) as writer:
        for part in zipf_parts(layers, tokens):
            timed("write", partial(writer.write, part))
            del part  # before the next is made
        spent["write mb"] = peak_memory()
        timed("commit", writer.commit)
    return spent | {"decisions": tokens * k * sites, "mb": peak_memory()}


def count_again(run: Run) -> object:
    """All statistics once more, from the stored decisions, as ``verify`` counts them."""
    with tempfile.TemporaryDirectory() as scratch:
        return merge_statistics(_counted_again(run.folder, run.trace, read_manifest(run.folder)["parts"]), Path(scratch))


def measure(query: str, engine: str, folder: Path, tiny: Path) -> Figures | dict[str, str]:
    """One question to one engine: CPU and wall seconds, MB at the most, MB before, and a digest of the answer."""
    if query == "open":
        ask: Callable[[Run], object] = lambda run: open_run(run.folder)  # noqa: E731
    else:
        ask = count_again if query == "all statistics" else QUERIES[query][ENGINES.index(engine)]
    ask(_ready(Run(tiny), engine))
    before, cpu, wall, answer = peak_memory(), [], [], None
    while len(cpu) < 3 and sum(cpu) < 10:
        run = _ready(Run(folder), engine)
        started = time.process_time(), time.perf_counter()
        answer = ask(run)
        cpu.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    digest = hashlib.sha256(answer.tobytes()).hexdigest() if hasattr(answer, "tobytes") else ""
    return {"cpu": min(cpu), "wall": min(wall), "mb": peak_memory(), "before": before, "digest": digest}


def _ready(run: Run, engine: str) -> Run:
    """What is no part of a question is done: the small tables read, connections made."""
    _ = run.document, run.labels, run.files, run.duckdb if engine == "DuckDB" else None
    return run


def child(*arguments: str) -> Figures | None:
    """What a process of its own found; None where it took longer than LIMIT."""
    command = [sys.executable, "-m", "tests.bench.bench_scale", *arguments]
    try:
        said = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        return None
    found: Figures = json.loads(said.stdout.splitlines()[-1])
    return found


def ask_all(folder: Path, tiny: Path) -> dict[str, dict[str, Figures | None]]:
    """query -> engine -> figures; SystemExit where answers differ."""
    found: dict[str, dict[str, Figures | None]] = {}
    for query in ("open", *QUERIES, "all statistics"):
        engines = ENGINES if query in QUERIES else ENGINES[:1]
        found[query] = {e: child("--one", query, e, str(folder), str(tiny)) for e in engines}
        digests = {f["digest"] for f in found[query].values() if f is not None}
        if len(digests) > 1:
            sys.exit(f"{query}: the engines answer differently on {folder.name}")
    for engine in ENGINES[1:]:  # the same counts as "all statistics" or fewer, one after the other
        parts = [found[q][engine] for q in FROM_STATISTICS]
        whole = [p for p in parts if p is not None]
        if len(whole) == len(parts):
            found["all statistics"][engine] = {n: sum(p[n] for p in whole) for n in ("cpu", "wall")} | {"mb": max(p["mb"] for p in whole)}
    return found


def table(found: dict[str, dict[str, Figures | None]], decisions: float) -> str:
    """CPU milliseconds, ratios and memory, one row per question."""
    lines = [f"{decisions:,.0f} decisions; CPU ms (wall ms of the product); MB is the peak of the whole process.", "",
             "| question | product | floor | DuckDB | Polars | product / floor | better rival / product | MB product, floor, DuckDB, Polars |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for query, engines in found.items():
        cpu = [f["cpu"] if (f := engines.get(e)) is not None else None for e in ENGINES]
        cells = [
            "" if e not in engines else f"over {LIMIT} s" if c is None else f"{c * 1e3:,.1f}" for e, c in zip(ENGINES, cpu, strict=True)
        ]
        ours = engines["product"]
        if ours is not None:
            cells[0] += f" ({ours['wall'] * 1e3:,.1f})"
        rivals = [c for c in cpu[2:] if c is not None]
        ratios = [f"{cpu[0] / cpu[1]:.2f}" if cpu[0] and cpu[1] else "", f"{min(rivals) / cpu[0]:.1f}" if cpu[0] and rivals else ""]
        memory = ", ".join(f"{f['mb']:.0f}" if (f := engines.get(e)) is not None else "-" for e in ENGINES)
        lines.append(f"| {query} | {' | '.join(cells)} | {' | '.join(ratios)} | {memory} |")
    return "\n".join(lines)


def growth(by_size: dict[float, dict[str, dict[str, Figures | None]]]) -> str:
    """CPU milliseconds of the product at every size, and the last over the first."""
    sizes = list(by_size)
    lines = [
        "| the product's CPU ms at | " + " | ".join(f"{s:,.0f}" for s in sizes) + " | last / first |",
        "|---|" + "---|" * (len(sizes) + 1),
    ]
    for query in by_size[sizes[0]]:
        cpu = [f["cpu"] if (f := by_size[s][query]["product"]) is not None else float("nan") for s in sizes]
        lines.append(f"| {query} | " + " | ".join(f"{c * 1e3:,.1f}" for c in cpu) + f" | {cpu[-1] / cpu[0]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="bench of the product's questions at scale")
    parser.add_argument("--decisions", type=float, default=1e7)
    parser.add_argument("--shape", default="64x8x16")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if given.folder is None else given.folder
    try:
        bench(folder, given.shape, given.decisions)
    finally:
        if given.folder is None:
            shutil.rmtree(folder)


def bench(folder: Path, shape: str, most: float) -> None:
    tiny = folder / f"{shape}-tiny"
    if not (tiny / "run.json").exists():
        child("--write", str(tiny), shape, "1")
    by_size: dict[float, dict[str, dict[str, Figures | None]]] = {}
    print(f"## {shape} (experts x k x sites)\n")
    for power in range(6, 10):
        if 10**power > most:
            break
        run = folder / f"{shape}-1e{power}"
        if not (run / "run.json").exists() and (wrote := child("--write", str(run), shape, str(10**power))) is not None:
            n = wrote["decisions"] / 1e6
            print(f"Writing {n:,.1f} M decisions: {n / wrote['write']:.1f} M/s of CPU ({n / wrote['write wall']:.1f} of wall), with committing "
                  f"{n / (wrote['write'] + wrote['commit']):.1f}; peak {wrote['mb']:.0f} MB.\n", flush=True)  # fmt: skip
        by_size[10**power] = ask_all(run, tiny)
        print(table(by_size[10**power], 10**power) + "\n", flush=True)
    print(growth(by_size) + "\n")
    from tests.bench.sizes import sizes_table  # imports torch, which the processes that measure memory are without

    print(sizes_table(run), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))))
    elif sys.argv[1:2] == ["--write"]:
        print(json.dumps(write_run(Path(sys.argv[2]), tuple(map(int, sys.argv[3].split("x"))), int(sys.argv[4]))))  # type: ignore[arg-type]
    else:
        main()
