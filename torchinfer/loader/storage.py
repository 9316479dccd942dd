"""Where a checkpoint's bytes come from: a folder, local or mounted. Knows nothing of what the files hold.

Files are read with `pread` into the caller's memory, each reader through a file handle of its own, and never mapped: a
disk error or a truncation under a map kills the process with SIGBUS, under `pread` it is an exception; and network
mounts keep their read-ahead per handle.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from torchinfer.errors import CheckpointError


class FileReader:
    """One open file of a source. Not for use by several threads: open one reader each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(_cannot("open", path, error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` (writable bytes) with the file's bytes from `offset`.

        Raises:
            CheckpointError: the file ends before the buffer is full, or the system cannot read it.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(_cannot(f"read byte {offset + done} of", self._path, error)) from error
            if count == 0:
                raise CheckpointError(
                    f"{self._path} ends at byte {offset + done}, but bytes [{offset}, {offset + len(buffer)}) are "
                    "needed; it was cut off or changed while it was read: copy or download it again"
                )
            done += count


class FolderSource:
    """The files of one folder.

    Raises:
        CheckpointError: the path is not a folder that can be listed.
    """

    def __init__(self, path: str | Path) -> None:
        if str(path).startswith("gs:/"):  # Path() makes one slash of two
            raise CheckpointError(
                f"{path} is an address in Cloud Storage; this version reads folders only: download it, or mount the "
                "bucket with gcsfuse and pass the folder"
            )
        self.path = Path(path)
        try:
            mode = self.path.stat().st_mode
        except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the path
            raise CheckpointError(
                f"{str(path)!r} does not exist; pass the folder that holds config.json and *.safetensors"
            ) from error
        except OSError as error:
            raise CheckpointError(_cannot("open", self.path, error)) from error
        if not stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a file; pass the folder that holds it")

    def names(self) -> list[str]:
        """Names of the regular files directly in the folder, sorted; links are followed."""
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except OSError as error:
            raise CheckpointError(_cannot("list", self.path, error)) from error

    def size(self, name: str) -> int:
        """Bytes of a file."""
        path = self._inside(name)
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(_cannot("open", path, error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; a checkpoint has regular files only")
        return status.st_size

    def open(self, name: str) -> FileReader:
        """A reader with a file handle of its own, to use in a `with` statement."""
        return FileReader(self._inside(name))

    def read(self, name: str, max_bytes: int) -> bytes:
        """A small file as a whole; refused when it is larger than `max_bytes`, before memory is taken."""
        size = self.size(name)
        if size > max_bytes:
            raise CheckpointError(f"{self.path / name} has {size} bytes; at most {max_bytes} are allowed")
        content = bytearray(size)
        with self.open(name) as reader:
            reader.read_into(0, memoryview(content))
        return bytes(content)

    def _inside(self, name: str) -> Path:
        if not is_inside(name):
            raise CheckpointError(
                f"file name {name!r} leaves the checkpoint's folder; names must be relative, without '.' and '..' parts"
            )
        return self.path / name


def is_inside(name: str) -> bool:
    """Whether a relative file name stays in its folder. Lexical: a link in the folder may point elsewhere, as the
    links of a Hugging Face cache do."""
    return name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/"))


def _cannot(verb: str, path: Path, error: OSError) -> str:
    return (
        f"cannot {verb} {path}: {error.strerror or error} (errno {error.errno}); check that it exists and is readable"
    )
