"""Questions that statistics answer, put to the product, to a floor of decoded Arrow buffers, to DuckDB and to Polars, over one run's files.

Every engine answers with the same array, so that answers can be compared. The floor reads only the columns needed, row group by row
group, and counts with np.bincount or a compiled loop. All on one thread. What is not part of a question (opening a run, connecting,
reading the tiny documents table) is done before it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from analysis.counting import compiled
from analysis.store import open_run
from analysis.trace import Trace
from analysis.vocabulary import input_tokens

TOP = 10  # tokens shown per expert


@dataclass(frozen=True)
class Run:
    """A stored run whose sites are all alike, and what each engine needs of it before a question."""

    folder: Path

    @cached_property
    def trace(self) -> Trace:
        return open_run(self.folder)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(experts, k, sites)"""
        layers = self.trace.layers
        return layers[0].n_experts, layers[0].top_k, len(layers)

    @cached_property
    def site(self) -> int:
        return len(self.trace.layers) // 2

    @cached_property
    def document(self) -> dict[str, Any]:
        """The last document of 1,000 tokens (of any length where there is none)."""
        rows = self.trace.documents.to_pylist()
        return ([r for r in rows if r["n_tokens"] == 1_000] or rows)[-1]

    @cached_property
    def labels(self) -> tuple[tuple[str, ...], np.ndarray]:
        """(labels sorted, code of each document)"""
        of_document = self.trace.documents["label"].to_pylist()
        names = tuple(sorted(set(of_document)))
        return names, np.array([names.index(x) for x in of_document])

    @cached_property
    def paths(self) -> list[Path]:
        return sorted((self.folder / "routing").glob("*.parquet"))

    @cached_property
    def files(self) -> list[pq.ParquetFile]:
        return [pq.ParquetFile(p) for p in self.paths]

    def groups(self, columns: list[str], site: int | None = None) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(site, columns) of each row group, decoded."""
        for file in self.files:
            for i in range(file.metadata.num_row_groups):
                here = file.metadata.row_group(i).column(1).statistics.min
                if site is None or here == site:
                    table = file.read_row_group(i, columns=columns, use_threads=False)
                    yield here, [table[c].to_numpy() for c in columns]

    @cached_property
    def duckdb(self) -> Any:
        import duckdb

        con = duckdb.connect()
        con.execute("SET threads = 1; SET enable_progress_bar = false")
        for name, path in (("r", "routing/*.parquet"), ("t", "tokens/*.parquet"), ("d", "documents.parquet")):
            con.execute(f"CREATE VIEW {name} AS SELECT * FROM '{self.folder}/{path}'")
        return con

    def sql(self, query: str) -> list[np.ndarray]:
        """Columns of the answer."""
        return [np.asarray(x) for x in self.duckdb.execute(query).fetchnumpy().values()]

    def polars(self, name: str) -> Any:
        import polars as pl

        return pl.scan_parquet(self.folder / (f"{name}.parquet" if name == "documents" else f"{name}/*.parquet"))


def dense(shape: tuple[int, ...], *columns: Any) -> np.ndarray:
    """int64 ``shape``: the last column's counts added to the cells that the others name."""
    out, (*at, count) = np.zeros(shape, np.int64), (np.asarray(c) for c in columns)
    np.add.at(out, tuple(x.astype(np.int64) for x in at), count.astype(np.int64))
    return out


def collected(query: Any) -> list[np.ndarray]:
    return [c.to_numpy() for c in query.collect(engine="streaming").get_columns()]


def ids(k: int, letter: str = "e") -> list[str]:
    return [f"{letter}{i}" for i in range(k)]


# load: int64 [sites, experts]
def load_product(run: Run) -> np.ndarray:
    return np.stack([run.trace.stats.load(x.index) for x in run.trace.layers])


def load_floor(run: Run) -> np.ndarray:
    e, k, sites = run.shape
    out = np.zeros((sites, e), np.int64)
    for site, columns in run.groups(ids(k)):
        for c in columns:
            out[site] += np.bincount(c, minlength=e)
    return out


def load_duckdb(run: Run) -> np.ndarray:
    e, k, sites = run.shape
    each = " UNION ALL ".join(f"SELECT site, {c} e, count(*) n FROM r GROUP BY ALL" for c in ids(k))
    return dense((sites, e), *run.sql(f"SELECT site, e, sum(n)::BIGINT FROM ({each}) GROUP BY ALL"))


def load_polars(run: Run) -> np.ndarray:
    import polars as pl

    e, k, sites = run.shape
    each = [run.polars("routing").group_by("site", pl.col(c).alias("e")).len() for c in ids(k)]
    return dense((sites, e), *collected(pl.concat(each).group_by("site", "e").agg(pl.col("len").sum())))


