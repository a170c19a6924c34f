"""Blocks of decisions, cut anywhere, add up to the same; one pass serves several readings and reads each decision once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from threading import get_ident
from time import sleep

import numpy as np
import pyarrow as pa
import pytest

from analysis import reading
from analysis.reading import Reading, assignments_reading, block_owners, blocks, coded_tokens, documents_of, in_turn, one_pass
from analysis.trace import Trace
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_trace
from tests.test_store import stored


@pytest.mark.parametrize("rows", [7, 65_536])
def test_assignments_of_groups_by_counting_one_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of no group and places without an expert count nowhere, whatever block they fall in."""
    monkeypatch.setattr(reading, "blocks", partial(blocks, rows=rows))
    trace = make_trace(MANY)
    for layer in MANY:
        experts = trace.experts(layer.index)
        experts[::3, -1] = -1
        group = np.random.default_rng(layer.index).integers(-1, 3, len(experts))
        expected = np.zeros((3, layer.n_classes), int)
        for g, chosen in zip(group, experts, strict=True):
            for e in chosen:
                if g >= 0 and e >= 0:
                    expected[g, e] += 1
        assert one_pass(trace, layer.index, assignments_reading(layer, group, 3))[0].tolist() == expected.tolist() and expected.any(1).all()


def test_readings_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees every block once and in order, and one that asks for more than there is is an error."""
    trace, read, asked = make_trace(PLAIN, [make_part(PLAIN, [60, 40])]), Trace.experts, []

    def counted(self: Trace, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        asked.append((layer, start, stop))
        return read(self, layer, start, stop)

    def kept(ends: bool = True) -> Reading[np.ndarray]:
        seen: list[np.ndarray] = []
        while (block := (yield)) is not None or not ends:
            if block is not None:
                assert block[0] == sum(map(len, seen))
                seen.append(block[1])
        return np.concatenate(seen)

    monkeypatch.setattr(reading.blocks, "__defaults__", (30,))
    monkeypatch.setattr(Trace, "experts", counted)
    found = one_pass(trace, 1, kept(), kept())
    assert sorted(asked) == [(1, 0, 30), (1, 30, 60), (1, 60, 90), (1, 90, 100)]
    assert all(x.tolist() == read(trace, 1).tolist() for x in found)
    told: list[tuple[int, int, int]] = []
    one_pass(trace, 1, kept(), kept(), progress=lambda done, total: told.append((done, total, get_ident())))
    assert told == [(n, 100, get_ident()) for n in (30, 60, 90, 100)]  # by the thread that asked
    with pytest.raises(InterruptedError):
        one_pass(trace, 1, kept(), progress=lambda done, total: (_ for _ in ()).throw(InterruptedError))
    assert len(asked) <= 4 + 4 + 1 + reading.READERS  # it stops, but for the blocks that were read ahead
    with pytest.raises(RuntimeError, match="after the last block"):
        one_pass(trace, 1, kept(), kept(ends=False))


def test_what_is_made_side_by_side_comes_in_turn() -> None:
    """Whatever takes long, no more than READERS keys ahead; an error comes where its key would."""
    begun: list[int] = []

    def make(key: int) -> int:
        begun.append(key)
        sleep(0.02 * (key % 3 == 0))
        if key == 7:
            raise ValueError("seven")
        return key

    found = in_turn(make, range(20))
    assert [next(found) for _ in range(4)] == [0, 1, 2, 3]
    assert set(begun) <= set(range(4 + reading.READERS))
    assert [next(found) for _ in range(3)] == [4, 5, 6]
    with pytest.raises(ValueError, match="seven"):
        next(found)


def test_codes_of_tokens_are_those_of_their_column(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Read in spans that cut parts, of two streams: each chunk of texts has a dictionary of its own, and falls in its place."""
    monkeypatch.setattr(reading, "SPAN", 19)

    def letters(texts: pa.Array) -> np.ndarray:
        return np.array([ord(t.as_py()) for t in texts], np.int8)

    parts = [make_part(TWO_STREAMS, [9, 30, 1], index=i, first_document=3 * i, first_row=40 * i, texts=list(alphabet))
             for i, alphabet in enumerate(("abcd", "dcab", "bx"))]  # fmt: skip
    told: list[tuple[int, int]] = []
    for trace in (make_trace(TWO_STREAMS, parts), stored(tmp_path / "run", TWO_STREAMS, parts)):
        for stream in ("encoder", "decoder"):
            codes = coded_tokens(trace, stream, "token", letters, lambda *n: told.append(n))
            texts = trace.stream_tokens(stream, columns=["token"])["token"].to_pylist()
            assert codes.dtype == np.int8 and [chr(c) for c in codes] == texts and len(set(texts)) == 5
    assert told == 4 * [(min(n, 120), 120) for n in range(19, 138, 19)]


def test_tokens_are_owned_by_the_document_they_stand_in() -> None:
    trace = make_trace(TWO_STREAMS)
    for stream in {layer.stream for layer in TWO_STREAMS}:
        numbers, lengths = documents_of(trace, stream)
        rows = trace.stream_tokens(stream, columns=["document"])["document"].to_numpy()
        edges, n = np.cumsum([0, *lengths.tolist()]), len(rows)
        assert n == edges[-1] > 0 < lengths.min()
        for start in range(n):
            for stop in range(start + 1, n + 1):
                assert numbers[block_owners(edges, start, stop)].tolist() == rows[start:stop].tolist()
