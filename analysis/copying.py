"""Copies a finished run between folders and object stores (s3://, gs://, whatever pyarrow.fs opens), every digest checked after the transfer."""

from __future__ import annotations

from collections.abc import Callable

from .places import Place, RunError, copy_file
from .store import MANIFEST, checked_manifest, listed_files, valid_run_name


def copy_run(source: str, target: str, progress: Callable[[int, int], None] | None = None) -> int:
    """Copy the run at ``source`` to ``target``, folders or URIs that pyarrow.fs opens; bytes copied.

    Every file is hashed while it is read and again where it arrived; the manifest is written last, so what is only half there is no run.
    An interrupted copy is repeated whole. ``progress`` gets files done and in all. Raises RunError: no run there, a run or files of
    something else already here, or a digest that differs.
    """
    from_, to = Place.of(source), Place.of(target)
    valid_run_name(to.name)
    if to.holds(MANIFEST):
        raise RunError(f"there is a run at {target} already: choose another name, or delete it first")
    try:
        with from_.filesystem.open_input_stream(f"{from_.path}/{MANIFEST}") as file:
            raw = file.read()
    except FileNotFoundError:
        raise RunError(f"{source} is not a finished run: there is no {MANIFEST}") from None
    files = listed_files(checked_manifest(raw, source))
    if (other := next((n for n in to.sizes() if n not in files), None)) is not None:
        raise RunError(f"{target} holds files that are not of this run, such as {other}: choose another name, or empty it")
    for done, (name, listed) in enumerate(sorted(files.items())):
        copy_file(from_.filesystem, f"{from_.path}/{name}", to.filesystem, f"{to.path}/{name}")
        if to.digest(name) != listed["sha256"]:
            raise RunError(f"{name} arrived at {target} with another sha256 than its manifest says: verify {source}, then copy again")
        if progress is not None:
            progress(done + 1, len(files))
    with to.filesystem.open_output_stream(f"{to.path}/{MANIFEST}") as out:
        out.write(raw)
    return sum(s["bytes"] for s in files.values()) + len(raw)
