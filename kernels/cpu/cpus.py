"""CPUs that a process may use: those of its affinity, as far as the quotas of its control groups go."""

from __future__ import annotations

import os
from pathlib import Path

from torchinfer.control_groups import ROOT, control_groups


def usable_cpus(root: Path = ROOT) -> int:
    """At least 1. Of a quota of 2.5 CPUs 2: with one thread more, all would wait at the end of each period.

    root: where /proc and /sys are.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in control_groups("cpu", root) if (quota := _quota(folder)) is not None]
    return max(1, min([num_cpus, *map(int, quotas)]))


def _quota(folder: Path) -> float | None:
    """CPUs that a group may use; None: all."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
    elif (folder / "cpu.cfs_quota_us").exists():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None  # the root has none
    return int(quota) / int(period) if quota.isdigit() else None  # max, or -1
