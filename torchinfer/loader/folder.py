"""A folder as a source, local or mounted (gcsfuse, NFS).

Files are read with `pread` into the caller's memory, each reader through a file handle of its own, and never mapped: a
disk error or a truncation under a map kills the process with SIGBUS, under `pread` it is an exception; and network
mounts keep their stream and their read-ahead per handle.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat as stat_module
from collections.abc import Callable
from pathlib import Path

from torchinfer.errors import CheckpointError
from torchinfer.loader.mount import mount_of
from torchinfer.loader.retry import METADATA_POLICY, Attempts, Result
from torchinfer.loader.source import (
    DirectUnsupportedError,
    FileStat,
    Reader,
    Source,
    TransientError,
    changed,
    check_inside,
)

NFS_KINDS = ("nfs", "nfs4")  # network storage that keeps inode numbers
INODE = "inode "  # begin of a version that holds the number
CACHE_SAMPLES = 8  # of an extent, to see whether it is in the page cache
READ_BYTES = 8 << 20  # in one call: enough for the largest read-ahead, little enough to stop soon
TRANSIENT = {
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ECANCELED, errno.ESTALE, errno.ECONNRESET,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EREMOTEIO,
}  # fmt: skip
WANTED_FOLDER = "pass the folder that holds config.json and *.safetensors"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_ADVICE = "if it is a model of the Hugging Face Hub, download it before: hf download NAME --local-dir FOLDER"
DEAD_DAEMON = "the FUSE daemon of this mount died: mount it again (in Kubernetes: restart the pod)"
ADVICE = {
    errno.ENOTCONN: DEAD_DAEMON,
    errno.ECONNABORTED: DEAD_DAEMON,  # what a read under way gets
    errno.EACCES: "permission is missing: check the mode, or the bucket's roles/storage.objectViewer",
    errno.EPERM: "permission is missing: check the mode, or the bucket's roles/storage.objectViewer",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}


class FileReader(Reader):
    """One open file."""

    def __init__(self, path: Path, pinned: FileStat, *, direct: bool) -> None:
        self._path, self._pinned, self._is_direct = path, pinned, direct
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        try:
            self._descriptor = os.open(path, flags)
        except OSError as error:
            raise self._error("open", error) from error
        try:
            self.check()
        except (CheckpointError, TransientError):
            self.close()
            raise

    def read_some(self, offset: int, buffer: memoryview) -> int:
        try:
            return os.preadv(self._descriptor, [buffer[:READ_BYTES]], offset)
        except OSError as error:
            raise self._error(f"read byte {offset} of", error) from error

    def check(self) -> None:
        try:
            found = _file_stat(os.fstat(self._descriptor), has_inode=self._pinned.version.startswith(INODE))
        except OSError as error:
            raise self._error("look at", error) from error
        if found != self._pinned:
            raise changed(str(self._path))

    def close(self) -> None:
        _close(self._descriptor)

    def _error(self, verb: str, error: OSError) -> Exception:
        if self._is_direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return DirectUnsupportedError(str(error))
        if error.errno in TRANSIENT:
            return TransientError(f"{error.strerror} (errno {error.errno})")
        return _fatal(verb, self._path, error)


class FolderSource(Source):
    """The files of one folder.

    Raises:
        CheckpointError: the path is not a folder that can be listed.
    """

    def __init__(self, path: str | Path) -> None:
        if not str(path):
            raise CheckpointError(f"the path is empty; {WANTED_FOLDER}")
        self.path = Path(path)
        self.address = str(path)
        try:
            status = _patiently("open", self.path, self.path.stat)
        except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the path
            hint = f"; {HUB_ADVICE}" if HUB_NAME.fullmatch(str(path)) else ""
            raise CheckpointError(f"{str(path)!r} does not exist; {WANTED_FOLDER}{hint}") from error
        except OSError as error:
            raise _fatal("open", self.path, error) from error
        if not stat_module.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path} is a file; pass the folder that holds it: {self.path.parent}")
        self.mount = mount_of(self.path)
        self.kind, self.is_network = self.mount.kind, self.mount.is_network
        # Of the device whose files keep their inode numbers; files behind links may be on another one.
        self._inode_device = status.st_dev if not self.is_network or self.kind in NFS_KINDS else None

    def names(self) -> list[str]:
        def scan() -> list[str]:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())

        try:
            return _patiently("list", self.path, scan)
        except OSError as error:
            raise _fatal("list", self.path, error) from error

    def stat(self, name: str) -> FileStat:
        check_inside(name)
        path = self.path / name
        try:
            status = _patiently("open", path, path.stat)
        except OSError as error:
            raise _fatal("open", path, error) from error
        if not stat_module.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; a checkpoint has regular files only")
        return _file_stat(status, has_inode=status.st_dev == self._inode_device)

    def open(self, name: str, stat: FileStat, *, end: int | None = None, direct: bool = False) -> FileReader:
        check_inside(name)
        return FileReader(self.path / name, stat, direct=direct)

    def is_cached(self, name: str, offset: int, num_bytes: int) -> bool:
        """By reads of single bytes that the kernel refuses when they would have to wait (preadv2(2), RWF_NOWAIT)."""
        if self.is_network or not hasattr(os, "RWF_NOWAIT"):  # FUSE and NFS cannot tell
            return False
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # the read itself will say why
            return False
        places = range(offset, offset + num_bytes, max(1, num_bytes // CACHE_SAMPLES))
        try:
            cached = [_is_ready(descriptor, place) for place in places]
        finally:
            _close(descriptor)
        return sum(cached) > len(cached) / 2

    def forget(self, name: str, offset: int, num_bytes: int) -> None:
        """Drop clean pages from the page cache; the kernel may keep some, such as those that a process has mapped.

        Raises:
            CheckpointError: the file cannot be opened.
        """
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _fatal("open", path, error) from error
        try:
            os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)
        finally:
            _close(descriptor)


def _patiently(verb: str, path: Path, call: Callable[[], Result]) -> Result:
    """What a call of the system returns; errors that may pass are tried again, others are raised as they are."""

    def attempt() -> Result:
        try:
            return call()
        except OSError as error:
            if error.errno in TRANSIENT:
                raise TransientError(f"{error.strerror} (errno {error.errno})") from error
            raise

    return Attempts(METADATA_POLICY).call(f"{verb} {path}", attempt)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a FUSE daemon that is dead says so here again; the descriptor is closed
        os.close(descriptor)


def _is_ready(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # EAGAIN: not in memory; EOPNOTSUPP: the filesystem cannot tell
        return False


def _file_stat(status: os.stat_result, *, has_inode: bool) -> FileStat:
    """Another inode is another file, also where size and time were kept (`mv`, `rsync -t`); but not on FUSE, where a
    daemon may give the same file another number when it is looked up again, as gcsfuse and rclone do. The time of the
    last change of the inode is left out everywhere: a chown changes it (Kubernetes' fsGroup, by each pod that mounts
    the volume), and on gcsfuse it is the time of modification."""
    version = f"modified {status.st_mtime_ns}"
    return FileStat(status.st_size, f"{INODE}{status.st_ino}, {version}" if has_inode else version)


def _fatal(verb: str, path: Path, error: OSError) -> CheckpointError:
    advice = ADVICE.get(error.errno or 0, "check that it exists and is readable")
    return CheckpointError(f"cannot {verb} {path}: {error.strerror or error} (errno {error.errno}); {advice}")
