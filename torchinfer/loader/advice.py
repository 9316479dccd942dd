"""What the measurements of a storage mean: how far to trust them, what to change, and which loader settings to take.

Everything here is a function of `Facts`. Each piece of advice has a reason in them, which it states with its number.
Options of Cloud Storage FUSE are named as in its config file and in GKE's mountOptions.
Source: https://cloud.google.com/storage/docs/cloud-storage-fuse/config-file and
https://cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-perf
"""

from __future__ import annotations

from dataclasses import dataclass

from torchinfer.loader.mount import GCSFUSE_KINDS, Mount
from torchinfer.loader.speed import Speed, readers_text

MEMORY_KINDS = ("tmpfs", "ramfs")
CACHED_RATE = 1.0  # GB/s: what is slower is not memory
ENOUGH_READ_AHEAD_KIB = 1024
LARGE_REQUEST_BYTES = 1 << 20  # FUSE's and NFS's largest
STREAM_RATE = 0.2  # GB/s of one HTTP stream of Cloud Storage, from the same region
SLOW_FIRST_BYTE_SECONDS = 0.2  # Cloud Storage takes 0.045, from the same region
SHORT_SECONDS = 0.1
CLEAR_GAIN = 1.5
DIRECT_GAIN = 1.25  # for which to do without the page cache
SMALL_GAIN = 1.1
FAST_RATE = 2.0  # GB/s: about what a machine with few CPUs can take


