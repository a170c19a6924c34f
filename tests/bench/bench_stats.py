"""Decisions counted per CPU second, all statistics, against the floor, DuckDB and Polars. ``python -m tests.bench.bench_stats [decisions]``

Made-up routing of three shapes (experts x k x sites): Zipf(1.05) token ids over 50,000, and at each site three times k candidates per
token id, of which noise picks k, the first ones most often. All times are CPU seconds of the whole process, the best of several, because
the machine may be shared. Growth is measured in one fresh process per size, up to 1e8 decisions or as many as are asked for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.layout import read_routing, room_for, write_routing
from analysis.stats import merge_statistics, part_statistics
from analysis.trace import LayerInfo, Part, SiteRouting
from tests.synthetic import make_part, site

VOCABULARY, PART_TOKENS, DOCUMENT = 50_000, 65_536, 512
SHAPES = {"8 x 2 x 32": (8, 2, 32), "64 x 8 x 16": (64, 8, 16), "256 x 8 x 58": (256, 8, 58)}


def sites(shape: tuple[int, int, int]) -> tuple[LayerInfo, ...]:
    return tuple(site(i, shape[0], shape[1]) for i in range(shape[2]))


def zipf_part(layers: tuple[LayerInfo, ...], n: int, index: int = 0) -> Part:
    """Part number ``index``: n tokens in documents of 512, with weights that bfloat16 holds exactly."""
    rng = np.random.default_rng([index])
    share = 1 / np.arange(1, VOCABULARY + 1) ** 1.05
    ids = rng.choice(VOCABULARY, n, p=share / share.sum()).astype(np.int32)
    documents = n // DOCUMENT
    first_document, first_row = index * PART_TOKENS // DOCUMENT, index * PART_TOKENS
    blank = make_part((site(0, 1, 1),), [DOCUMENT] * documents, 0, index, first_document, first_row)
    column = blank.tokens.schema.get_field_index("token_id")
    tokens = blank.tokens.set_column(column, blank.tokens.schema.field(column), pa.array(ids))
    routing, sums = tuple(_routing(x, ids, rng) for x in layers), tuple(np.zeros(x.n_classes) for x in layers)
    return replace(blank, tokens=tokens, routing=routing, scores=blank.scores * len(layers), probability_sums=sums)


def _routing(layer: LayerInfo, ids: np.ndarray, rng: np.random.Generator) -> SiteRouting:
    table = np.random.default_rng([layer.index, 1])  # the same in every part
    wide = min(3 * layer.top_k, layer.n_experts)
    start, step = table.integers(0, layer.n_experts, VOCABULARY), 2 * table.integers(0, layer.n_experts // 2, VOCABULARY) + 1
    logits = rng.gumbel(size=(len(ids), wide)).astype(np.float32) - 0.3 * np.arange(wide, dtype=np.float32)
    order = np.argsort(-logits, 1)[:, : layer.top_k]
    experts = ((start[ids, None] + order * step[ids, None]) % layer.n_experts).astype(np.int16)  # an odd step: k distinct ones
    p = np.exp(np.take_along_axis(logits, order, 1))
    weights = ((p / p.sum(1, keepdims=True)).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return SiteRouting(experts, weights, experts)


def cpu(work: Callable[[], object], times: int = 5) -> float:
    """Least CPU seconds of some runs of ``work``, after one that is not counted."""
    seconds = []
    for _ in range(times + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def floor(path: Path, k: int) -> tuple[float, float]:
    """CPU seconds of (reading the ids, np.bincount over them): the load of each site and nothing else."""
    names = [f"e{i}" for i in range(k)]
    file = pq.ParquetFile(path)
    tables = [file.read_row_group(g, columns=names) for g in range(file.num_row_groups)]
    columns = [c.to_numpy() for t in tables for c in t.columns]
    reading = cpu(lambda: [file.read_row_group(g, columns=names, use_threads=False) for g in range(file.num_row_groups)], 3)
    return reading, cpu(lambda: [np.bincount(c) for c in columns])


def duckdb_counts(path: Path, k: int) -> tuple[int, int]:
    """(assignments, pairs) as summed from load and co-activation by site, on one thread."""
    import duckdb  # the processes that measure memory are without it

    con = duckdb.connect()
    con.execute("SET threads = 1; SET enable_progress_bar = false")
    load = " UNION ALL ".join(f"SELECT site, e{i} e, count(*) n FROM '{path}' GROUP BY ALL" for i in range(k))
    pairs = " UNION ALL ".join(
        f"SELECT site, least(e{i}, e{j}) a, greatest(e{i}, e{j}) b, count(*) n FROM '{path}' GROUP BY ALL"
        for i in range(k) for j in range(i + 1, k))  # fmt: skip
    rows = con.execute(f"SELECT site, e, sum(n) FROM ({load}) GROUP BY ALL").fetchall()
    both = con.execute(f"SELECT site, a, b, sum(n) FROM ({pairs}) GROUP BY ALL").fetchall()
    return sum(int(r[-1]) for r in rows), sum(int(r[-1]) for r in both)


def polars_counts(path: Path, k: int) -> tuple[int, int]:
    """The same by Polars, streaming, on all threads."""
    import polars as pl

    table, e = pl.scan_parquet(path), [pl.col(f"e{i}") for i in range(k)]
    loads = [table.group_by("site", x.alias("e")).len() for x in e]
    pairs = [table.group_by("site", pl.min_horizontal(e[i], e[j]).alias("a"), pl.max_horizontal(e[i], e[j]).alias("b")).len()
             for i in range(k) for j in range(i + 1, k)]  # fmt: skip
    rows = pl.concat(loads).group_by("site", "e").agg(pl.col("len").sum()).collect(engine="streaming")
    both = pl.concat(pairs).group_by("site", "a", "b").agg(pl.col("len").sum()).collect(engine="streaming")
    return int(rows["len"].sum()), int(both["len"].sum())


def compare(name: str, shape: tuple[int, int, int]) -> None:
    """Print one shape's figures."""
    layers, n = sites(shape), PART_TOKENS if shape[0] < 256 else PART_TOKENS // 4
    part = zipf_part(layers, n)
    decisions = n * shape[1] * shape[2]
    counted = cpu(lambda: part_statistics(part, layers))
    print(f"{name}: {n} tokens, {decisions / 1e6:.1f} M decisions")
    print(f"  all statistics of a part in memory   {decisions / counted / 1e6:7.1f} M decisions per CPU second")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routing.parquet"
        write_routing(part, layers, path)
        reading, binning = floor(path, shape[1])
        stats = part_statistics(part, layers)
        pairs = sum(int(stats.coactivation(i).sum()) // 2 for i in range(len(layers)))
        read = cpu(lambda: [read_routing(path, [x], 0, n, [room_for(x, n, False)]) for x in layers], 3)
        print(
            f"  floor: bincount of decoded ids       {decisions / binning / 1e6:7.1f}; all statistics take {counted / binning:.1f} times as long"
        )
        print(f"  floor with decoding the ids          {decisions / (binning + reading) / 1e6:7.1f}")
        print(f"  read ids and weights, all statistics {decisions / (read + counted) / 1e6:7.1f}")
        for engine, work in (("DuckDB", duckdb_counts), ("Polars", polars_counts)):
            assert work(path, shape[1]) == (decisions, pairs)
            took = cpu(lambda work=work: work(path, shape[1]), 1)  # type: ignore[misc]
            print(f"  {engine}: load and co-activation only   {decisions / took / 1e6:7.1f}; {took / (read + counted):.1f} times ours")


def peak_memory() -> float:
    """MB this process has held at most. (What getrusage says is handed down from the process that started it.)"""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def grow(decisions: int) -> None:
    """Count and add up parts as they are made, and print CPU seconds without the making, and the peak of memory."""
    layers = sites(SHAPES["64 x 8 x 16"])
    documents = -(-decisions // (8 * 16 * DOCUMENT))
    made = [0.0]

    def counted() -> Iterator[object]:
        for index, first in enumerate(range(0, documents * DOCUMENT, PART_TOKENS)):
            begin = time.process_time()
            part = zipf_part(layers, min(PART_TOKENS, documents * DOCUMENT - first), index)
            made[0] += time.process_time() - begin
            stats = part_statistics(part, layers)
            del part  # before the next is made
            yield stats

    part_statistics(zipf_part(layers, DOCUMENT), layers)  # what was compiled once is loaded
    base, start = peak_memory(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        stats = merge_statistics(counted(), Path(folder))  # type: ignore[arg-type]
        took = time.process_time() - start - made[0]
        done = sum(int(stats.load(x.index).sum()) for x in layers)
        assert done == sum(int(stats.token_load_by_id(x.index)[3].sum()) for x in layers)
        size = sum(
            rows.nbytes if isinstance(rows, pa.Table) else rows.path.stat().st_size for rows in (stats.token_rows, stats.document_rows)
        )
    print(f"  {done:13,d} decisions: {took:6.2f} CPU s = {done / took / 1e6:5.1f} M per CPU s; peak {peak_memory():4.0f} MB, of it {base:.0f} before "
          f"counting; {stats.token_rows.num_rows / 1e6:.1f} M token rows, long tables of {size / 2**20:.0f} MB", flush=True)  # fmt: skip


def main() -> None:
    most = float(sys.argv[1]) if len(sys.argv) > 1 else 1e8
    for name, shape in SHAPES.items():
        compare(name, shape)
    print("64 x 8 x 16, part after part, counted and added up:")
    for size in (10**6, 10**7, 10**8, 10**9):
        if size <= most:
            subprocess.run([sys.executable, "-m", "tests.bench.bench_stats", "--grow", str(size)], check=True)


if __name__ == "__main__":
    grow(int(sys.argv[2])) if sys.argv[1:2] == ["--grow"] else main()
