"""Runs copied between folders, and to and from an S3 server on the loopback address where one is at hand."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.copying import copy_run
from analysis.store import RunError, open_run
from analysis.verifying import verify_run

from .conftest import ROOT
from .s3server import CREDENTIALS, bucket
from .synthetic import differences

DEMO = ROOT / "data/demo-run"


def test_a_copy_is_the_run(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    size = copy_run(str(DEMO), str(tmp_path / "copy"), lambda *p: seen.append(p))
    assert size == sum(p.stat().st_size for p in DEMO.rglob("*") if p.is_file())
    assert seen[-1][0] == seen[-1][1] == len(seen) and verify_run(tmp_path / "copy") == ()
    with pytest.raises(RunError, match="already"):
        copy_run(str(DEMO), str(tmp_path / "copy"))


def test_a_changed_file_is_not_copied_as_a_run(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "run")
    raw = bytearray((tmp_path / "run/documents.parquet").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "run/documents.parquet").write_bytes(raw)
    with pytest.raises(RunError, match=r"documents.parquet arrived .* another sha256"):
        copy_run(str(tmp_path / "run"), str(tmp_path / "copy"))
    with pytest.raises(RunError, match=r"no run\.json"):
        open_run(tmp_path / "copy")


def test_a_copy_does_not_mix_with_something_else(tmp_path: Path) -> None:
    """Parts that another copy left, or an interrupted capture, would be read with those of the run."""
    for other in ("routing/part-00001.parquet", "progress/capture.json"):
        place = tmp_path / other.partition("/")[0] / "copy"
        (place / other).parent.mkdir(parents=True)
        (place / other).touch()
        with pytest.raises(RunError, match=f"files that are not of this run, such as {other}"):
            copy_run(str(DEMO), str(place))
        assert [str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()] == [other]
        (place / other).unlink()
        (place / "documents.parquet").write_bytes(b"half")  # what an interrupted copy left
        copy_run(str(DEMO), str(place))
        assert verify_run(place) == ()


def test_addresses_that_are_none(tmp_path: Path) -> None:
    for wrong, said in ((("ftp://x/y", str(tmp_path / "a")), "no address that pyarrow opens"), ((str(tmp_path), str(tmp_path / "a")), "no run"),
                        ((str(DEMO), str(tmp_path / "Not a name")), "a run name has")):  # fmt: skip
        with pytest.raises(RunError, match=said):
            copy_run(*wrong)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with bucket() as addresses:
        yield addresses


def test_to_s3_and_back(s3: str, tmp_path: Path) -> None:
    copy_run(str(DEMO), s3 % "demo")
    with pytest.raises(RunError, match="already"):
        copy_run(str(DEMO), s3 % "demo")
    copy_run(s3 % "demo", s3 % "again")
    copy_run(s3 % "again", str(tmp_path / "back"))
    assert verify_run(tmp_path / "back") == () and differences(open_run(tmp_path / "back"), open_run(DEMO)) == []
    with pytest.raises(RunError, match="no run"):
        copy_run(s3 % "absent", str(tmp_path / "none"))