# expert x label: int64 [labels, sites, experts]
def label_product(run: Run) -> np.ndarray:
    return np.stack([run.trace.stats.label_load(x.index)[1] for x in run.trace.layers], 1)


def label_floor(run: Run) -> np.ndarray:
    (e, k, sites), (names, code) = run.shape, run.labels
    out = np.zeros((sites, len(names) * e), np.int64)
    for site, (document, *columns) in run.groups(["document", *ids(k)]):
        base = code[document] * e
        for c in columns:
            out[site] += np.bincount(base + c, minlength=out.shape[1])
    return out.reshape(sites, len(names), e).transpose(1, 0, 2)


def label_duckdb(run: Run) -> np.ndarray:
    (e, k, sites), (names, _) = run.shape, run.labels
    each = " UNION ALL ".join(f"SELECT label, site, {c} e, count(*) n FROM r JOIN d USING (document) GROUP BY ALL" for c in ids(k))
    label, *rest = run.sql(f"SELECT label, site, e, sum(n)::BIGINT FROM ({each}) GROUP BY ALL")
    return dense((len(names), sites, e), np.searchsorted(names, label.astype(str)), *rest)


def label_polars(run: Run) -> np.ndarray:
    import polars as pl

    (e, k, sites), (names, _) = run.shape, run.labels
    table = run.polars("routing").join(run.polars("documents").select("document", "label"), on="document")
    each = [table.group_by("label", "site", pl.col(c).alias("e")).len() for c in ids(k)]
    label, *rest = collected(pl.concat(each).group_by("label", "site", "e").agg(pl.col("len").sum()))
    return dense((len(names), sites, e), np.searchsorted(names, label.astype(str)), *rest)


# the tokens each expert of one site is used for most: int64 [experts, TOP, (id, count)], -1 where there are fewer
def most_used(e: int, expert: Any, token: Any, count: Any) -> np.ndarray:
    out, (expert, token, count) = (
        np.full((e, TOP, 2), -1, np.int64),
        (np.asarray(x).astype(np.int64, copy=False) for x in (expert, token, count)),
    )
    most, low = int(count.max(initial=0)), int(token.max(initial=0)).bit_length()
    for least in (1 << i for i in reversed(range(most.bit_length()))):  # nobody's most used tokens are below it
        often = count >= least
        if np.bincount(expert[often], minlength=e).min() >= TOP:
            expert, token, count = expert[often], token[often], count[often]
            break
    high = low + most.bit_length()
    key = np.sort(expert << high | most - count << low | token)  # one number for each, by expert, falling count, and id
    expert, token, count = key >> high, key & (1 << low) - 1, most - (key >> low & (1 << high - low) - 1)
    starts = np.searchsorted(expert, np.arange(e + 1))
    for i in range(e):
        mine = slice(starts[i], min(starts[i] + TOP, starts[i + 1]))
        out[i, : mine.stop - mine.start] = np.column_stack([token[mine], count[mine]])
    return out


def tokens_product(run: Run) -> np.ndarray:
    counts = input_tokens(run.trace, run.site)
    return most_used(run.shape[0], counts.expert, counts.ids[counts.row], counts.count)


