"""Where the files of a run lie: in a folder, or below an address that pyarrow.fs opens (s3://, gs://).

They are read where they lie, by the ranges that are asked for. They are written in a folder either way: in the place of a folder that folder
is the run's own and nothing is copied; below an address it is scratch, and every file is read back and its digest compared where it
arrived. An object store shows an object whole or not at all, which is what renaming does in a folder.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pfs

from .files import scratch, stamp

CHUNK = 2**20
AT_ONCE = 16  # requests to an object store, each of which waits longer than it works
_COLLAPSED = re.compile(r"[a-z][a-z0-9+]+:/[^/]")
_LOCAL = pfs.LocalFileSystem()


class RunError(ValueError):
    """A run that cannot be used; the message says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Place:
    """A run's place: ``address`` as it was given, ``path`` in ``filesystem``, pyarrow's. Files go by their path below it."""

    address: str
    filesystem: Any
    path: str

    @classmethod
    def of(cls, where: str | Path | Place) -> Place:
        """The place at a folder or a URI. Raises RunError."""
        if isinstance(where, Place):
            return where
        address = str(where)
        try:
            if isinstance(where, Path) and _COLLAPSED.match(address):
                raise ValueError("give it as text, for a Path has one slash of the two")
            if "://" not in address:
                return cls(address, _LOCAL, str(Path(address).absolute()))
            filesystem, path = pfs.FileSystem.from_uri(address)
        except (ValueError, OSError, NotImplementedError) as error:
            raise RunError(f"{address} is no folder and no address that pyarrow opens: {error}") from None
        return cls(address, filesystem, path.rstrip("/"))

    @property
    def name(self) -> str:
        """The run's name, the last part of its path."""
        return self.path.rpartition("/")[2]

    @property
    def folder(self) -> Path | None:
        """The folder where the run is one; None below an address."""
        return Path(self.path) if isinstance(self.filesystem, pfs.LocalFileSystem) else None

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder to write in: the run's own, or one that is deleted on leaving."""
        if self.folder is not None:
            yield self.folder
        else:
            with scratch() as folder:
                yield folder

    def sizes(self) -> dict[str, int]:
        """Bytes of every file there."""
        if self.folder is not None:  # pyarrow cannot list a name that is not UTF-8, which a folder may hold
            return dict(_files(self.folder))
        found = self.filesystem.get_file_info(pfs.FileSelector(self.path, allow_not_found=True, recursive=True))
        return {f.path[len(self.path) + 1 :]: f.size for f in found if f.is_file}

    def holds(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").is_file)

    def file(self, name: str) -> Any:
        """What pyarrow reads the file from: its path in a folder, else an open file of which only what is asked for comes here."""
        return self.folder / name if self.folder is not None else self.filesystem.open_input_file(f"{self.path}/{name}")

    def digest(self, name: str) -> str:
        """sha256 hex of the file as it is there. Raises OSError."""
        return digest(self.filesystem, f"{self.path}/{name}")

    def fetch(self, folder: Path, *names: str) -> None:
        """Copy those of the files that are not in ``folder``, a workspace, there; several at a time."""
        missing = [n for n in names if folder != self.folder and not (folder / n).exists()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda n: copy_file(self.filesystem, f"{self.path}/{n}", _LOCAL, str(folder / n)), missing))

    def store(self, folder: Path, *names: str) -> None:
        """Bring files of ``folder``, a workspace, where the run lies, several at a time. RunError where a digest differs there."""

        def bring(name: str) -> None:
            copy_file(_LOCAL, str(folder / name), self.filesystem, f"{self.path}/{name}")
            if self.digest(name) != stamp(folder / name)["sha256"]:
                raise RunError(f"{name} arrived in {self.name} with another sha256 than it was sent with: repeat the command")

        if folder != self.folder:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(bring, names))

    def discard(self, *names: str) -> None:
        """Delete files of the run."""
        for name in names:
            self.filesystem.delete_file(f"{self.path}/{name}")

    def remove(self, below: str) -> None:
        """Delete a folder of the run."""
        self.filesystem.delete_dir(f"{self.path}/{below}")


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.rglob("*"):
        with suppress(OSError):  # a temporary file that another process has renamed, a link to nowhere
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                yield str(path.relative_to(folder)), found.st_size


def copy_file(from_: Any, source: str, to: Any, target: str) -> None:
    """Copy a file between pyarrow filesystems. Raises OSError."""
    if isinstance(to, pfs.LocalFileSystem):
        Path(target).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with from_.open_input_stream(source) as read, to.open_output_stream(target) as out:
        while chunk := read.read(CHUNK):
            out.write(chunk)


def digest(filesystem: Any, path: str) -> str:
    """sha256 hex of a file, read back from a pyarrow filesystem. Raises OSError."""
    whole = hashlib.sha256()
    with filesystem.open_input_stream(path) as file:
        while chunk := file.read(CHUNK):
            whole.update(chunk)
    return whole.hexdigest()