@dataclass(frozen=True, slots=True)
class Facts:
    """Where files lie and how fast they can be read."""

    address: str
    kind: str  # "gs", or that of the mount
    is_network: bool
    mount: Mount | None  # None: gs://
    read_ahead_kib: int | None
    free_memory_bytes: int  # which the page cache may take
    speed: Speed

    def rate(self, num_readers: int, direct: bool) -> float | None:
        """In GB/s; None if it was not measured."""
        found = (one for one in self.speed.measurements if (one.num_readers, one.direct) == (num_readers, direct))
        return next((one.rate for one in found), None)

    def best(self, num_readers: int) -> float:
        """The better of buffered and direct, in GB/s."""
        return max(one.rate for one in self.speed.measurements if one.num_readers == num_readers)

    @property
    def counts(self) -> list[int]:
        """Of readers, ascending."""
        return sorted({one.num_readers for one in self.speed.measurements})

    @property
    def has_direct(self) -> bool:
        return any(one.direct for one in self.speed.measurements)

    @property
    def is_in_memory(self) -> bool:
        return self.kind in MEMORY_KINDS

    @property
    def is_gcsfuse(self) -> bool:
        return self.kind in GCSFUSE_KINDS

    @property
    def looks_cached(self) -> bool:
        """Whether buffered reads may have come from the page cache: reading the same bytes again is hardly faster."""
        first, again = self.rate(1, False), self.speed.again_rate
        if first is None or again is None or self.is_in_memory:
            return False
        return again >= CACHED_RATE and first >= 0.5 * again


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the loader, and why."""

    load_readers: int
    load_direct: bool | None  # None: the loader tries by itself
    reasons: tuple[str, ...]

    @property
    def flags(self) -> str:
        """On the command line."""
        direct = {True: " --load-direct", False: " --no-load-direct", None: ""}[self.load_direct]
        return f"--load-readers {self.load_readers}{direct}"


def notes(facts: Facts) -> list[str]:
    """How far the measurements can be trusted."""
    found = []
    if facts.is_in_memory:
        found.append(f"{facts.kind}: the files lie in memory, and take it from the model")
    if facts.looks_cached:
        found.append(
            f"buffered reads may be of the page cache: {facts.rate(1, False):.2f} GB/s with 1 reader, and "
            f"{facts.speed.again_rate:.2f} GB/s when the same bytes were read again"
        )
    shortest = min(one.seconds for one in facts.speed.measurements)
    if shortest < SHORT_SECONDS:
        found.append(f"a measurement had bytes for {shortest:.3f} s only: larger files give firmer figures")
    return found


def advise(facts: Facts) -> list[str]:
    """What to change about the storage, most important first; empty when all is well."""
    rules = (_read_ahead, _request_size, _slow_stream, _no_scaling, _slow, _first_byte, _no_room, _retries)
    return [text for rule in rules if (text := rule(facts))]


def choose_settings(facts: Facts) -> Settings:
    """The fewest readers that are about as fast as any, and direct reads where they are clearly faster."""
    is_direct = facts.looks_cached and facts.has_direct  # the others say nothing about the storage
    best = {count: facts.rate(count, True) if is_direct else facts.best(count) for count in facts.counts}
    rates = {count: rate for count, rate in best.items() if rate is not None}
    readers = next(count for count, rate in rates.items() if rate * SMALL_GAIN >= max(rates.values()))
    listed = ", ".join(f"{count}: {rate:.2f} GB/s" for count, rate in rates.items())
    direct, reason = _choose_direct(facts, readers)
    return Settings(
        readers, direct, (f"readers: the fewest within 10 % of the fastest ({listed})", f"direct: {reason}")
    )


def _choose_direct(facts: Facts, num_readers: int) -> tuple[bool | None, str]:
    buffered, direct = facts.rate(num_readers, False), facts.rate(num_readers, True)
    if facts.mount is None:
        return False, f"{facts.kind}:// has no page cache to go around"
    if facts.is_in_memory:
        return False, f"{facts.kind} has no page cache to go around"
    if buffered is None or direct is None:
        return False, "O_DIRECT is not supported here"
    if facts.looks_cached:
        return None, "the buffered figures may be of the page cache, so let the loader try by itself"
    figures = (
        f"{direct:.2f} GB/s around the page cache, {buffered:.2f} GB/s through it, with {readers_text(num_readers)}"
    )
    if direct > buffered * DIRECT_GAIN:
        return True, figures
    return False, f"{figures}; and the page cache serves the next load"


def _read_ahead(facts: Facts) -> str | None:
    pairs = [(facts.rate(count, True), facts.rate(count, False), count) for count in facts.counts]
    gains = [(direct / buffered, direct, buffered, count) for direct, buffered, count in pairs if direct and buffered]
    size = facts.read_ahead_kib
    if size is None or not gains or max(gains)[0] < CLEAR_GAIN:
        return None
    if size >= ENOUGH_READ_AHEAD_KIB and not _is_other_fuse(facts):
        return None
    gain, direct, buffered, count = max(gains)
    return (
        f"read-ahead is {size} KiB, and reads around the page cache are {gain:.1f} times as fast as those through it "
        f"({direct:.2f} and {buffered:.2f} GB/s with {readers_text(count)}): {_change_read_ahead(facts)}"
    )


def _change_read_ahead(facts: Facts) -> str:
    if facts.is_gcsfuse:
        return "mount with the option read_ahead_kb=1024 or more (GKE), --max-read-ahead-kb=1024 or more (gcsfuse)"
    # rclone 1.60 over a bucket: with 1024 KiB instead of 128 KiB, buffered reads had a tenth of their rate. The kernel
    # sends read-ahead as several requests at once, and rclone gives a stream up when they come out of order.
    if _is_other_fuse(facts) and facts.mount:
        return (
            f"load with --load-direct, or try another read-ahead in /sys/class/bdi/{facts.mount.device}/"
            "read_ahead_kb and measure again: more can help, and can harm where requests come out of order"
        )
    if facts.is_network and facts.mount:
        return f"as root, write 1024 or more to /sys/class/bdi/{facts.mount.device}/read_ahead_kb"
    return "as root, write 1024 or more to the disk's queue/read_ahead_kb (GKE: mount option read_ahead_kb=1024)"


def _is_other_fuse(facts: Facts) -> bool:
    return facts.kind.startswith("fuse.") and not facts.is_gcsfuse


def _request_size(facts: Facts) -> str | None:
    for name in ("max_read", "rsize"):  # of FUSE, of NFS; in bytes
        value = facts.mount.option(name) if facts.mount and facts.is_network else None
        if value and value.isdecimal() and 0 < int(value) < LARGE_REQUEST_BYTES:
            return (
                f"the mount option {name}={value} limits a request to {int(value) >> 10} KiB, and each costs a round "
                f"trip: mount with {name}={LARGE_REQUEST_BYTES}"
            )
    return None


def _slow_stream(facts: Facts) -> str | None:
    if not facts.is_gcsfuse or facts.best(1) >= STREAM_RATE / 2:
        return None
    return (
        f"one reader gets {facts.best(1):.2f} GB/s, and one stream of Cloud Storage gives about {STREAM_RATE} GB/s: "
        "mount with profile:aiml-serving, or with read:enable-buffered-read:true, which a file cache would switch off"
    )


def _no_scaling(facts: Facts) -> str | None:
    most = facts.counts[-1]
    one, many = facts.best(1), facts.best(most)
    if not facts.is_network or facts.looks_cached or many >= min(one * CLEAR_GAIN, FAST_RATE):
        return None
    return f"{most} readers get {many:.2f} GB/s together, hardly more than one alone ({one:.2f} GB/s): {_widen(facts)}"


def _widen(facts: Facts) -> str:
    if facts.kind == "fuse":
        return 'give the sidecar more: pod annotations gke-gcsfuse/cpu-limit: "0" and gke-gcsfuse/memory-limit: "0"'
    if facts.kind == "fuse.gcsfuse":
        return "see that gcsfuse has CPUs to spare, and mount with gcs-connection:client-protocol:grpc"
    if facts.kind in ("nfs", "nfs4") and facts.mount and facts.mount.option("nconnect") is None:
        return "mount with nconnect=8, for more than one connection"
    return "look for what limits CPU or bandwidth between this machine and the storage"


def _slow(facts: Facts) -> str | None:
    best = max(map(facts.best, facts.counts))
    if best >= STREAM_RATE:
        return None
    change = (
        "see that the storage is in the machine's region"
        if facts.is_network
        else "take a faster type of disk, such as a local SSD"
    )
    return (
        f"the storage gives {best:.3f} GB/s at most, less than one stream of Cloud Storage ({STREAM_RATE} GB/s); all "
        f"{_gigabytes(facts.speed.num_bytes)} take {facts.speed.num_bytes / best / 1e9:.0f} s: {change}"
    )


def _first_byte(facts: Facts) -> str | None:
    seconds = facts.speed.first_byte_seconds
    if not facts.is_network or seconds < SLOW_FIRST_BYTE_SECONDS:
        return None
    change = "see that the storage is in the machine's region"
    if facts.is_gcsfuse:
        change += ", and if files never change, mount with metadata-cache:ttl-secs:-1"
    return f"the first byte of a file takes {seconds:.2f} s (Cloud Storage, from the same region: 0.05 s): {change}"


def _no_room(facts: Facts) -> str | None:
    if not facts.is_gcsfuse or facts.speed.num_bytes <= facts.free_memory_bytes:
        return None
    return (
        f"the files have {_gigabytes(facts.speed.num_bytes)} and {_gigabytes(facts.free_memory_bytes)} of memory are "
        "free, so the page cache cannot keep them: if this machine loads them more than once, mount with a file cache "
        "on a local SSD: file-cache:max-size-mb:-1, file-cache:cache-file-for-range-read:true, "
        "file-cache:enable-parallel-downloads:true"
    )


def _retries(facts: Facts) -> str | None:
    if facts.speed.num_retries == 0:
        return None
    where = "the sidecar's log; it may lack memory: gke-gcsfuse/memory-limit" if facts.kind == "fuse" else "its log"
    return f"{facts.speed.num_retries} read(s) failed and were repeated: see what the storage says in {where}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
