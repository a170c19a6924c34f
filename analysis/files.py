"""Files that appear whole or not at all, and what identifies one. Knows nothing of what is in them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write through a temporary file in the same folder: fsync, rename, fsync the folder. Mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        os.chmod(temporary, 0o600)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Values as readable JSON, atomically."""
    text = json.dumps(values, indent=1, ensure_ascii=False)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_arrays(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Arrays by name as an .npz file that numpy reads; each is written from where it lies, which numpy would copy first."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            given = np.ascontiguousarray(array)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(given))
                file.write(given.reshape(-1).view(np.uint8).data)


def stamp(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file, as the manifest lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed writer left below ``folder``."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of this process alone, deleted on leaving. Those that killed processes left are deleted first: they hold text."""
    for left in Path(tempfile.gettempdir()).glob("routerscope-scratch-*"):
        if (held := _held(left, fcntl.LOCK_NB)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    while True:
        folder = Path(tempfile.mkdtemp(prefix="routerscope-scratch-"))
        if (held := _held(folder, 0)) is None:
            continue
        if folder.exists():  # else another process took it for one that was left
            break
        os.close(held)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(held)


def _held(folder: Path, wait: int) -> int | None:
    """A descriptor that locks a folder of this user; None where another process does, or the folder is gone."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | wait)
    except BlockingIOError:
        os.close(held)
        return None
    return held


def folder_digest(folder: Path, *patterns: str) -> str:
    """sha256 hex over names and contents of the files of a folder that match any pattern."""
    whole = hashlib.sha256()
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern)):
        whole.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
