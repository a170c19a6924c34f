"""Files that a power cut cannot leave in pieces."""

import os
import stat
from pathlib import Path

import pytest

from analysis.files import write_atomically


def test_a_file_appears_whole_and_synced_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a power cut: sync the file, rename that very file, sync the folder."""
    target, calls = tmp_path / "file", []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"file {os.fstat(descriptor).st_ino}")
        sync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(target, lambda path: path.write_text("whole") and None)
    assert calls == [f"file {target.stat().st_ino}", "rename", "folder"]

    def torn(path: Path) -> None:
        path.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(target, torn)
    assert target.read_text() == "whole" and os.listdir(tmp_path) == ["file"]
