"""Threads of the CPU library: how many, where they run, and what happens when the system has no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.cpus import usable_cpus

needs_library = pytest.mark.skipif(library.open_library() is None, reason="the CPU library is not built")
HEAD = """
import os, threading, time
from pathlib import Path
import torch
from torchinfer import kernels
from torchinfer.kernels.cpu import library

def compute():
    x = torch.ones(4096, 64)
    assert torch.allclose(kernels.rms_norm(x, torch.ones(64), 1e-6), x)

def tasks():
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}

first = threading.Thread(target=int)  # with which a sanitizer starts one of its own
first.start()
first.join()
OTHERS = tasks() - {os.getpid()}

def affinities():
    return sorted(sorted(os.sched_getaffinity(task)) for task in tasks() - OTHERS)
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", HEAD + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder, of a machine with 8 CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V2 = "31 23 0:28 {top} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"": ("max 100000", "0::/\n")}, 8),
        ({"": ("300000 100000", "0::/\n")}, 3),
        ({"a.slice": ("max 100000", ""), "a.slice/b.service": ("150000 50000", "0::/a.slice/b.service\n")}, 3),
        ({"a.slice": ("200000 100000", ""), "a.slice/b.service": ("700000 100000", "0::/a.slice/b.service\n")}, 2),
        ({"b.service": ("40000 100000", "0::/b.service\n")}, 1),
        ({"b.service": ("2500000 100000", "0::/b.service\n")}, 8),
    ],
    ids=[
        "none",
        "a namespace of its own",
        "of a service",
        "of the slice above",
        "less than one",
        "more than there are",
    ],
)
def test_quotas_of_version_2(machine, files, expected):
    put(machine, {"proc/self/mountinfo": V2.format(top="/")})
    for folder, (quota, groups) in files.items():
        put(machine, {f"sys/fs/cgroup/{folder}/cpu.max": quota + "\n"})
        if groups:
            put(machine, {"proc/self/cgroup": groups})
    assert usable_cpus(machine) == expected


def test_a_container_without_a_namespace_has_the_host_s_name_of_its_group(machine):
    groups, mount = "0::/kubepods/pod7/c1\n", V2.format(top="/kubepods/pod7/c1")
    put(machine, {"proc/self/cgroup": groups, "proc/self/mountinfo": mount, "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    assert usable_cpus(machine) == 4


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("500000", 5)])
def test_quotas_of_version_1(machine, quota, expected):
    groups = "4:memory:/docker/c1\n3:cpu,cpuacct:/docker/c1\n0::/\n"
    folder = "sys/fs/cgroup/cpu,cpuacct/docker/c1"
    put(machine, {"proc/self/cgroup": groups, "proc/self/mountinfo": V1.format(top="/")})
    put(machine, {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"})
    assert usable_cpus(machine) == expected


def test_without_control_groups_the_affinity_counts(machine):
    assert usable_cpus(machine) == 8


@needs_library
def test_the_library_starts_as_many_threads_as_there_are_usable_cpus():
    assert library.loaded().torchinfer_cpu_num_threads() == usable_cpus()


@needs_library
def test_threads_are_pinned_when_asked_and_the_caller_is_not():
    code = """
library.configure(3)
compute()
cpus = sorted(os.sched_getaffinity(0))
expected = sorted([cpus, [cpus[1 % len(cpus)]], [cpus[2 % len(cpus)]]])
end = time.monotonic() + 10
while affinities() != expected and time.monotonic() < end:
    time.sleep(0.01)
assert affinities() == expected, affinities()"""
    result = run(code, TORCHINFER_CPU_PINNED="1")
    assert result.returncode == 0, result.stderr


@needs_library
def test_threads_are_not_pinned_when_nobody_asks():
    code = """
library.configure(3)
compute()
assert affinities() == [sorted(os.sched_getaffinity(0))] * 3, affinities()"""
    for value in ("", "0"):
        result = run(code, TORCHINFER_CPU_PINNED=value)
        assert result.returncode == 0, result.stderr


@needs_library
def test_another_value_of_the_variable_is_refused():
    result = run("compute()", TORCHINFER_CPU_PINNED="yes")
    assert result.returncode == 1
    assert "ConfigError: TORCHINFER_CPU_PINNED='yes' is neither 0 nor 1" in result.stderr


@needs_library
def test_a_forked_process_has_as_many_threads_as_its_parent_was_given():
    code = """
library.configure(3)
child = os.fork()
compute()
assert library.loaded().torchinfer_cpu_num_threads() == 3
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@needs_library
def test_where_the_system_has_no_more_threads_fewer_compute_and_one_line_says_so():
    # The stacks of threads find no room: RLIMIT_NPROC would not bind root.
    code = """
import logging, resource
logging.basicConfig(level="WARNING")
compute()
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
library.configure(100)
assert 1 <= library.loaded().torchinfer_cpu_num_threads() < 50
compute()"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("of 100 threads start: raise its limit of threads") == 1


@needs_library
def test_of_threads_that_come_first_at_once_one_opens_the_library():
    code = """
import ctypes
opened, whole = [], ctypes.CDLL
def slow(path):
    opened.append(path)
    time.sleep(0.2)
    return whole(path)
ctypes.CDLL = slow
threads = [threading.Thread(target=compute) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert opened == [str(library.PATH)], opened"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@needs_library
def test_several_threads_may_configure_at_once():
    code = """
library.loaded()
def configure():
    for number in range(100):
        library.configure(1 + number % 4)
threads = [threading.Thread(target=configure) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
library.configure(2)
compute()
assert len(affinities()) == 2"""
    result = run(code)
    assert result.returncode == 0, (result.returncode, result.stderr)


@needs_library
def test_more_threads_than_the_library_takes_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        library.configure(1025)
