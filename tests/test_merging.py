"""Adding up tables part after part against Arrow's own group-by."""

import random
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analysis import keysums, merging
from analysis.keycounts import KeyCounts, SiteCounts, StoredCounts
from analysis.longtables import LongTable, whole, write_long
from analysis.merging import LongSum, RunningSum
from analysis.stats import BY_DOCUMENT, BY_TOKEN, CORE, Statistics, merge_statistics, part_statistics

from .synthetic import PLAIN, TWO_STREAMS, change_byte, make_parts

TABLES = {"core": (CORE, 3, CORE.names[:5]), "by_token": (BY_TOKEN, 1, BY_TOKEN.names[:3])}


def summed_by_sorting(tables: list[pa.Table], schema: pa.Schema, keys: list[str]) -> pa.Table:
    """The sum by Arrow's group-by."""
    table = pa.concat_tables(tables).group_by(keys, use_threads=False).aggregate([(n, "sum") for n in schema.names if n not in keys])
    table = table.rename_columns([n.removesuffix("_sum") for n in table.column_names]).select(schema.names)
    return table.sort_by([(k, "ascending") for k in keys]).cast(schema).combine_chunks()


def made(schema: pa.Schema, n: int, seed: int, span: int) -> pa.Table:
    """n rows in no order, with keys that repeat."""
    rng = np.random.default_rng(seed)
    columns = {
        "statistic": pa.array(rng.choice(["flow", "load", "label"], n)), "site": pa.array(rng.integers(0, 3, n), pa.int16()),
        "label": pa.array([random.Random(int(x)).choice([None, "", "a", "\u00e9"]) for x in rng.integers(0, 99, n)], pa.string()),
        "a": pa.array(rng.integers(0, 9, n), pa.int32()), "b": pa.array(rng.integers(0, 9, n), pa.int32()),
        "token_id": pa.array(rng.integers(-1, span, n), pa.int32()), "document": pa.array(rng.integers(0, span, n), pa.int32()), "expert": pa.array(rng.integers(0, 9, n), pa.int32()),
        "count": pa.array(rng.integers(0, 2**40, n)), "sum": pa.array(rng.random(n)),
    }  # fmt: skip
    return pa.table([columns[name] for name in schema.names], schema=schema)