def tokens_floor(run: Run) -> np.ndarray:
    e, k, _ = run.shape
    token = np.concatenate([pq.read_table(p, columns=["token_id"], use_threads=False)["token_id"].to_numpy()
                            for p in sorted((run.folder / "tokens").glob("*.parquet"))]).astype(np.int64)  # fmt: skip
    counts, at = np.zeros((int(token.max()) + 1) * e, np.int64), 0
    for _, columns in run.groups(ids(k), run.site):
        base = token[at : at + len(columns[0])] * e
        at += len(base)
        counts += np.bincount(np.concatenate([base + c for c in columns]), minlength=len(counts))
    cells = np.flatnonzero(counts)
    return most_used(e, cells % e, cells // e, counts[cells])


def tokens_duckdb(run: Run) -> np.ndarray:
    each = " UNION ALL ".join(f"SELECT {c} e, token_id, count(*) n FROM x GROUP BY ALL" for c in ids(run.shape[1]))
    return most_used(run.shape[0], *run.sql(
        f"WITH n AS (SELECT d.first_row + t.position AS row, t.token_id FROM t JOIN d USING (document)), "
        f"x AS MATERIALIZED (SELECT r.*, n.token_id FROM r JOIN n USING (row) WHERE site = {run.site}), "
        f"c AS (SELECT e, token_id, sum(n)::BIGINT n FROM ({each}) GROUP BY ALL) "
        f"SELECT * FROM c QUALIFY row_number() OVER (PARTITION BY e ORDER BY n DESC, token_id) <= {TOP}"))  # fmt: skip


def tokens_polars(run: Run) -> np.ndarray:
    import polars as pl

    first = run.polars("documents").select("document", "first_row")
    row = (pl.col("first_row") + pl.col("position")).cast(pl.Int32).alias("row")
    token = run.polars("tokens").select("document", "position", "token_id").join(first, on="document").select(row, "token_id")
    table = run.polars("routing").filter(pl.col("site") == run.site).join(token, on="row")
    each = [table.group_by(pl.col(c).alias("e"), "token_id").len() for c in ids(run.shape[1])]
    counts = pl.concat(each).group_by("e", "token_id").agg(pl.col("len").sum())
    top = counts.sort("len", "token_id", descending=[True, False]).group_by("e").head(TOP)
    return most_used(run.shape[0], *collected(top.select("e", "token_id", "len")))


# co-activation: int64 [sites, experts, experts], symmetric
def pairs_product(run: Run) -> np.ndarray:
    return np.stack([run.trace.stats.coactivation(x.index) for x in run.trace.layers])


@compiled
def _count_pairs(experts: np.ndarray, table: np.ndarray) -> None:
    for t in range(experts.shape[1]):
        for i in range(experts.shape[0]):
            for j in range(i + 1, experts.shape[0]):
                table[experts[i, t], experts[j, t]] += 1


def pairs_floor(run: Run) -> np.ndarray:
    e, k, sites = run.shape
    out = np.zeros((sites, e, e), np.int64)
    for site, columns in run.groups(ids(k)):
        _count_pairs(np.stack(columns), out[site])
    return out + out.transpose(0, 2, 1)


def pairs_duckdb(run: Run) -> np.ndarray:
    e, k, sites = run.shape
    each = " UNION ALL ".join(f"SELECT site, least(e{i}, e{j}) a, greatest(e{i}, e{j}) b, count(*) n FROM r GROUP BY ALL"
                              for i in range(k) for j in range(i + 1, k))  # fmt: skip
    out = dense((sites, e, e), *run.sql(f"SELECT site, a, b, sum(n)::BIGINT FROM ({each}) GROUP BY ALL"))
    return out + out.transpose(0, 2, 1)


def pairs_polars(run: Run) -> np.ndarray:
    import polars as pl

    e, k, sites = run.shape
    table, c = run.polars("routing"), [pl.col(x) for x in ids(k)]
    each = [table.group_by("site", pl.min_horizontal(c[i], c[j]).alias("a"), pl.max_horizontal(c[i], c[j]).alias("b")).len()
            for i in range(k) for j in range(i + 1, k)]  # fmt: skip
    out = dense((sites, e, e), *collected(pl.concat(each).group_by("site", "a", "b").agg(pl.col("len").sum())))
    return out + out.transpose(0, 2, 1)


# flow of first choices, which made-up runs keep in slot 0: int64 [sites - 1, experts, experts]
def flow_product(run: Run) -> np.ndarray:
    return np.stack([run.trace.stats.flow(x.index, first=True) for x in run.trace.layers[:-1]])


def flow_floor(run: Run) -> np.ndarray:
    e, _, sites = run.shape
    out, before = np.zeros((sites - 1, e * e), np.int64), np.zeros(0)
    for file in run.files:  # a file's row groups come site by site
        columns: list[list[np.ndarray]] = [[] for _ in range(sites)]
        for i in range(file.metadata.num_row_groups):
            here = file.metadata.row_group(i).column(1).statistics.min
            columns[here].append(file.read_row_group(i, columns=["e0"], use_threads=False)["e0"].to_numpy())
        for site, pieces in enumerate(columns):
            mine = np.concatenate(pieces).astype(np.int64)
            if site:
                out[site - 1] += np.bincount(before * e + mine, minlength=e * e)
            before = mine
    return out.reshape(sites - 1, e, e)


def flow_duckdb(run: Run) -> np.ndarray:
    e, _, sites = run.shape
    return dense((sites - 1, e, e), *run.sql(
        "SELECT a.site, a.e0 x, b.e0 y, count(*) n FROM r a JOIN r b ON a.row = b.row AND a.site + 1 = b.site GROUP BY ALL"))  # fmt: skip


def flow_polars(run: Run) -> np.ndarray:
    import polars as pl

    e, _, sites = run.shape
    here = run.polars("routing").select("row", pl.col("site").cast(pl.Int32), "e0")
    after = here.select("row", pl.col("site") - 1, pl.col("e0").alias("next"))
    return dense((sites - 1, e, e), *collected(here.join(after, on=["row", "site"]).group_by("site", "e0", "next").len()))
