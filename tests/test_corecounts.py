"""A part's core counts: stored, added up, and the long table that they stand for."""

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analysis.corecounts import Block, CoreCounts, CoreSum
from analysis.merging import RunningSum, ShortSum
from analysis.stats import CORE, part_statistics
from analysis.trace import LayerInfo

from .synthetic import MANY, PLAIN, TWO_STREAMS, change_byte, make_parts


def counted(layers: Sequence[LayerInfo], n: int = 4) -> list[CoreCounts]:
    found = [part_statistics(p, layers).core_rows for p in make_parts(layers, n)]
    assert all(isinstance(x, CoreCounts) for x in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_what_was_written_is_read(layers: tuple[LayerInfo, ...], tmp_path: Path) -> None:
    """With counts of every width, and in pieces of any size the same table."""
    mine = counted(layers, 1)[0]
    big = [replace(x, count=x.count.astype(np.int64) << 7 * (i % 6)) for i, x in enumerate(mine.blocks)]
    for counts in (mine, CoreCounts.of(CORE, reversed(big)), CoreCounts(CORE, ())):
        counts.write(tmp_path / "core.npz")
        again, table = CoreCounts.read(tmp_path / "core.npz", CORE), counts.table()
        assert again.table().equals(table) and counts.num_rows == again.num_rows == len(table)
        for rows in (1, 7, 100, len(table) + 1):
            pieces = list(again.tables(rows))
            assert [len(x) for x in pieces[:-1]] == [rows] * (len(pieces) - 1)
            assert pa.concat_tables([CORE.empty_table(), *pieces]).combine_chunks().equals(table.combine_chunks())
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
