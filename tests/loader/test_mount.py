"""Mounts, as /proc/self/mountinfo lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchinfer.loader.mount import UNKNOWN, Mount, find_mount, mount_of, parse_mounts, read_ahead_kib

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,discard,errors=remount-ro
30 25 0:27 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw,size=24684084k,inode64
41 27 0:50 / /gke ro,nosuid,nodev,relatime master:2 - fuse my-bucket ro,user_id=0,group_id=0,allow_other
42 27 0:51 / /vm rw,nosuid,nodev,relatime shared:5 - fuse.gcsfuse my-bucket rw,user_id=1000,max_read=131072
43 27 0:39 / /rclone ro,nosuid,nodev,relatime - fuse.rclone :gcs:models ro,user_id=0,group_id=0
44 27 0:52 /models /nfs rw,relatime - nfs4 10.0.0.2:/share/models rw,vers=4.2,rsize=262144,nconnect=4
45 27 0:53 / /overlay rw,relatime - overlay overlay rw,lowerdir=/a\134:b,upperdir=/u
46 27 0:54 / /with\040space/a\011tab rw - fuse.sshfs me@host:/my\040models rw
47 45 0:55 / /overlay/inner rw,relatime - xfs /dev/sdb ro
"""


def mounted(point: str) -> Mount:
    return next(mount for mount in parse_mounts(TABLE) if mount.point == point)


@pytest.mark.parametrize(
    ("point", "device", "kind", "source", "is_network"),
    [
        ("/", "8:1", "ext4", "/dev/sda1", False),
        ("/dev/shm", "0:27", "tmpfs", "tmpfs", False),
        ("/gke", "0:50", "fuse", "my-bucket", True),
        ("/vm", "0:51", "fuse.gcsfuse", "my-bucket", True),
        ("/rclone", "0:39", "fuse.rclone", ":gcs:models", True),
        ("/nfs", "0:52", "nfs4", "10.0.0.2:/share/models", True),
        ("/overlay", "0:53", "overlay", "overlay", False),
        ("/with space/a\ttab", "0:54", "fuse.sshfs", "me@host:/my models", True),
    ],
)
def test_a_line_tells_device_kind_and_source(point: str, device: str, kind: str, source: str, is_network: bool) -> None:
    mount = mounted(point)
    assert (mount.device, mount.kind, mount.source, mount.is_network) == (device, kind, source, is_network)


def test_options_of_mount_and_filesystem_come_once() -> None:
    assert mounted("/").options == ("rw", "relatime", "discard", "errors=remount-ro")


def test_a_backslash_in_an_option_is_unescaped() -> None:
    assert "lowerdir=/a\\:b" in mounted("/overlay").options


@pytest.mark.parametrize(
    ("point", "name", "value"), [("/vm", "max_read", "131072"), ("/vm", "rsize", None), ("/vm", "rw", "")]
)
def test_an_option_has_a_value(point: str, name: str, value: str | None) -> None:
    assert mounted(point).option(name) == value


def test_a_source_may_be_empty() -> None:
    assert parse_mounts("36 35 0:60 / /x rw - tmpfs  rw,mode=755") == [
        Mount("0:60", "/x", "tmpfs", "", ("rw", "mode=755"))
    ]


@pytest.mark.parametrize(
    ("path", "device", "point"),
    [
        ("/home/me", "8:1", "/"),
        ("/vm/model", "0:51", "/vm"),
        ("/vmware", "8:1", "/"),
        ("/overlay/inner/model", "0:55", "/overlay/inner"),
        ("/overlay/model", "0:99", "/overlay"),  # a device that no mount has
        ("/overlay/inner/model", "0:53", "/overlay"),  # its device decides
    ],
)
def test_the_innermost_mount_above_a_path_is_found(path: str, device: str, point: str) -> None:
    assert find_mount(parse_mounts(TABLE), path, device).point == point


def test_of_mounts_at_one_point_the_latest_counts() -> None:
    latest = Mount("8:1", "/", "xfs", "/dev/sda1", ())
    assert find_mount([*parse_mounts(TABLE), latest], "/home", "8:1") == latest


def test_without_a_table_the_mount_is_unknown() -> None:
    assert find_mount([], "/home", "8:1") == UNKNOWN


def test_a_path_of_this_machine_has_a_mount() -> None:
    assert mount_of("/proc").kind == "proc"


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert mount_of(tmp_path / "link").kind == "proc"


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A /sys with a FUSE mount 0:50, and a disk 8:0 with a partition 8:1 linked as the kernel does."""
    (tmp_path / "class/bdi/0:50").mkdir(parents=True)
    (tmp_path / "class/bdi/0:50/read_ahead_kb").write_text("128\n")
    (tmp_path / "devices/sda/queue").mkdir(parents=True)
    (tmp_path / "devices/sda/queue/read_ahead_kb").write_text("4096\n")
    (tmp_path / "devices/sda/sda1").mkdir()
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / "dev/block/8:0").symlink_to("../../devices/sda")
    (tmp_path / "dev/block/8:1").symlink_to("../../devices/sda/sda1")
    return tmp_path


@pytest.mark.parametrize(("device", "size"), [("0:50", 128), ("8:0", 4096), ("8:1", 4096), ("0:27", None)])
def test_read_ahead_of_mounts_disks_and_partitions(system: Path, device: str, size: int | None) -> None:
    assert read_ahead_kib(device, system) == size
