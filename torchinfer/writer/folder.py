"""The folder that a checkpoint grows in: OUT.partial, which becomes OUT when all of it is there.

A file has its name only when all of its bytes are on the disk, so that one with its name is whole, whatever happened:
the next run goes on behind it. A state file says what the run was asked for; the folder is locked while it goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.writer.layout import FilePlan

PARTIAL = ".partial"
STATE = "quantize.state.json"
CALIBRATION = "quantize.calibration"  # what was measured
SPARE_BYTES = 16 << 20  # of small files, and what a filesystem needs for itself
ADVICE = {
    errno.ENOSPC: "the disk is full: free some of it and run the same command again",
    errno.EDQUOT: "the quota is used up: free some of it and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name a folder on a filesystem without it",
}


def partial_path(output: Path) -> Path:
    """Where OUT grows."""
    return output.with_name(output.name + PARTIAL)


class ShardFile:
    """A file on its way: under another name until `finish`. Give it up with `discard`."""

    def __init__(self, folder: Path, plan: FilePlan) -> None:
        self.plan = plan
        self._path, self._partial = folder / plan.name, folder / f"{plan.name}{PARTIAL}"
        with _explained(self._partial):
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor = os.open(self._partial, flags, 0o666)
        try:
            self._write_at(0, memoryview(plan.header))
            for slot in (slot for slots in plan.slots.values() for slot in slots):
                if slot.stored.constant is not None:
                    self.write(slot.offset, slot.stored.constant)
        except BaseException:
            self.discard()
            raise

    def write(self, offset: int, numbers: Tensor) -> None:
        """Bring numbers to their place in the file.

        Raises:
            CheckpointError: they cannot be written, such as to a full disk.
        """
        self._write_at(offset, numbers.contiguous().view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Give the file its name; nothing writes to it any more."""
        with _explained(self._partial):
            os.ftruncate(self._descriptor, self.plan.num_bytes)
            os.fsync(self._descriptor)
            self._close()
            os.rename(self._partial, self._path)
            _sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove what was written: half a file is of no use."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write_at(self, offset: int, content: memoryview) -> None:
        with _explained(self._partial):
            while content:
                count = os.pwrite(self._descriptor, content, offset)
                content, offset = content[count:], offset + count


@dataclass(slots=True)
class PartialFolder:
    """OUT.partial. Nothing is created before `with`; afterwards it stays, unless `finish` has made it OUT.

    Raises:
        ConfigError: OUT exists, or the folder is of a run with another `state`: of other options, or another source.
    """

    output: Path
    state: Mapping[str, Any]
    is_resumed: bool = field(init=False)
    _lock: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        if os.path.lexists(self.output):
            raise ConfigError(f"{self.output} exists; name a folder that does not, or remove it")
        if not self.output.absolute().parent.is_dir():
            raise ConfigError(f"the folder of {self.output} does not exist; create it")
        found = self._found()
        self.is_resumed = found is not None
        if found is None:
            return
        wrong = [name for name, value in self.state.items() if found.get(name) != value]
        if wrong:
            pairs = ((name, _short(found.get(name)), _short(self.state[name])) for name in wrong)
            differences = "; ".join(f"{name} was {before}, now it is {now}" for name, before, now in pairs)
            raise ConfigError(
                f"{self.path} was begun otherwise: {differences}; what is in it does not fit: go on as it was begun, "
                "or remove it"
            )

    @property
    def path(self) -> Path:
        return partial_path(self.output)

    def has(self, file: FilePlan) -> bool:
        """Whether an earlier run has completed this file."""
        path = self.path / file.name
        return self.is_resumed and path.is_file() and path.stat().st_size == file.num_bytes

    def check_space(self, files: Iterable[FilePlan]) -> None:
        """See that there is room for these files.

        Raises:
            ConfigError: with what is needed and what is free.
        """
        needed = sum(file.num_bytes for file in files) + SPARE_BYTES
        free = shutil.disk_usage(self.output.absolute().parent).free
        if needed > free:
            raise ConfigError(
                f"{self.output} needs {needed} bytes, and {free} are free there: free {needed - free} more, or name a "
                "folder on another disk"
            )

    def __enter__(self) -> Self:
        with _explained(self.path):
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(f"another process writes to {self.path}; wait for it, or stop it") from error
        except OSError as error:
            os.close(self._lock)
            raise CheckpointError(
                f"cannot lock {self.path}: {error.strerror} (errno {error.errno}); name a folder on another filesystem"
            ) from error
        if not self.is_resumed:
            self.write_file(STATE, json.dumps(self.state).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def write_file(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""
        path, partial = self.path / name, self.path / f"{name}{PARTIAL}"
        with _explained(path):
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, path)

    def read_file(self, name: str) -> bytes | None:
        """What `write_file` has written, in this run or the one before."""
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def finish(self) -> None:
        """Let the folder become OUT.

        Raises:
            CheckpointError: something of that name has come into being meanwhile.
        """
        with _explained(self.output):
            _sync_folder(self.path)
            if os.path.lexists(self.output):
                raise CheckpointError(f"{self.output} was created by someone else; rename {self.path} yourself")
            (self.path / CALIBRATION).unlink(missing_ok=True)
            os.rename(self.path, self.output)
            (self.output / STATE).unlink()  # last: without it, what is in the folder would not be known to be whole
            _sync_folder(self.output.absolute().parent)

    def _found(self) -> dict[str, Any] | None:
        """The state of the run that created the folder; None if there was none, or it had not begun to write."""
        try:
            found = json.loads((self.path / STATE).read_bytes())
            if not isinstance(found, dict):
                raise ValueError(f"it has {_short(found)}, not an object")
            return found
        except (FileNotFoundError, NotADirectoryError):
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
            if names - {f"{STATE}{PARTIAL}"} or (self.path.exists() and not self.path.is_dir()):
                raise ConfigError(f"{self.path} is no folder of a run that was stopped; remove it") from None
            return None
        except ValueError as error:
            raise ConfigError(f"{self.path / STATE} is damaged: {error}; remove {self.path}") from error
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.path / STATE}: {error.strerror} (errno {error.errno}); make it readable, or remove "
                f"{self.path}"
            ) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "check that its folder is there and can be written to")
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error} (errno {error.errno}); {advice}"
        ) from error


def _sync_folder(path: Path) -> None:
    """Until names that changed are on the disk too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
