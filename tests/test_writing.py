"""Captures that are not gone on with, and runs that are not written over."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.capture import PlannedDocument, plan_parts
from analysis.cluster import _check_stored
from analysis.places import Place
from analysis.store import RunError
from analysis.verifying import verify_run
from analysis.writing import RunWriter, write_part

from .synthetic import PLAIN, card, make_part, make_parts
from .test_store import stored


def test_a_capture_that_an_older_version_began_is_not_resumed(tmp_path: Path) -> None:
    with RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0}) as writer:
        writer.write(make_parts(PLAIN)[0])
    path = tmp_path / "run" / "progress" / "capture.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "schema_version"}))
    with pytest.raises(RunError, match="other schema_version"):
        RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0})


def test_resume_under_other_options_is_refused(tmp_path: Path) -> None:
    with RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0}) as writer:
        writer.write(make_parts(PLAIN)[0])
    with pytest.raises(RunError, match="other options"):
        RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 1})
    with pytest.raises(RunError, match="other model"):
        RunWriter.open(tmp_path / "run", card(PLAIN, "another"), {"seed": 0})
    with RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0}) as writer:
        assert (writer.parts, writer.documents) == (1, 3)
        with pytest.raises(RunError, match="being written"):
            RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0})


def test_a_finished_run_is_never_written_over(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    with pytest.raises(RunError, match="finished run"):
        RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0})
    with pytest.raises(RunError, match="nothing was captured"), RunWriter.open(tmp_path / "new", card(PLAIN), {}) as writer:
        writer.commit()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """A run would mix with it; ending one deletes progress/ and parts of no record, which may be someone's own."""
    for name in ("progress/mine.txt", "routing/part-00000.parquet", "thesis.tex"):
        own = tmp_path / name.partition("/")[0] / "home" / name
        own.parent.mkdir(parents=True)
        own.write_text("years of work")
        folder = tmp_path / name.partition("/")[0] / "home"
        before = folder.stat().st_mode
        with pytest.raises(RunError, match=f"such as {name}: choose another name"):
            RunWriter.open(folder, card(PLAIN), {})
        assert folder.stat().st_mode == before and own.read_text() == "years of work"
    begun = tmp_path / "begun"
    (begun / "progress").mkdir(parents=True)
    for name in ("lock", ".capture.json.7.abc.tmp"):  # killed as it began
        (begun / "progress" / name).touch()
    with RunWriter.open(begun, card(PLAIN), {}) as writer:
        assert writer.parts == 0 and not list(begun.rglob("*.tmp"))


def test_files_of_no_part_go_before_the_manifest(tmp_path: Path) -> None:
    """Killed before a part's record was there, and ended with fewer texts: who reads the folder as one table must not count that part."""
    with RunWriter.open(tmp_path / "run", card(PLAIN), {}) as writer:
        for part in make_parts(PLAIN, 3):
            writer.write(part)
    (tmp_path / "run" / "progress" / "part-00002.json").unlink()
    (tmp_path / "run" / "tokens" / "note.txt").write_text("someone's own")
    with RunWriter.open(tmp_path / "run", card(PLAIN), {}) as writer:
        trace = writer.commit()
    rows = {kind: pq.read_table(tmp_path / "run" / kind).num_rows for kind in ("routing", "scores")}
    assert rows == dict.fromkeys(rows, trace.n_tokens() * len(PLAIN))
    assert verify_run(tmp_path / "run") == ("tokens/note.txt: not part of the run",)


def test_a_part_numbered_after_other_texts_does_not_count(tmp_path: Path) -> None:
    """A cluster leaves parts 0 and 2; then a text of part 1 is changed, so that it has more tokens and part 2 begins elsewhere."""
    first, _, last = make_parts(PLAIN, 3)
    longer = make_part(PLAIN, [7, 3, 9], index=1, first_document=3, first_row=17)
    fewer = make_part(PLAIN, [6, 12], index=1, first_document=3, first_row=17)  # as many tokens, but two documents
    for name, other in (("longer", longer), ("fewer", fewer)):
        place = Place.of(tmp_path / name)
        with RunWriter.open(tmp_path / name, card(PLAIN), {}) as writer:
            for part in (first, last, other):
                write_part(place, part, PLAIN)
            assert (stored := writer.refresh()).keys() == {0, 1, 2} and writer.parts == 2
            lengths = [5, 3, 9, *other.documents["n_tokens"].to_pylist(), 7, 3, 9]
            told = [d for part in (first, other, last) for d in part.documents.select(["digest", "label", "name"]).to_pylist()]
            planned = [PlannedDocument((d["digest"], d["label"], d["name"]), {"decoder": n}) for d, n in zip(told, lengths, strict=True)]
            plan = plan_parts(planned, 17)
            assert [len(p.documents) for p in plan] == [3, len(lengths) - 6, 3]
            _check_stored(writer, plan, {i: stored[i] for i in (0, 1)})
            with pytest.raises(RunError, match="interrupted with other texts"):
                _check_stored(writer, plan, stored)


def test_damage_to_an_interrupted_capture_is_named_or_captured_again(tmp_path: Path) -> None:
    parts, whole = make_parts(PLAIN, 2), tmp_path / "whole"
    with RunWriter.open(whole, card(PLAIN), {}) as writer:
        for part in parts:
            writer.write(part)
    for name in ("documents-00001.parquet", "core-00001.npz", "by_token-00001.npz", "by_document-00001.npz"):
        run = shutil.copytree(whole, tmp_path / name.partition("-")[0])
        raw = bytearray((run / "progress" / name).read_bytes())
        raw[len(raw) // 3] ^= 4
        (run / "progress" / name).write_bytes(raw)
        with pytest.raises(RunError, match="is damaged .*delete that part's record"), RunWriter.open(run, card(PLAIN), {}) as writer:
            writer.commit()
        (run / "progress" / "part-00001.json").unlink()
        with RunWriter.open(run, card(PLAIN), {}) as writer:
            writer.write(parts[1])
            writer.commit()
        assert verify_run(run) == ()
    record = whole / "progress" / "part-00001.json"
    for text in ("{", record.read_text().replace('"index": 1', '"index": 2'), "[]"):
        record.write_text(text)
        with RunWriter.open(whole, card(PLAIN), {}) as writer:
            assert writer.parts == 1
    (whole / "progress" / "capture.json").write_text('{"model"')
    with pytest.raises(RunError, match="capture.json is damaged"):
        RunWriter.open(whole, card(PLAIN), {})
