"""CPUs that a process may use: those of its affinity, as far as the quotas of its control groups go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cpus(root: Path = Path("/")) -> int:
    """At least 1. Of a quota of 2.5 CPUs 2: with one thread more, all would wait at the end of each period.

    root: where /proc and /sys are.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in control_groups(root) if (quota := _quota(folder)) is not None]
    return max(1, min([num_cpus, *map(int, quotas)]))


def control_groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that limit this process's CPUs: its own and those above, of version 2 and of 1.

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
        controller = "" if kind == "cgroup2" else "cpu"
        is_ours = kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(","))
        if not is_ours or controller not in names:
            continue
        group = PurePosixPath(names[controller])
        below = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        for folder in (below, *below.parents):
            yield root / place.lstrip("/") / folder


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _quota(folder: Path) -> float | None:
    """CPUs that a group may use; None: all."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
    elif (folder / "cpu.cfs_quota_us").exists():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None  # the root has none
    return int(quota) / int(period) if quota.isdigit() else None  # max, or -1
