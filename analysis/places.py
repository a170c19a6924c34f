"""Where the files of a run lie: in a folder, or below an address that pyarrow.fs opens (s3://, gs://). They are written in a folder either way.

In the place of a folder that folder is the run's own and nothing is copied; below an address it is scratch, and every file is read back and
its digest compared where it arrived. An object store shows an object whole or not at all, which is what renaming does in a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pfs

from .files import scratch, stamp
from .store import RunError

CHUNK = 2**20
_LOCAL = pfs.LocalFileSystem()


@dataclass(frozen=True)
class Place:
    """A run's place: ``address`` as it was given, ``path`` in ``filesystem``, pyarrow's. Files go by their path below it."""

    address: str
    filesystem: Any
    path: str

    @classmethod
    def of(cls, where: str | Path) -> Place:
        """The place at a folder or a URI. Raises RunError."""
        address = str(where)
        try:
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
        found = self.filesystem.get_file_info(pfs.FileSelector(self.path, allow_not_found=True, recursive=True))
        return {f.path[len(self.path) + 1 :]: f.size for f in found if f.is_file}

    def holds(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").is_file)

    def fetch(self, name: str, folder: Path) -> Path:
        """The file in ``folder``, a workspace; copied there where it does not lie there yet."""
        if not (folder / name).exists():
            copy_file(self.filesystem, f"{self.path}/{name}", _LOCAL, str(folder / name))
        return folder / name

    def store(self, folder: Path, *names: str) -> None:
        """Bring files of ``folder``, a workspace, where the run lies, one after the other. RunError where a digest differs there."""
        if folder == self.folder:
            return
        for name in names:
            copy_file(_LOCAL, str(folder / name), self.filesystem, f"{self.path}/{name}")
            if digest(self.filesystem, f"{self.path}/{name}") != stamp(folder / name)["sha256"]:
                raise RunError(f"{name} arrived in {self.name} with another sha256 than it was sent with: repeat the command")

    def remove(self, below: str) -> None:
        """Delete a folder of the run."""
        self.filesystem.delete_dir(f"{self.path}/{below}")


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
