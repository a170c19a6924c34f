"""A part's core counts: stored, added up, and the long table that they stand for."""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analysis import corecounts
from analysis.corecounts import Block, CoreCounts, CoreSum
from analysis.longtables import LongTable, Span, write_long
from analysis.merging import RunningSum, ShortSum
from analysis.stats import CORE, NAMES, Statistics, merge_statistics, part_statistics
from analysis.trace import LayerInfo

from .synthetic import MANY, PLAIN, TWO_STREAMS, change_byte, make_parts, site

FOUR = tuple(site(i, 6 + i) for i in range(4))
ALIKE = tuple(site(i) for i in range(4))


def counted(layers: Sequence[LayerInfo], n: int = 4) -> list[CoreCounts]:
    found = [part_statistics(p, layers).core_rows for p in make_parts(layers, n)]
    assert all(isinstance(x, CoreCounts) for x in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_what_was_written_is_read(layers: tuple[LayerInfo, ...], tmp_path: Path) -> None:
    """With counts of every width."""
    mine = counted(layers, 1)[0]
    big = [replace(x, count=x.count.astype(np.int64) << 7 * (i % 6)) for i, x in enumerate(mine.blocks)]
    for counts in (mine, CoreCounts.of(CORE, reversed(big)), CoreCounts(CORE, ())):
        counts.write(tmp_path / "core.npz")
        again, table = CoreCounts.read(tmp_path / "core.npz", CORE), counts.table()
        assert again.table().equals(table) and counts.num_rows == again.num_rows == len(table)
        for statistic in ("load", "flow", "nothing"):
            assert again.where("statistic", statistic).equals(
                table.filter(pa.compute.equal(table["statistic"], statistic)).combine_chunks()
            )


@pytest.mark.parametrize("at", [0, 1, 3, 4], ids=["tables", "one and tables", "three and a table", "counts alone"])
def test_counts_add_up_to_the_sum_of_their_tables(at: int) -> None:
    """To the last bit, wherever the first table comes; parts differ in labels and in buckets of positions."""
    parts = counted(TWO_STREAMS)
    total, tables = ShortSum(CORE), RunningSum(CORE, 3)
    for i, counts in enumerate(parts):
        total.add(counts if i < at else counts.table())
        tables.add(counts.table())
    found = total.total()
    assert isinstance(found, CoreCounts) == (at == 4)
    assert (found.table() if isinstance(found, CoreCounts) else found).combine_chunks().equals(tables.table().combine_chunks())


def test_a_sum_is_as_wide_as_it_must_be() -> None:
    block = Block("flow", 0, np.array([[200, 0], [0, 3]], np.uint8))
    total = CoreSum(CORE)
    for _ in range(400):
        total.add(CoreCounts(CORE, (block,)))
    (found,) = total.total().blocks
    assert found.count.tolist() == [[80_000, 0], [0, 1_200]] and found.count.dtype == np.uint32
    assert block.count.tolist() == [[200, 0], [0, 3]]


def test_a_changed_byte_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "core.npz"
    counted(PLAIN, 1)[0].write(path)
    change_byte(path, "totals")
    with pytest.raises(zipfile.BadZipFile, match="totals"):
        CoreCounts.read(path, CORE)


def pairs(stats: Statistics) -> list[list[object]]:
    return [x.tolist() for i in range(len(stats.classes)) for x in (stats.coactivation(i), stats.flow(i), stats.flow(i, first=True))]


def on_disk(layers: Sequence[LayerInfo], path: Path, mixed: bool = False) -> tuple[Statistics, Statistics]:
    """(statistics in memory, the same with their core in a file): of one statistic each row group, or as runs were written before."""
    stats = merge_statistics(part_statistics(p, layers) for p in make_parts(layers))
    assert isinstance(stats.core_rows, CoreCounts)
    write_long([stats.core] if mixed else stats.core_rows.groups(), CORE, path, differences=("count",))
    return stats, replace(stats, core_rows=LongTable(path, CORE, texts=NAMES))


@pytest.mark.parametrize("layers", [FOUR, MANY, TWO_STREAMS], ids=["four", "many", "streams"])
@pytest.mark.parametrize("most", [(2**14, 2**16), (200, 200), (40, 50), (1, 16)], ids=["joined", "two", "apart", "cut"])
def test_pairs_of_a_file_equal_those_counted(layers: tuple[LayerInfo, ...], most: tuple[int, int], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Whether sites share row groups, have their own, or fill several; whether pairs that never occur have rows; whether groups are mixed."""
    monkeypatch.setattr(corecounts, "JOINED", most[0])
    monkeypatch.setattr(corecounts, "ALONE", most[1])
    for mixed in (False, True):
        counted, stored = on_disk(layers, tmp_path / "stats.parquet", mixed)
        assert pairs(stored) == pairs(counted)
        assert stored.core.combine_chunks().equals(counted.core.combine_chunks())


def test_a_row_group_has_whole_sites_of_one_statistic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corecounts, "JOINED", 100)
    rows = merge_statistics(part_statistics(p, FOUR) for p in make_parts(FOUR)).core_rows
    assert isinstance(rows, CoreCounts)
    found = [(*(set(t[n].to_pylist()) for n in ("statistic", "site")), len(t)) for t in rows.groups()]
    assert all(len(statistic) == 1 for statistic, _, _ in found)
    assert [x[1:] for x in found if x[0] == {"flow"}] == [({0, 1}, 6 * 7 + 7 * 8), ({2}, 8 * 9)]  # every pair, as they are few
    assert [x[1:] for x in found if x[0] == {"coactivation"}] == [({0, 1, 2, 3}, 15 + 21 + 28 + 36)]
    assert Block("coactivation", 0, np.zeros((600, 600), np.uint8)).stored().tolist() == [1]  # and says that there is a site
    assert len(Block("flow", 0, np.eye(600, dtype=np.uint8)).stored()) == 600


def test_a_question_about_a_site_reads_its_pairs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corecounts, "JOINED", 1)
    counted, stored = on_disk(FOUR, tmp_path / "stats.parquet")
    read, original = list[list[str]](), LongTable._counts
    monkeypatch.setattr(LongTable, "_counts", lambda self, span: read.append([*map(str, span.groups)]) or original(self, span))
    assert stored.flow(1).tolist() == counted.flow(1).tolist() and len(read) == len(read[0]) == 1


@pytest.mark.parametrize("layers", [FOUR, ALIKE], ids=["four", "alike"])
@pytest.mark.parametrize(
    "lie", [{1: 2, 2: 1}, {2: 3}, {0: 1}, {1: 7}, {1: 2, 2: 3, 3: 4}], ids=["swapped", "later", "earlier", "none", "gap"]
)
def test_a_footer_that_names_another_site_changes_no_count(lie: dict[int, int], layers: tuple[LayerInfo, ...], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """What it says carries no checksum: sites that are not all there in order are looked for row by row."""
    monkeypatch.setattr(corecounts, "JOINED", 1)
    counted, stored = on_disk(layers, tmp_path / "stats.parquet")
    extents = LongTable._extents

    def lying(self: LongTable, column: str) -> list[tuple[object, object] | None]:
        said = extents(self, column)
        return [(lie.get(x[0], x[0]),) * 2 if x and column == "site" and x[0] == x[1] else x for x in said]

    monkeypatch.setattr(LongTable, "_extents", lying)
    assert pairs(stored) == pairs(counted)


def test_a_row_group_of_two_statistics_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though sites follow one another."""
    monkeypatch.setattr(corecounts, "JOINED", 1)
    counted, stored = on_disk(FOUR, tmp_path / "stats.parquet")
    assert isinstance(counted.core_rows, CoreCounts)
    flows = [t for t in counted.core_rows.groups() if "flow" in t["statistic"][0].as_py()]
    write_long([pa.concat_tables([flows[0], flows[3]]).combine_chunks(), *flows[1:3], *flows[4:]], CORE, tmp_path / "stats.parquet")
    stored = replace(stored, core_rows=LongTable(tmp_path / "stats.parquet", CORE, texts=NAMES))
    for i in range(4):
        assert stored.flow(i).tolist() == counted.flow(i).tolist() and stored.flow(i, True).tolist() == counted.flow(i, True).tolist()


def test_fewer_counts_than_a_footer_says_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stored = on_disk(FOUR, tmp_path / "stats.parquet")
    monkeypatch.setattr(LongTable, "_spans", lambda self, value, sizes: {0: Span(0, 0, range(1), sizes[0])})
    with pytest.raises(ValueError, match=f"rows instead of {6 * 7}"):
        stored.flow(0)


def test_a_changed_count_of_a_pair_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "stats.parquet"
    _, stored = on_disk(FOUR, path)
    footer = stored.core_rows._footer  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    content[
        footer.row_group(next(i for i in range(99) if footer.row_group(i).column(0).statistics.min == "flow")).column(5).data_page_offset
        + 40
    ] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(OSError, match=re.compile("crc", re.IGNORECASE)):
        stored.flow(0)
