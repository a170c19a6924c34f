"""The product's questions on big made-up runs, against a floor, DuckDB and Polars on the same files, and how they grow.

    python -m tests.bench.bench_scale [--decisions 1e7] [--shape 64x8x16] [--folder FOLDER]

Runs of 1e6 decisions and every power of ten up to ``--decisions`` are written to FOLDER (kept, and used again) or to a temporary
one; 1e9 takes 3 GB and an hour. Every question is asked in a process of its own, of one thread, after it was asked once of a tiny
run; from statistics, the run is opened anew for each asking. Answers are compared: one that differs ends the bench. The best of up to three,
CPU seconds, because the machine may be shared. Shapes are experts x k x sites. Prints Markdown: for each size a table, how the product's
answers grow, and the goals that are missed.

"rival / floor" says how many times faster than the better of DuckDB and Polars a reader could be that decodes with Arrow and does nothing
more.
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
from typing import Any

from analysis.places import Place
from analysis.stats import merge_statistics, part_statistics
from analysis.store import open_run, read_manifest
from analysis.verifying import counted_again
from analysis.writing import RunWriter
from tests.bench.bench_stats import peak_memory
from tests.bench.questions import ENGINES, FROM_STATISTICS, QUERIES
from tests.bench.rivals import Run
from tests.bench.rivals_decisions import comparable
from tests.synthetic import card, site, zipf_parts

LIMIT = 900  # seconds of wall time that one question may take
ONE_THREAD = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
OVERVIEW = ("open", *FROM_STATISTICS)  # at most LONGEST ms each, and GROWTH times what the first size takes
LONGEST, GROWTH, OVER_FLOOR, OVER_RIVALS = 50, 1.2, 2, 4
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
        return merge_statistics(counted_again(Place.of(run.folder), run.trace, read_manifest(run.folder)["parts"]), Path(scratch))


def measure(query: str, engine: str, folder: Path, tiny: Path) -> Figures | dict[str, str]:
    """One question to one engine: CPU and wall seconds, MB at the most, MB before, and a digest of the answer."""
    ask: Callable[[Run], Any] = open_anew if query == "open" else count_again
    if query in QUERIES and engine in ENGINES:
        ask = QUERIES[query][ENGINES.index(engine)]
    _asked(query, engine, ask, tiny)
    before, cpu, wall, answer = peak_memory(), [], [], None
    while len(cpu) < 3 and sum(cpu) < 10:
        spent, answer = _asked(query, engine, ask, folder)
        cpu.append(spent[0])
        wall.append(spent[1])
    mb = peak_memory()  # before answers are made alike
    digest = hashlib.sha256(comparable(answer).tobytes()).hexdigest() if query in QUERIES and engine in ENGINES else ""
    return {"cpu": min(cpu), "wall": min(wall), "mb": mb, "before": before, "digest": digest}


def open_anew(run: Run) -> object:
    return open_run(run.folder)


def _asked(query: str, engine: str, ask: Callable[[Run], Any], folder: Path) -> tuple[tuple[float, float], Any]:
    """(CPU and wall seconds, the answer); what is no part of the question is done before."""
    run = _ready(Run(folder), engine)
    started = time.process_time(), time.perf_counter()
    answer = ask(run)
    return (time.process_time() - started[0], time.perf_counter() - started[1]), answer


def _ready(run: Run, engine: str) -> Run:
    """What is no part of a question is done: the small tables read, connections made."""
    _ = run.document, run.labels, run.duckdb if engine == "DuckDB" else None
    if engine != ENGINES[0]:  # footers of all files would count as the product's memory
        _ = run.files
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
             "| question | product | floor | DuckDB | Polars | product / floor | DuckDB / product | Polars / product | rival / floor |"
             " MB product, floor, DuckDB, Polars |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for query, engines in found.items():
        cells = ["" if e not in engines else f"over {LIMIT} s" if (f := engines[e]) is None else f"{f['cpu'] * 1e3:,.1f}" for e in ENGINES]
        if (ours := engines["product"]) is not None:
            cells[0] += f" ({ours['wall'] * 1e3:,.1f})"
        pairs = (("product", "floor"), ("DuckDB", "product"), ("Polars", "product"), ("rival", "floor"))
        ratios = ["" if (r := ratio(engines, *pair)) is None else f"{r:.2f}" for pair in pairs]
        memory = ", ".join(f"{f['mb']:.0f}" if (f := engines.get(e)) is not None else "-" for e in ENGINES)
        lines.append(f"| {query} | {' | '.join(cells)} | {' | '.join(ratios)} | {memory} |")
    if (count := found["all statistics"]["product"]) is not None:
        lines += [
            "",
            f"All statistics in one pass: {decisions / 1e6 / count['cpu']:.0f} M decisions per CPU second, peak {count['mb']:.0f} MB.",
        ]
    return "\n".join(lines)


def ratio(engines: dict[str, Figures | None], above: str, below: str) -> float | None:
    """CPU seconds of one over those of another, None where either is unknown; "rival" is the better of DuckDB and Polars."""
    seconds = {e: f["cpu"] for e, f in engines.items() if f is not None}
    if rivals := [seconds[e] for e in ENGINES[2:] if e in seconds]:
        seconds["rival"] = min(rivals)
    return seconds[above] / seconds[below] if above in seconds and seconds.get(below) else None


def growth(by_size: dict[float, dict[str, dict[str, Figures | None]]]) -> str:
    """CPU milliseconds and peak MB of the product at every size, and the last over the first."""
    sizes = list(by_size)
    lines = [
        "| the product's CPU ms, MB at | " + " | ".join(f"{s:,.0f}" for s in sizes) + " | last / first |",
        "|---|" + "---|" * (len(sizes) + 1),
    ]
    for query in by_size[sizes[0]]:
        found = [f if (f := by_size[s][query]["product"]) is not None else {"cpu": float("nan"), "mb": float("nan")} for s in sizes]
        each = " | ".join(f"{f['cpu'] * 1e3:,.1f}, {f['mb']:.0f}" for f in found)
        lines.append(f"| {query} | {each} | {found[-1]['cpu'] / found[0]['cpu']:.2f} |")
    return "\n".join(lines)


def missed(by_size: dict[float, dict[str, dict[str, Figures | None]]]) -> str:
    """The goals for single questions that are not met, one line each."""
    lines, first = [], next(iter(by_size.values()))
    for size, found in by_size.items():
        for query, engines in found.items():
            ours, name = engines["product"], f"- {query} at {size:,.0f}:"
            ms = float("inf") if ours is None else ours["cpu"] * 1e3
            if query in QUERIES and (r := ratio(engines, "product", "floor")) is not None and r > OVER_FLOOR:
                lines.append(f"{name} {r:.2f} times the floor, {OVER_FLOOR} at most")
            if query in QUERIES and (r := ratio(engines, "rival", "product")) is not None and r < OVER_RIVALS:
                lines.append(f"{name} {r:.2f} times as fast as the better rival, {OVER_RIVALS} at least")
            if query in (*OVERVIEW, "one document") and ms > LONGEST:
                lines.append(f"{name} {ms:.0f} ms, {LONGEST} at most")
            start = first[query]["product"]
            if query in OVERVIEW and start is not None and ms > GROWTH * start["cpu"] * 1e3:
                lines.append(f"{name} {ms / start['cpu'] / 1e3:.2f} times what it takes at the first size, {GROWTH} at most")
    return "\n".join(["Goals missed:", "", *(lines or ["- none"])])


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
    print(f"{growth(by_size)}\n\n{missed(by_size)}\n")
    from tests.bench.sizes import sizes_table  # imports torch, which the processes that measure memory are without

    print(sizes_table(run), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))))
    elif sys.argv[1:2] == ["--write"]:
        print(json.dumps(write_run(Path(sys.argv[2]), tuple(map(int, sys.argv[3].split("x"))), int(sys.argv[4]))))  # type: ignore[arg-type]
    else:
        main()
