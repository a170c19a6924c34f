"""Adding up tables part after part against Arrow's own group-by."""

import random
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analysis import longtables, merging
from analysis.keycounts import KeyCounts, SiteCounts
from analysis.longtables import LongTable, by_site, write_long
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
    assert LongSum(BY_DOCUMENT, "document", None).total().equals(BY_DOCUMENT.empty_table())


def test_documents_that_two_parts_share_are_added_up() -> None:
    """Parts hold whole documents, but nothing rests on it; here part 1 comes twice."""
    one, two, three = (part_statistics(p, PLAIN) for p in make_parts(PLAIN, 3))
    merged = merge_statistics([three, two, one, two]).by_document
    keys = ["site", "document", "expert"]
    assert merged.combine_chunks().equals(summed_by_sorting([x.by_document for x in (one, two, two, three)], BY_DOCUMENT, keys))


@pytest.mark.parametrize("span", [40, 2**31 - 1], ids=["vocabulary", "ids far apart"])
@pytest.mark.parametrize("name", ["by_token", "by_document"])
def test_sums_on_disk_are_those_in_memory(name: str, span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spilled at every table, swept a few rows at a time, three runs at once, rows that one key fills a row group with: the same table."""
    schema, key = {"by_token": (BY_TOKEN, "token_id"), "by_document": (BY_DOCUMENT, "document")}[name]
    for what, most in (("PENDING_ROWS", 50), ("SPILL_ROWS", 100), ("SWEEP_ROWS", 20), ("FAN_IN", 3)):
        monkeypatch.setattr(merging, what, most)
    monkeypatch.setattr(longtables, "GROUP_ROWS", 7)
    tables = [made(schema, n, n, s) for n, s in ((200, span), (0, 1), (1, 9), (500, span), (90, 3), (300, span), (301, 2), (40, span))]
    spilled, read = LongSum(schema, key, tmp_path / "a"), LongSum(schema, key, tmp_path / "b")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    keys = ["site", key, "expert"]
    for i, table in enumerate(tables):
        spilled.add(table)
        write_long(by_site(summed_by_sorting([table], schema, keys)), schema, tmp_path / f"{i}.parquet")
        read.add(LongTable(tmp_path / f"{i}.parquet", schema))
    for total in (spilled.total(), read.total()):
        assert isinstance(total, LongTable)
        assert total.table().combine_chunks().equals(summed_by_sorting(tables, schema, keys))
        assert {a == b for a, b in total.extents("site")} == {True}


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


@pytest.mark.parametrize("shift", [0, 10**6], ids=["vocabulary", "documents"])
@pytest.mark.parametrize("name", ["by_token", "by_document"])
def test_sums_in_an_array_are_those_of_a_group_by(name: str, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that overflow 8 bits, keys below and above those of the first table, counts of 0, an expert and a site not seen before."""
    schema, key = {"by_token": (BY_TOKEN, "token_id"), "by_document": (BY_DOCUMENT, "document")}[name]
    monkeypatch.setattr(merging, "SPILL_ROWS", 300)
    tables = []
    for n, span, most in ((500, 40, 9), (400, 40, 130), (60, 40, 300), (50, 200, 9), (50, 44, 9), (9, 2**31 - 1 - shift, 9), (400, 40, 90)):
        table, rng = made(schema, n, n + most, span), np.random.default_rng(n)
        new = {key: pa.array(table[key].to_numpy() + shift, pa.int32()), "count": pa.array(rng.integers(0, most, n))}
        if n == 60:
            new |= {"expert": pa.array(rng.integers(0, 30, n), pa.int32()), "site": pa.array(rng.integers(0, 20, n), pa.int16())}
        tables.append(pa.table([new.get(x, table[x]) for x in schema.names], schema=schema))
    total = LongSum(schema, key, tmp_path)
    arrays = []
    for table in tables:
        total.add(table)
        arrays.append(total._dense is not None)
    found, keys = total.total(), ["site", key, "expert"]
    assert any(arrays) and isinstance(found, LongTable)
    assert found.table().combine_chunks().equals(summed_by_sorting(tables, schema, keys))
    assert {a == b for a, b in found.extents("site")} == {True}


def counted(tables: list[pa.Table], sites: int) -> KeyCounts:
    """Their sum by token id as a part's counts."""
    table = summed_by_sorting(tables, BY_TOKEN, BY_TOKEN.names[:3])
    found = []
    for i in range(sites):
        site, keys, experts, counts = (c.to_numpy() for c in table.filter(pa.compute.equal(table["site"], i)).columns)
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, int)
        ends = np.append(first[1:], len(keys)) if len(keys) else np.zeros(0, int)
        found.append(SiteCounts(keys[first], ends.astype(np.int64), experts.astype(np.uint16), counts.astype(np.int32)))
    return KeyCounts(BY_TOKEN, tuple(found))


@pytest.mark.parametrize("span", [40, 2**31 - 1], ids=["vocabulary", "ids far apart"])
def test_the_counts_of_parts_add_up_to_those_of_a_group_by(span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored and read again; cells that overflow 8 bits, keys and experts that find no place, a part with a site more, one that counted nothing, a table between."""
    monkeypatch.setattr(merging, "SPILL_ROWS", 300)
    tables = []
    for n, wide, most in ((900, span, 9), (700, 40, 300), (3, 40, 9), (0, 40, 9), (800, 200, 70_000), (900, span, 200)):
        table, rng = made(BY_TOKEN, n, n + most, wide), np.random.default_rng(n)
        changed = {"count": pa.array(rng.integers(1, most, n))}
        changed |= {"site": pa.array(np.full(n, 3), pa.int16())} if n == 800 else {}
        changed |= {"expert": pa.array(np.arange(14, 14 + n), pa.int32())} if n == 3 else {}
        tables.append(pa.table([changed.get(x, table[x]) for x in BY_TOKEN.names], schema=BY_TOKEN))
    total, arrays = LongSum(BY_TOKEN, "token_id", tmp_path), []
    for i, table in enumerate(tables):
        part = counted([table], 4)
        assert part.table().combine_chunks().equals(summed_by_sorting([table], BY_TOKEN, BY_TOKEN.names[:3]))
        part.write(tmp_path / f"{i}.npz")
        total.add(KeyCounts.read(tmp_path / f"{i}.npz", BY_TOKEN) if i != 1 else table)
        arrays.append(total._dense is not None)
    found = total.total()
    assert isinstance(found, LongTable) and any(arrays) and arrays[0] == (span == 40)
    assert found.table().combine_chunks().equals(summed_by_sorting(tables, BY_TOKEN, BY_TOKEN.names[:3]))
    assert {a == b for a, b in found.extents("site")} == {True}


def test_a_changed_byte_in_the_counts_of_a_part_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    counted([made(BY_TOKEN, 500, 1, 40)], 3).write(path)
    change_byte(path, "counts")
    with pytest.raises(zipfile.BadZipFile, match="counts"):
        KeyCounts.read(path, BY_TOKEN)


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
