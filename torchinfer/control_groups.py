"""What control groups let this process use: its own group and those above, of version 2 and of version 1. Linux."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")  # where /proc and /sys are


def control_groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Folders of the groups that limit this process's `controller`, cpu or memory: its own, and those above.

    Without a namespace of its own a container has the host's names of its groups in /proc, and a mount that begins
    somewhere below the host's root. Source: man 7 cgroups, man 5 proc_pid_mountinfo.
    """
    names = {}  # of this process's groups by controller, "" of version 2
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        names.update(dict.fromkeys(controllers.split(","), name))
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        top, place = mount.split()[3:5]
        kind, _, options = system.split()[:3]
        own = "" if kind == "cgroup2" else controller
        is_ours = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        if not is_ours or own not in names:
            continue
        group = PurePosixPath(names[own])
        below = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        for folder in (below, *below.parents):
            yield root / place.lstrip("/") / folder


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that the groups still allow; None without a limit. Pages of files count as free: the kernel drops them
    before it refuses memory, and a checkpoint that was just read fills a pod with them.

    Source: the kernel's admin-guide/cgroup-v2 and cgroup-v1/memory.
    """
    found = [free for folder in control_groups("memory", root) if (free := _free_of(folder)) is not None]
    return max(0, min(found)) if found else None


def _free_of(folder: Path) -> int | None:
    if (folder / "memory.max").exists():
        limit, used, prefix = "memory.max", "memory.current", ""
    elif (folder / "memory.limit_in_bytes").exists():
        limit, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"  # with those below
    else:
        return None  # the root has none
    most = (folder / limit).read_text().strip()
    if not most.isdigit():
        return None  # max
    numbers = dict(line.split() for line in _lines(folder / "memory.stat"))
    files = sum(int(numbers.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(most) - int((folder / used).read_text()) + files


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
