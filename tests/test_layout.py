"""What a range of a stored run reads, row group by row group, and how large real routing is on disk."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis import layout
from analysis.files import stamp
from analysis.layout import GROUP_ROWS, part_tokens
from analysis.store import RunError, open_run
from analysis.trace import TOKENS, LayerInfo, SiteRouting, Trace, TraceError

from .synthetic import MANY, PLAIN, SPECIAL, TWO_STREAMS, make_part, make_parts, make_trace, site
from .test_store import stored


def test_a_range_reads_one_part_and_its_site_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of part 1 are read while every other part is unreadable."""
    parts = make_parts(PLAIN)
    trace = stored(tmp_path / "run", PLAIN, parts)
    first, n = parts[1].first_rows["decoder"], parts[1].tokens.num_rows
    for other in ("00000", "00002"):
        (tmp_path / "run" / "routing" / f"part-{other}.parquet").write_bytes(b"")
    groups: list[int] = []
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda self, i, **more: (groups.extend(i), read(self, i, **more))[1])
    assert np.array_equal(trace.routing(1, first, first + n).experts, parts[1].routing[1].experts)
    assert groups == [1]


def rewritten_tokens(run: Path, rows: int, order: str | None = None) -> Trace:
    """The run with row groups of ``rows`` in its tokens files, sorted by a column where named; sizes listed anew."""
    manifest = json.loads((run / "run.json").read_text())
    for part in manifest["parts"]:
        name = next(n for n in part["files"] if n.startswith("tokens/"))
        table = pq.read_table(run / name)
        pq.write_table(table.take(np.argsort(table[order].to_numpy(), kind="stable")) if order else table, run / name, row_group_size=rows,
                       write_page_checksum=True)  # fmt: skip
        part["files"][name] = stamp(run / name)
    (run / "run.json").write_text(json.dumps(manifest))
    return open_run(run)


@pytest.mark.parametrize(
    ("layers", "order"), [(PLAIN, None), (TWO_STREAMS, None), (TWO_STREAMS, "document")], ids=["one", "two", "interleaved"]
)
def test_a_range_of_tokens_equals_that_of_the_whole_table(tmp_path: Path, layers: tuple[LayerInfo, ...], order: str | None) -> None:
    memory = make_trace(layers)
    stored(tmp_path / "run", layers)
    trace = rewritten_tokens(tmp_path / "run", 7, order)
    for stream in {x.stream for x in layers}:
        n = trace.n_tokens(stream)
        for start, stop in ((0, 1), (3, n), (n - 1, n), (6, 8), (15, 19), (0, n), (5, 5), (n, n)):
            for columns in (TOKENS.names, ["token", "loss"]):
                mine, other = (t.stream_tokens(stream, start, stop, columns) for t in (trace, memory))
                assert mine.schema.equals(other.schema) and mine.to_pylist() == other.to_pylist()
        assert trace.stream_tokens(stream).to_pylist() == memory.stream_tokens(stream).to_pylist()
    assert "tokens" not in trace.__dict__


