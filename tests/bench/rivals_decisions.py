"""Questions that need the decisions of a document or a layer, put to the engines of ``rivals``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from analysis.capacity import capacity_curves
from analysis.capacity_loads import load_curves
from analysis.counting import compiled
from analysis.overflow import FACTORS, curve_of_loads
from analysis.slots import PRESETS, capacities
from analysis.trace import SiteRouting
from tests.bench.rivals import Run, collected, dense, ids

BATCH, DOCUMENTS = 2_048, 16  # tokens, or documents, that share expert capacity


# capacity drops: int64 [76 factors], assignments of one site dropped in batches of DOCUMENTS documents as recorded, as the Capacity page asks
# of a long run; loads alone tell, and the product has those of documents
def drops_product(run: Run) -> np.ndarray:
    ((_, table),) = load_curves(run.trace, (None,), FACTORS, "documents", size=DOCUMENTS, layers=[run.site])
    return np.asarray(table["dropped"].to_numpy())


def _dropped(run: Run, loads: np.ndarray) -> np.ndarray:
    tokens = loads.sum(1) // run.shape[1]
    return curve_of_loads(loads, tokens, run.shape[1])[0]


def _batches_of_documents(run: Run) -> int:
    return -(-len(run.trace.documents) // DOCUMENTS)


def drops_floor(run: Run) -> np.ndarray:
    e, k, _ = run.shape
    counts = np.zeros(_batches_of_documents(run) * e, np.int64)
    for _, (document, *columns) in run.groups(["document", *ids(k)], run.site):
        base, first = document // DOCUMENTS * e, int(document[0]) // DOCUMENTS * e
        found = np.bincount(np.concatenate([base + c for c in columns]) - first)
        counts[first : first + len(found)] += found
    return _dropped(run, counts.reshape(-1, e))


def drops_duckdb(run: Run) -> np.ndarray:
    e, k, _ = run.shape
    batch = f"document // {DOCUMENTS}"
    each = " UNION ALL ".join(f"SELECT {batch} b, {c} e, count(*) n FROM r WHERE site = {run.site} GROUP BY ALL" for c in ids(k))
    found = run.sql(f"SELECT b, e, sum(n)::BIGINT FROM ({each}) GROUP BY ALL")
    return _dropped(run, dense((_batches_of_documents(run), e), *found))


def drops_polars(run: Run) -> np.ndarray:
    import polars as pl

    e, k, _ = run.shape
    table = run.polars("routing").filter(pl.col("site") == run.site)
    each = [table.group_by((pl.col("document") // DOCUMENTS).alias("b"), pl.col(c).alias("e")).len() for c in ids(k)]
    found = collected(pl.concat(each).group_by("b", "e").agg(pl.col("len").sum()))
    return _dropped(run, dense((_batches_of_documents(run), e), *found))


def _batches(run: Run) -> int:
    return -(-run.trace.n_tokens("decoder") // BATCH)


# capacity curve: float64 [76 factors, 3], assignments dropped, tokens that lose all, gate mass lost, rounded to float32: at 10^9 decisions
# a sum of so many bfloat16 depends in the last bit of float64 on its order; first come, first served. All from how many assignments,
# tokens and how much mass stand at each rank of their queue.
def curve_product(run: Run) -> np.ndarray:
    table = capacity_curves(run.trace, scope="tokens", size=BATCH, layers=[run.site])
    return _rounded(np.stack([table[n].to_numpy() for n in ("dropped", "fully_dropped", "gate_mass_lost")], 1).astype(np.float64))


def _rounded(curve: np.ndarray) -> np.ndarray:
    curve[:, 2] = curve[:, 2].astype(np.float32)
    return curve


def _curve(run: Run, last: Any, rank: Any, *sums: Any) -> np.ndarray:
    """From sums (assignments, tokens, mass) by rank, in the last batch and in all others: the sums at ranks past the capacity."""
    (e, k, _), n = run.shape, run.trace.n_tokens("decoder")
    at = np.zeros((2, BATCH + 1, 3))  # beyond the last rank stands nobody
    for i, column in enumerate(sums):
        np.add.at(at[:, :, i], (np.asarray(last).astype(int), np.asarray(rank).astype(int)), np.asarray(column, np.float64))
    past = at[:, ::-1].cumsum(1)[:, ::-1]
    slots = capacities(np.array([BATCH, (n - 1) % BATCH + 1]), e, k, np.array(FACTORS), PRESETS["megatron"])
    return _rounded(past[0, np.minimum(slots[0], BATCH)] + past[1, np.minimum(slots[1], BATCH)])


@compiled
def _count_ranks(experts: np.ndarray, weights: np.ndarray, first: int, last: int, queues: np.ndarray, sums: np.ndarray) -> None:
    for t in range(experts.shape[1]):
        batch, best = (first + t) // BATCH, BATCH
        if (first + t) % BATCH == 0:
            queues[:] = 0
        mine = sums[1 if batch == last else 0]
        for s in range(experts.shape[0]):
            rank = queues[experts[s, t]]
            queues[experts[s, t]] += 1
            best = min(best, rank)
            mine[rank, 0] += 1
            mine[rank, 2] += weights[s, t]
        mine[best, 1] += 1


def curve_floor(run: Run) -> np.ndarray:
    e, k, _ = run.shape
    queues, sums, last = np.zeros(e, np.int64), np.zeros((2, BATCH, 3)), _batches(run) - 1
    for _, (row, *columns) in run.groups(["row", *ids(k), *ids(k, "w")], run.site):
        _count_ranks(np.stack(columns[:k]), np.stack(columns[k:]), row[0], last, queues, sums)
    return _curve(run, np.repeat([0, 1], BATCH), np.tile(np.arange(BATCH), 2), *sums.reshape(-1, 3).T)


def curve_duckdb(run: Run) -> np.ndarray:
    k, last = run.shape[1], _batches(run) - 1
    each = " UNION ALL ".join(f"SELECT row, e{i} e, w{i} w FROM r WHERE site = {run.site}" for i in range(k))
    return _curve(run, *run.sql(
        f"WITH q AS MATERIALIZED (SELECT row, row // {BATCH} = {last} AS tail, w, row_number() OVER "
        f"(PARTITION BY row // {BATCH}, e ORDER BY row) - 1 AS rank FROM ({each})), "
        f"f AS (SELECT any_value(tail) tail, min(rank) rank FROM q GROUP BY row) "
        f"SELECT tail, rank, count(*) n, 0 t, sum(w::DOUBLE) m FROM q GROUP BY ALL "
        f"UNION ALL SELECT tail, rank, 0, count(*), 0 FROM f GROUP BY ALL"))  # fmt: skip


def curve_polars(run: Run) -> np.ndarray:
    import polars as pl

    table, last = run.polars("routing").filter(pl.col("site") == run.site), _batches(run) - 1
    each = [table.select("row", pl.col(f"e{i}").alias("e"), pl.col(f"w{i}").alias("w")) for i in range(run.shape[1])]
    batch = pl.col("row") // BATCH
    rank = (pl.col("row").rank("ordinal").over(batch, "e") - 1).alias("rank")
    queued = (
        pl.concat(each).select("row", (batch == last).alias("tail"), pl.col("w").cast(pl.Float64), rank).collect(engine="streaming").lazy()
    )
    n = queued.group_by("tail", "rank").agg(pl.len().alias("n"), pl.lit(0, pl.UInt32).alias("t"), pl.col("w").sum())
    first = queued.group_by("row").agg(pl.col("tail").first(), pl.col("rank").min())
    t = first.group_by("tail", "rank").agg(pl.lit(0, pl.UInt32).alias("n"), pl.len().alias("t"), pl.lit(0.0).alias("w"))
    return _curve(run, *collected(pl.concat([n, t])))


# one document, one layer: as each engine has them, decisions of a site or columns e0.. and w0..; ``comparable`` makes them alike
def comparable(answer: Any) -> np.ndarray:
    """The answer itself, or float32 [rows, 2k], expert ids then gate weights; a document's rows site by site."""
    return answer if isinstance(answer, np.ndarray) else np.concatenate([_matrix(x) for x in answer])


