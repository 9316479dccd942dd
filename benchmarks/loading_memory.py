"""How much memory a process, and its control group, held at most while they were watched. Linux only."""

from __future__ import annotations

import os
import threading
from pathlib import Path

POLL_SECONDS = 0.005
# Version -> the files of a group with the bytes that it uses now, and with the most that it has used.
FILES = {2: ("memory.current", "memory.peak"), 1: ("memory.usage_in_bytes", "memory.max_usage_in_bytes")}


class MemoryWatch:
    """Watches from its start to `stop`. Pages of files that are cached for it count for a group: have them cached
    before. The process gets a group of its own where that is allowed, or others in the group count too."""

    def __init__(self) -> None:
        version, outer = find_group()
        own = enter_group(version, outer) if outer is not None else None
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.before = status_bytes("VmRSS")
        self.group = GroupPeak(version, own or outer)
        self._outer, self._own = outer, own

    @property
    def how(self) -> str:
        """What the group's number is."""
        return f"{self.group.how}, {'own' if self._own else 'shared'}" if self.group.how else "none"

    def stop(self) -> dict[str, int]:
        """Bytes: how much more was resident at most than before, and how much more the group used."""
        found = {"rss": status_bytes("VmHWM") - self.before}
        if self.group.how:
            found["group"] = self.group.stop()
        if self._own is not None and self._outer is not None:
            (self._outer / "cgroup.procs").write_text(str(os.getpid()))
            self._own.rmdir()
        return found


class GroupPeak:
    """The most that a control group uses: by the kernel's own count where that can be started anew, else by asking
    often. `how` says which; empty: there is no group whose memory can be read."""

    def __init__(self, version: int, folder: Path | None) -> None:
        self.how = ""
        if folder is None:
            return
        self._current, self._peak = (folder / name for name in FILES[version])
        self.before = self.polled = int(self._current.read_text())
        self._descriptor = start_anew(self._peak, version)
        self.how = "polling" if self._descriptor is None else "the kernel"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self.polled = max(self.polled, int(self._current.read_text()))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        if self._descriptor is None:
            return self.polled - self.before
        peak = int(os.pread(self._descriptor, 100, 0))
        os.close(self._descriptor)
        return peak - self.before


def start_anew(peak: Path, version: int) -> int | None:
    """Let the kernel's count of a group's peak begin at what it uses now; a descriptor to read it from, because version
    2 counts for each that was written to. None where this may not be done."""
    try:
        descriptor = os.open(peak, os.O_RDWR)
    except OSError:
        return None
    try:
        os.write(descriptor, b"reset" if version == 2 else b"0")
    except OSError:  # a kernel that only reads it, before Linux 6.12
        os.close(descriptor)
        return None
    return descriptor


def enter_group(version: int, outer: Path) -> Path | None:
    """A group of this process alone, whose memory counts from now on; None where that is not allowed."""
    own = outer / f"load-{os.getpid()}"
    try:
        own.mkdir()
    except OSError:
        return None
    try:
        (own / FILES[version][0]).read_text()
        (own / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        own.rmdir()
        return None
    return own


def find_group() -> tuple[int, Path | None]:
    """The version of control groups that counts this process's memory, and the folder of its group; None where there is
    none to read."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version, folders = 2, [Path(f"/sys/fs/cgroup{path}"), Path("/sys/fs/cgroup")]
        elif "memory" in controllers.split(","):
            version, folders = 1, [Path(f"/sys/fs/cgroup/memory{path}"), Path("/sys/fs/cgroup/memory")]
        else:
            continue
        for folder in folders:
            if (folder / FILES[version][0]).exists():
                return version, folder
    return 0, None


def status_bytes(name: str) -> int:
    """A number of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
