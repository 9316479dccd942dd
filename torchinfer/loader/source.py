"""What the loader asks of storage: list, size, and the bytes of a range into memory that the caller owns.

A source's files are pinned: `stat` gives a version, and a reader opened with it never gives bytes of another version.
What may pass when it is tried again is a `TransientError`; `retry.py` does that. Everything else is a CheckpointError.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torchinfer.errors import CheckpointError

MAX_GAP_BYTES = 4 << 20  # where a source says nothing else
ALIGNMENT = 4096  # bytes; of the offset, the length and the memory of a direct read


class TransientError(Exception):
    """A read failed in a way that may pass: the message says what failed, without advice."""


class DirectUnsupportedError(Exception):
    """Reads around the page cache are not possible here; buffered ones are."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file of a source at one moment. `version` differs when the content was replaced."""

    size: int
    version: str
    crc32c: int | None = None  # of the whole file, where the storage knows it


class Reader(abc.ABC):
    """One open file. For one thread, and for reading forward: storage keeps its stream and read-ahead per handle."""

    skipped_bytes: int = 0  # that the storage gave between reads

    @abc.abstractmethod
    def read_some(self, offset: int, buffer: memoryview) -> int:
        """Read bytes from `offset` into the writable `buffer`; returns how many, at least 1, or 0 at the file's end.

        Raises:
            TransientError: what failed may pass.
            CheckpointError: it will not pass, or the file is another one than was pinned.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """See that the file is still the one that was pinned.

        Raises:
            CheckpointError: it was replaced or changed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give the handle back; never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Source(abc.ABC):
    """The files directly in one folder, or under one prefix, and in its subfolders by relative name."""

    address: str  # for messages
    is_network: bool  # a read costs a round trip, and more readers give more
    kind: str  # of storage, for people: "ext4", "fuse.gcsfuse", "gs"
    max_gap_bytes: int = MAX_GAP_BYTES  # that a handle skips between two reads; beyond, another one reads on

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Names of the files directly in it, sorted."""

    @abc.abstractmethod
    def stat(self, name: str) -> FileStat:
        """Size and version of a file.

        Raises:
            CheckpointError: there is no such file, or it is not a regular one, or the name leaves the folder.
        """

    @abc.abstractmethod
    def open(self, name: str, stat: FileStat, *, end: int | None = None, direct: bool = False) -> Reader:
        """A reader of the pinned file. `end`: where the last read will end, so that one request can serve them all.
        `direct`: around the page cache; then reads are aligned to ALIGNMENT, but for the file's end.

        Raises:
            TransientError, CheckpointError: as for reads.
            DirectUnsupportedError: here or in a read, where `direct` is not possible.
        """

    def is_cached(self, name: str, offset: int, num_bytes: int) -> bool:
        """Whether these bytes are in memory already, most of them, as far as the storage can say."""
        return False

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.stat(name)
        except CheckpointError:
            return False
        return True


def is_inside(name: str) -> bool:
    """Whether a relative file name stays in its folder. Lexical: a link in the folder may point elsewhere, as the
    links of a Hugging Face cache do."""
    return name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/"))


def check_inside(name: str) -> None:
    """Refuse a name that leaves its folder."""
    if not is_inside(name):
        raise CheckpointError(
            f"file name {name!r} leaves the checkpoint's folder; names must be relative, without '.' and '..' parts"
        )


def changed(path: str) -> CheckpointError:
    """The error for a file that is not any more what it was when the load began."""
    return CheckpointError(
        f"{path} was replaced or changed while it was read; what was loaded would be a mixture: load again when the "
        "upload is complete, and write new versions to a new folder"
    )
