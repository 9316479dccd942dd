"""Which filesystem holds a path, as Linux tells in /proc/self/mountinfo, and how far the kernel reads ahead on it.

Source: proc_pid_mountinfo(5), https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

NETWORK_KINDS = (
    "fuse", "nfs", "nfs4", "ceph", "lustre", "cifs", "smb3", "9p", "virtiofs", "gpfs", "beegfs", "glusterfs",
)  # fmt: skip
GCSFUSE_KINDS = ("fuse", "fuse.gcsfuse")  # the first as GKE's driver mounts it


@dataclass(frozen=True, slots=True)
class Mount:
    """One mounted filesystem, in the kernel's words; "unknown" where it does not say."""

    device: str  # "major:minor"
    point: str  # absolute path
    kind: str  # "ext4", "fuse.gcsfuse"; GKE's driver for Cloud Storage FUSE mounts as plain "fuse"
    source: str  # a device, a server's path, a bucket
    options: tuple[str, ...]  # of the mount, then of the filesystem

    @property
    def is_network(self) -> bool:
        """Whether a read costs a round trip."""
        return self.kind.split(".")[0] in NETWORK_KINDS

    def option(self, name: str) -> str | None:
        """The value of an option such as `rsize=1048576`."""
        return next((value for key, _, value in (text.partition("=") for text in self.options) if key == name), None)


UNKNOWN = Mount("0:0", "unknown", "unknown", "unknown", ())


def mount_of(path: str | Path) -> Mount:
    """The mount that holds an existing path, links followed; UNKNOWN where the system does not say."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return UNKNOWN
    device = os.stat(path).st_dev
    return find_mount(parse_mounts(table), os.path.realpath(path), f"{os.major(device)}:{os.minor(device)}")


def parse_mounts(table: str) -> list[Mount]:
    """The lines of a mountinfo table, in its order: oldest first."""
    return [_parse(line) for line in table.splitlines()]


def find_mount(mounts: list[Mount], path: str, device: str) -> Mount:
    """The innermost, latest mount above an absolute path. Its device decides where it can: a mount may be hidden by a
    later one. Btrfs and overlays give files a device that no mount has."""
    above = [mount for mount in reversed(mounts) if os.path.commonpath([mount.point, path]) == mount.point]
    same = [mount for mount in above if mount.device == device]
    return max(same or above, key=lambda mount: len(mount.point), default=UNKNOWN)


def read_ahead_kib(device: str, system: Path = Path("/sys")) -> int | None:
    """How far the kernel reads ahead in a file, in KiB; None where it does not say, as in tmpfs.

    Network and FUSE mounts have an entry in class/bdi; disks have a queue, and partitions that of their disk.
    """
    disk = system / "dev" / "block" / device
    for folder in (system / "class" / "bdi" / device, disk / "queue", disk / ".." / "queue"):
        try:
            return int((folder / "read_ahead_kb").read_text())
        except (OSError, ValueError):  # not this kind of device
            continue
    return None


def _parse(line: str) -> Mount:
    # 36 35 98:0 /root /mount\040point rw,noatime shared:1 - ext4 /dev/sda1 rw,errors=continue
    place, _, filesystem = line.partition(" - ")
    _, _, device, _, point, options, *_ = place.split(" ")
    kind, source, more = (*filesystem.split(" "), "")[:3]
    return Mount(device, _unescape(point), kind, _unescape(source), _options(options, more))


def _options(*texts: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_unescape(option) for text in texts for option in text.split(",") if option))


def _unescape(text: str) -> str:
    r"""Space, tab, newline and backslash stand in the table as \040 and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
