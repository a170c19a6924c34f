"""Captures that are not gone on with, and runs that are not written over."""

import json
from pathlib import Path

import pytest

from analysis.store import RunError
from analysis.writing import RunWriter

from .synthetic import PLAIN, card, make_parts
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