def _matrix(found: Any) -> np.ndarray:
    columns = (*found.experts.T, *found.weights.T) if isinstance(found, SiteRouting) else found
    return np.stack([np.asarray(c).astype(np.float32) for c in columns], 1)


def document_product(run: Run) -> Sequence[Any]:
    start, stop = run.trace.document_range(run.document["document"], "decoder")
    return run.trace.routings(range(len(run.trace.layers)), start, stop)


def _document_groups(run: Run) -> Iterator[tuple[int, int, int, int]]:
    """(number of a file, row group, start and stop within it) of the document's rows."""
    start, stop = run.document["first_row"], run.document["first_row"] + run.document["n_tokens"]
    for n, file in enumerate(run.files):
        for i in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(i).column(0).statistics
            if rows.max >= start and rows.min < stop:
                yield n, i, max(start - rows.min, 0), min(stop, rows.max + 1) - rows.min


def document_floor(run: Run) -> Sequence[Any]:
    columns = [*ids(run.shape[1]), *ids(run.shape[1], "w")]
    return [
        run.files[n].read_row_group(i, columns=columns, use_threads=False).slice(a, b - a).columns for n, i, a, b in _document_groups(run)
    ]


def document_duckdb(run: Run) -> Sequence[Any]:
    columns = ", ".join([*ids(run.shape[1]), *ids(run.shape[1], "w")])
    return [run.sql(f"SELECT {columns} FROM r WHERE document = {run.document['document']} ORDER BY site, row")]


def document_polars(run: Run) -> Sequence[Any]:
    import polars as pl

    table = run.polars("routing").filter(pl.col("document") == run.document["document"]).sort("site", "row")
    return [collected(table.select(*ids(run.shape[1]), *ids(run.shape[1], "w")))]


def layer_product(run: Run) -> Sequence[Any]:
    return [run.trace.routing(run.site)]


def layer_floor(run: Run) -> Sequence[Any]:
    k = run.shape[1]
    return [c for _, c in run.groups([*ids(k), *ids(k, "w")], run.site)]


def layer_duckdb(run: Run) -> Sequence[Any]:
    columns = ", ".join([*ids(run.shape[1]), *ids(run.shape[1], "w")])
    return [run.sql(f"SELECT {columns} FROM r WHERE site = {run.site} ORDER BY row")]


def layer_polars(run: Run) -> Sequence[Any]:
    import polars as pl

    k = run.shape[1]
    return [collected(run.polars("routing").filter(pl.col("site") == run.site).sort("row").select(*ids(k), *ids(k, "w")))]