def test_a_document_reads_the_row_groups_of_its_tokens_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every other row group of its part, and every other part, is destroyed."""
    expected = stored(tmp_path / "run").stream_tokens("decoder").to_pylist()
    trace = rewritten_tokens(tmp_path / "run", 4)
    start, stop = trace.document_range(1)
    groups: list[int] = []
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda self, i, **more: (groups.extend(i), read(self, i, **more))[1])
    path = tmp_path / "run" / "tokens" / "part-00000.parquet"
    footer, damaged = pq.read_metadata(path), bytearray(path.read_bytes())
    needed = set(range(start // 4, -(-stop // 4)))
    for i in set(range(footer.num_row_groups)) - needed:
        for c in range(footer.num_columns):
            column = footer.row_group(i).column(c)
            at = column.dictionary_page_offset or column.data_page_offset
            damaged[at : at + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(damaged)
    for other in ("00001", "00002"):
        (tmp_path / "run" / "tokens" / f"part-{other}.parquet").write_bytes(b"")
    assert trace.stream_tokens("decoder", start, stop).to_pylist() == expected[start:stop]
    assert set(groups) == needed and len(needed) < footer.num_row_groups
    with pytest.raises(RunError, match="tokens/part-00000.parquet is damaged"):
        trace.stream_tokens("decoder", 0, 1)


def test_a_range_reads_the_row_groups_that_hold_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of two streams and 2.5 groups a site; ranges within a group, over a boundary, at the ends, and of nothing."""
    part = make_part(TWO_STREAMS, [5 * GROUP_ROWS // 2])
    trace = stored(tmp_path / "run", TWO_STREAMS, [part])
    n, groups = 5 * GROUP_ROWS // 2, []
    size = -(-n // 3)
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda self, i, **more: (groups.append(i), read(self, i, **more))[1])
    for start, stop, expected in (
        (0, 9, [3]), (size - 1, size, [3]), (size, size + 1, [4]), (size - 5, size + 5, [3, 4]),
        (n - 3, n, [5]), (0, n, [3, 4, 5]), (7, 7, []),
    ):  # fmt: skip
        groups.clear()
        routing, scores = trace.routing(1, start, stop), trace.scores(1, start, stop)
        assert groups == [expected, expected]
        assert np.array_equal(routing.experts, part.routing[1].experts[start:stop])
        assert np.array_equal(routing.chosen, part.routing[1].chosen[start:stop])
        assert np.array_equal(scores.margin, part.scores[1].margin[start:stop])


@pytest.mark.parametrize("layers", [PLAIN, SPECIAL, TWO_STREAMS, MANY], ids=["plain", "special", "two streams", "many"])
def test_sites_read_together_are_those_of_the_capture(tmp_path: Path, layers: tuple[LayerInfo, ...]) -> None:
    """Ranges within a part, over parts, of nothing; in an order that is not that of the file."""
    memory, trace = make_trace(layers), stored(tmp_path / "run", layers)
    for stream in {x.stream for x in layers}:
        sites, n = [x.index for x in layers if x.stream == stream][::-1], trace.n_tokens(stream)
        for start, stop in ((0, n), (3, n - 1), (n - 1, n), (5, 5)):
            for i, mine in zip(sites, trace.routings(sites, start, stop), strict=True):
                other = memory.routing(i, start, stop)
                assert all(np.array_equal(getattr(mine, x), getattr(other, x)) for x in ("experts", "weights", "chosen"))
                assert (mine.chosen is mine.experts) == np.array_equal(other.chosen, other.experts)
                assert np.array_equal(trace.experts(i, start, stop), other.experts) and mine.experts.dtype == other.experts.dtype
    if len({x.stream for x in layers}) > 1:
        with pytest.raises(TraceError, match="two streams"):
            trace.routings(range(len(layers)), 0, 1)
    assert trace.routings([], 0, 1) == ()


def test_real_routing_takes_at_most_two_bytes_per_decision(tmp_path: Path, real: Path) -> None:
    """DeepSeek-V2-Lite, top-6 of 64, weights rounded to bfloat16.

    They were published as text of four decimals, which is no float format of the model: as float32 they take 3.7 bytes.
    """
    table = pq.read_table(real / "deepseek-v2-lite" / "routing.parquet").to_pandas()
    table = table[table["task"] == "intent"].sort_values(["layer", "seq", "pos", "slot"])
    numbers = sorted(table["layer"].unique())
    layers = tuple(site(i, 64, 6) for i in range(len(numbers)))
    routing = []
    for n in numbers:
        mine = table[table["layer"] == n]
        experts = mine["expert"].to_numpy().reshape(-1, 6).astype(np.int16)
        bits = mine["weight"].to_numpy().astype(np.float32).view(np.uint32) + np.uint32(0x8000)
        weights = (bits & np.uint32(0xFFFF0000)).view(np.float32).reshape(-1, 6)
        routing.append(SiteRouting(experts, weights, experts))
    n_tokens = len(routing[0].experts)
    part = replace(make_part(layers, [n_tokens]), routing=tuple(routing))
    trace = stored(tmp_path / "run", layers, [part])
    assert np.array_equal(trace.weights(3), routing[3].weights) and np.array_equal(trace.experts(3), routing[3].experts)
    size = sum(p.stat().st_size for p in (tmp_path / "run" / "routing").iterdir())
    per_decision = size / (n_tokens * 6 * len(layers))
    print(f"{per_decision:.3f} bytes per decision")
    assert per_decision <= 2.0


@pytest.mark.parametrize(("layers", "expected"), [
    ((site(0, 64, 8),) * 16, 65_536), ((site(0, 8, 2),) * 32, 65_536), ((site(0, 256, 8),) * 40, 49_152), ((site(0, 256, 8),) * 58, 32_768),
    ((site(0, 512, 22),) * 100, 16_384)])  # fmt: skip
def test_a_part_has_about_as_many_decisions_whatever_the_model(layers: tuple[LayerInfo, ...], expected: int) -> None:
    """Whole row groups; a part of the deepest model is no less than one, as every document would be read from many files."""
    assert part_tokens(layers) == expected and expected % GROUP_ROWS == 0


@pytest.mark.parametrize("kind", ["routing", "scores"])
def test_what_a_part_has_more_than_whole_row_groups_is_no_group_of_its_own(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "GROUP_ROWS", 16)
    for n, rows in ((1, [1]), (16, [16]), (18, [18]), (19, [10, 9]), (35, [18, 17]), (48, [16] * 3)):
        {"routing": layout.write_routing, "scores": layout.write_scores}[kind](make_part(PLAIN, [n]), PLAIN, tmp_path / "part")
        assert [rows for _, rows in layout.Footer.of(tmp_path / "part").sites[1]] == rows
