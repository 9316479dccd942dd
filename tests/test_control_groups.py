"""Memory that control groups leave: pages of files are free, groups above count, version 1 has other names."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchinfer import device
from torchinfer.control_groups import free_memory

V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "34 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
STAT = "anon 100\nfile 400\nactive_file 250\ninactive_file 150\ntotal_active_file 300\ntotal_inactive_file 200\n"


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(folder: str, limit: str, used: int, stat: str = STAT) -> dict[str, str]:
    texts = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"sys/fs/cgroup/{folder}/{name}": text for name, text in texts.items()}


def process(groups: str, mounts: str) -> dict[str, str]:
    return {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}


def test_pages_of_files_count_as_free(tmp_path: Path) -> None:
    root = put(tmp_path, process("0::/\n", V2) | version_2("", "1000", 950))
    assert free_memory(root) == 1000 - 950 + 400


def test_the_group_that_leaves_least_counts(tmp_path: Path) -> None:
    files = (
        process("0::/a.slice/b\n", V2) | version_2("a.slice", "5000", 4900, "") | version_2("a.slice/b", "1000", 100)
    )
    assert free_memory(put(tmp_path, files)) == 100


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert free_memory(put(tmp_path, process("0::/\n", V2) | version_2("", "1000", 1500))) == 0


@pytest.mark.parametrize("files", [{}, process("0::/\n", V2) | version_2("", "max", 7)], ids=["no groups", "no limit"])
def test_without_a_limit_there_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    assert free_memory(put(tmp_path, files)) is None


def test_version_1(tmp_path: Path) -> None:
    texts = {"memory.limit_in_bytes": "3000", "memory.usage_in_bytes": "2900", "memory.stat": STAT}
    folder = "sys/fs/cgroup/memory/docker/c1"
    files = {f"{folder}/{name}": text for name, text in texts.items()}
    root = put(tmp_path, process("4:memory:/docker/c1\n3:cpu:/docker/c1\n0::/\n", V1) | files)
    assert free_memory(root) == 3000 - 2900 + 500


def test_free_memory_of_the_host_is_at_most_what_the_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_memory", lambda: 12345)
    assert device.free_memory_bytes(device.torch.device("cpu")) == 12345
    monkeypatch.setattr(device, "free_memory", lambda: None)
    assert device.free_memory_bytes(device.torch.device("cpu")) > 1 << 20