@pytest.mark.parametrize("span", [40, 2**31 - 1], ids=["vocabulary", "ids far apart"])
@pytest.mark.parametrize("name", TABLES)
def test_the_running_sum_is_that_of_a_group_by(name: str, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added up at every table and in windows of a few cells, and all at once: the same bytes."""
    schema, block, keys = TABLES[name]
    tables = [made(schema, n, n, span) for n in (200, 0, 1, 500, 90)]
    expected = summed_by_sorting(tables, schema, keys)
    found = []
    for pending, cells in ((0, 12), (10**9, 2**18)):
        monkeypatch.setattr(merging, "PENDING_ROWS", pending)
        monkeypatch.setattr(merging, "WINDOW_CELLS", cells)
        total = RunningSum(schema, block)
        for table in tables:
            total.add(table)
        found.append(total.table().combine_chunks())
    assert found[0].equals(found[1])
    whole = [c for c in schema.names if c != "sum"]
    assert found[0].select(whole).equals(expected.select(whole))
    if "sum" in schema.names:
        np.testing.assert_allclose(found[0]["sum"].to_numpy(), expected["sum"].to_numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_a_chunk_without_rows_adds_nothing(name: str) -> None:
    """A site that executed nothing in a part leaves such a chunk."""
    schema, block, _ = TABLES[name]
    first, second = made(schema, 50, 1, 40), made(schema, 50, 2, 40)
    with_gap = pa.Table.from_batches([*first.to_batches(), pa.RecordBatch.from_pylist([], schema), *second.to_batches()])
    whole, gapped = RunningSum(schema, block), RunningSum(schema, block)
    whole.add(pa.concat_tables([first, second]))
    gapped.add(with_gap)
    assert gapped.table().equals(whole.table())


def test_nothing_added_is_an_empty_table() -> None:
    assert RunningSum(CORE, 3).table().equals(CORE.empty_table())
    assert LongSum(BY_DOCUMENT, None).total().equals(BY_DOCUMENT.empty_table())


def test_documents_that_two_parts_share_are_added_up() -> None:
    """Parts hold whole documents, but nothing rests on it; here part 1 comes twice."""
    one, two, three = (part_statistics(p, PLAIN) for p in make_parts(PLAIN, 3))
    merged = merge_statistics([three, two, one, two]).by_document
    keys = ["site", "document", "expert"]
    assert merged.combine_chunks().equals(summed_by_sorting([x.by_document for x in (one, two, two, three)], BY_DOCUMENT, keys))


def test_parts_are_taken_one_by_one() -> None:
    """When a part is asked for, none before it is still held: memory need not hold them all."""
    alive: list[int] = []

    def parts() -> Iterator[Statistics]:
        given: list[weakref.ref[Statistics]] = []
        for p in make_parts(TWO_STREAMS, 5):
            alive.append(sum(x() is not None for x in given))
            given.append(weakref.ref(stats := part_statistics(p, TWO_STREAMS)))
            yield stats
            del stats

    merge_statistics(parts())
    assert alive == [0, 0, 0, 0, 0]


def counted(schema: pa.Schema, table: pa.Table, sites: int) -> KeyCounts:
    """A table's rows as a part's counts; the first two sites have the same keys, and are the same."""
    (key,) = {*schema.names} - {"site", "expert", "count"}
    table = summed_by_sorting([table], schema, ["site", key, "expert"])
    found = list[SiteCounts]()
    for i in range(sites):
        mine = table.filter(pa.compute.equal(table["site"], max(i - 1, 0)))
        keys, experts, counts = (mine[n].to_numpy() for n in (key, "expert", "count"))
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, int)
        ends = np.append(first[1:], len(keys)) if len(keys) else np.zeros(0, int)
        own = found[0].keys if i == 1 else keys[first]
        found.append(
            SiteCounts(own, ends.astype(np.int64), experts.astype(np.uint16), counts.astype(np.min_scalar_type(counts.max(initial=0))))
        )
    return KeyCounts(schema, tuple(found))


@pytest.mark.parametrize("span", [40, 2**31 - 1], ids=["close", "far apart"])
@pytest.mark.parametrize("schema", [BY_TOKEN, BY_DOCUMENT], ids=["by token", "by document"])
def test_the_counts_of_parts_add_up_to_those_of_a_group_by(
    schema: pa.Schema, span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored or not, two files at once, keys of one part alone and of all, a part with a site more, with many experts, one that counted nothing.
    No more files are left than are added up at once, and none is deleted that was there."""
    monkeypatch.setattr(keysums, "FAN_IN", 2)
    monkeypatch.setattr(keysums, "WINDOW_KEYS", 30)
    (tmp_path / "parts").mkdir()
    total, memory, parts = LongSum(schema, tmp_path), LongSum(schema, None), list[KeyCounts]()
    for n, wide, most, sites in (
        (900, span, 9, 4),
        (700, 40, 300, 4),
        (3, 40, 9, 4),
        (0, 40, 9, 4),
        (800, 200, 70_000, 5),
        (900, span, 2**40, 4),
    ):
        table, rng = made(schema, n, n + most, wide), np.random.default_rng(n)
        changed = {"count": pa.array(rng.integers(1, most, n))}
        changed |= {"expert": pa.array(rng.integers(0, 300, n), pa.int32())} if n == 800 else {}
        parts.append(counted(schema, pa.table([changed.get(x, table[x]) for x in schema.names], schema=schema), sites))
        stored = StoredCounts(tmp_path / "parts" / f"{n}-{most}.npz", schema)
        parts[-1].write(stored.path)
        assert stored.table().equals(parts[-1].table()) and stored.num_rows == parts[-1].num_rows
        assert stored.where("site", 1).equals(parts[-1].where("site", 1)) and stored.where("site", 9).equals(schema.empty_table())
        total.add(stored if n % 9 else parts[-1])
        assert len(list(tmp_path.glob("*.npz"))) <= 2
        memory.add(parts[-1])
    assert len(list((tmp_path / "parts").iterdir())) == len(parts)  # a capture's own, which it may be resumed from
    found, keys = total.total(), ["site", *({*schema.names} - {"site", "expert", "count"}), "expert"]
    assert isinstance(found, LongTable) and {a == b for a, b in found._extents("site")} == {True}
    expected = summed_by_sorting([x.table() for x in parts], schema, keys)
    assert found.table().combine_chunks().equals(expected) and whole(memory.total()).combine_chunks().equals(expected)
    with pytest.raises(TypeError, match="not as a table"):
        total.add(expected)


def test_a_changed_byte_in_the_counts_of_a_part_is_an_error(tmp_path: Path) -> None:
    stored = StoredCounts(tmp_path / "tokens.npz", BY_TOKEN)
    counted(BY_TOKEN, made(BY_TOKEN, 500, 1, 40), 3).write(stored.path)
    change_byte(stored.path, "site-1")
    with pytest.raises(zipfile.BadZipFile, match="site-1"):
        stored.read()


def test_rows_of_one_text_are_found_in_every_row_group_that_holds_some(tmp_path: Path) -> None:
    """Each row group has a dictionary of its own; one statistic begins in the middle of a group and fills the next."""
    texts = ["chosen"] * 3 + ["flow"] * 4 + ["load"] * 2
    rows = pa.table({"statistic": texts, "site": [0] * 9, "label": [None, "x"] * 4 + [None], "a": range(9), "b": [None] * 9, "count": range(9),
                     "sum": [0.5] * 9}).cast(CORE)  # fmt: skip
    write_long([rows.slice(0, 5), rows.slice(5, 2), rows.slice(7)], CORE, tmp_path / "stats.parquet")
    found = LongTable(tmp_path / "stats.parquet", CORE, texts=frozenset(texts))
    for text in ("chosen", "flow", "load", "entropy"):
        assert found.where("statistic", text).to_pylist() == [r for r in rows.to_pylist() if r["statistic"] == text]
        assert found.where("statistic", text).schema.equals(CORE)
    assert found.table().equals(rows)
