"""Copies a finished run between folders and object stores (s3://, gs://, whatever pyarrow.fs opens), every digest checked after the transfer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pfs

from .store import MANIFEST, RunError, checked_manifest, listed_files, valid_run_name

CHUNK = 2**20


def copy_run(source: str, target: str, progress: Callable[[int, int], None] | None = None) -> int:
    """Copy the run at ``source`` to ``target``, folders or URIs that pyarrow.fs opens; bytes copied.

    Every file is hashed while it is read and again where it arrived; the manifest is written last, so what is only half there is no run.
    An interrupted copy is repeated whole. ``progress`` gets files done and in all. Raises RunError: no run there, a run already here,
    or a digest that differs.
    """
    from_, there = _place(source)
    to, here = _place(target)
    valid_run_name(here.rstrip("/").rpartition("/")[2])
    if to.get_file_info(f"{here}/{MANIFEST}").type != pfs.FileType.NotFound:
        raise RunError(f"there is a run at {target} already: choose another name, or delete it first")
    try:
        with from_.open_input_stream(f"{there}/{MANIFEST}") as file:
            raw = file.read()
    except FileNotFoundError:
        raise RunError(f"{source} is not a finished run: there is no {MANIFEST}") from None
    files = listed_files(checked_manifest(raw, source))
    for done, (name, listed) in enumerate(sorted(files.items())):
        _copy(from_, f"{there}/{name}", to, f"{here}/{name}")
        if _digest(to, f"{here}/{name}") != listed["sha256"]:
            raise RunError(f"{name} arrived at {target} with another sha256 than its manifest says: verify {source}, then copy again")
        if progress is not None:
            progress(done + 1, len(files))
    with to.open_output_stream(f"{here}/{MANIFEST}") as out:
        out.write(raw)
    return sum(s["bytes"] for s in files.values()) + len(raw)


def _place(where: str) -> tuple[Any, str]:
    """(filesystem, path) of a folder or a URI. Raises RunError."""
    try:
        if "://" not in where:
            return pfs.LocalFileSystem(), str(Path(where).absolute())
        filesystem, path = pfs.FileSystem.from_uri(where)
    except (ValueError, OSError, NotImplementedError) as error:
        raise RunError(f"{where} is no folder and no address that pyarrow opens: {error}") from None
    return filesystem, path.rstrip("/")


def _copy(from_: Any, source: str, to: Any, target: str) -> None:
    if isinstance(to, pfs.LocalFileSystem):
        to.create_dir(target.rpartition("/")[0], recursive=True)
    with from_.open_input_stream(source) as read, to.open_output_stream(target) as out:
        while chunk := read.read(CHUNK):
            out.write(chunk)


def _digest(filesystem: Any, path: str) -> str:
    whole = hashlib.sha256()
    with filesystem.open_input_stream(path) as file:
        while chunk := file.read(CHUNK):
            whole.update(chunk)
    return whole.hexdigest()
