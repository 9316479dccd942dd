"""Rules from facts to advice: each speaks when it has a reason, and is silent otherwise."""

from __future__ import annotations

import pytest

from torchinfer.loader.advice import Facts, Settings, advise, choose_settings, notes
from torchinfer.loader.mount import Mount
from torchinfer.loader.speed import Measurement, Speed

GOOD = {1: (0.3, 0.3), 4: (1.0, 1.0), 16: (2.4, 2.4)}  # GB/s by readers: buffered and direct


def facts_of(
    kind: str = "fuse",
    rates: dict[int, tuple[float, float | None]] = GOOD,
    *,
    options: tuple[str, ...] = (),
    read_ahead_kib: int | None = 1024,
    first_byte: float = 0.05,
    again: float | None = 8.0,
    num_bytes: int = 10 * 10**9,
    num_retries: int = 0,
    seconds: float = 3.0,
) -> Facts:
    """All is well with a Cloud Storage FUSE mount in GKE, but for what is given."""
    measurements = [
        Measurement(count, direct, round(rate * 1e9 * seconds), seconds)
        for count, pair in rates.items()
        for direct, rate in zip((False, True), pair, strict=True)
        if rate is not None
    ]
    mount = None if kind == "gs" else Mount("0:50", "/mnt", kind, "bucket", options)
    return Facts(
        address="/mnt/model",
        kind=kind,
        is_network=mount is None or mount.is_network,
        mount=mount,
        read_ahead_kib=read_ahead_kib,
        free_memory_bytes=10**11,
        speed=Speed(3, num_bytes, first_byte, tuple(measurements), again, num_retries),
    )


def buffered_only(kind: str, *rates: float) -> Facts:
    return facts_of(kind, {count: (rate, None) for count, rate in zip((1, 4, 16), rates, strict=True)}, again=None)


@pytest.mark.parametrize("kind", ["fuse", "fuse.gcsfuse", "fuse.rclone", "nfs4", "ext4"])
def test_nothing_is_to_be_changed_where_all_is_well(kind: str) -> None:
    assert advise(facts_of(kind)) == []


def test_nothing_is_to_be_changed_about_a_good_bucket() -> None:
    assert advise(buffered_only("gs", 0.2, 0.7, 1.5)) == []


def test_nothing_is_to_be_changed_about_files_in_memory() -> None:
    assert advise(facts_of("tmpfs", {1: (6.0, 6.0), 16: (9.0, 9.0)}, read_ahead_kib=None)) == []


LITTLE_READ_AHEAD = {1: (0.15, 0.3), 4: (0.2, 1.0), 16: (0.8, 2.4)}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("fuse", "read_ahead_kb=1024 or more (GKE)"),
        ("fuse.gcsfuse", "--max-read-ahead-kb=1024 or more (gcsfuse)"),
        ("fuse.rclone", "load with --load-direct, or try another read-ahead in /sys/class/bdi/0:50/read_ahead_kb"),
        ("nfs4", "write 1024 or more to /sys/class/bdi/0:50/read_ahead_kb"),
        ("ext4", "to the disk's queue/read_ahead_kb"),
    ],
)
def test_little_read_ahead_with_faster_direct_reads_is_to_be_raised(kind: str, change: str) -> None:
    [advice] = advise(facts_of(kind, LITTLE_READ_AHEAD, read_ahead_kib=128))
    assert advice.startswith("read-ahead is 128 KiB, and reads around the page cache are 5.0 times as fast")
    assert "(1.00 and 0.20 GB/s with 4 readers)" in advice
    assert change in advice


def test_much_read_ahead_can_be_what_slows_rclone_down() -> None:
    [advice] = advise(facts_of("fuse.rclone", LITTLE_READ_AHEAD, read_ahead_kib=4096))
    assert advice.startswith("read-ahead is 4096 KiB") and "load with --load-direct" in advice


@pytest.mark.parametrize(
    "facts",
    [
        facts_of("fuse", LITTLE_READ_AHEAD, read_ahead_kib=1024),
        facts_of("fuse.rclone", GOOD, read_ahead_kib=4096),
        facts_of("fuse", LITTLE_READ_AHEAD, read_ahead_kib=None),
        facts_of("fuse", GOOD, read_ahead_kib=128),
        facts_of("fuse", {count: (buffered, None) for count, (buffered, _) in GOOD.items()}, read_ahead_kib=128),
    ],
)
def test_read_ahead_is_left_alone_without_a_reason(facts: Facts) -> None:
    assert advise(facts) == []


@pytest.mark.parametrize(
    ("kind", "option", "size"), [("fuse", "max_read=131072", "128 KiB"), ("nfs4", "rsize=262144", "256 KiB")]
)
def test_a_mount_option_that_makes_requests_small_is_named(kind: str, option: str, size: str) -> None:
    [advice] = advise(facts_of(kind, options=("ro", option)))
    assert f"the mount option {option} limits a request to {size}" in advice


@pytest.mark.parametrize(
    ("kind", "option"),
    [("fuse", "max_read=1048576"), ("fuse", "max_read=0"), ("nfs4", "rsize=1048576"), ("ext4", "rsize=1")],
)
def test_large_requests_are_well(kind: str, option: str) -> None:
    assert advise(facts_of(kind, options=(option,))) == []


SLOW_STREAMS = {1: (0.05, 0.05), 4: (0.2, 0.2), 16: (0.8, 0.8)}


@pytest.mark.parametrize("kind", ["fuse", "fuse.gcsfuse"])
def test_slow_streams_of_gcsfuse_want_buffered_reads(kind: str) -> None:
    [advice] = advise(facts_of(kind, SLOW_STREAMS))
    assert "one reader gets 0.05 GB/s" in advice
    assert "profile:aiml-serving" in advice and "read:enable-buffered-read:true" in advice


@pytest.mark.parametrize("kind", ["fuse.rclone", "nfs4", "ext4"])
def test_slow_streams_elsewhere_are_not_told_of_gcsfuse(kind: str) -> None:
    assert advise(facts_of(kind, SLOW_STREAMS)) == []


ONE_LIMIT = {1: (0.3, 0.3), 4: (0.35, 0.35), 16: (0.4, 0.4)}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("fuse", 'gke-gcsfuse/cpu-limit: "0"'),
        ("fuse.gcsfuse", "gcs-connection:client-protocol:grpc"),
        ("nfs4", "nconnect=8"),
        ("fuse.rclone", "look for what limits CPU or bandwidth"),
        ("gs", "look for what limits CPU or bandwidth"),
    ],
)
def test_readers_that_bring_no_more_have_a_common_limit(kind: str, change: str) -> None:
    [advice] = advise(facts_of(kind, ONE_LIMIT))
    assert "16 readers get 0.40 GB/s together, hardly more than one alone (0.30 GB/s)" in advice
    assert change in advice


def test_nfs_with_several_connections_is_not_told_to_have_them() -> None:
    [advice] = advise(facts_of("nfs4", ONE_LIMIT, options=("nconnect=16",)))
    assert "nconnect" not in advice


@pytest.mark.parametrize(
    "facts",
    [
        facts_of("ext4", ONE_LIMIT),
        facts_of("fuse", {1: (2.5, 2.5), 16: (2.6, 2.6)}),  # all that a machine takes
        facts_of("fuse", {1: (6.0, 0.3), 16: (6.0, 0.3)}),  # of the page cache
    ],
)
def test_readers_that_bring_no_more_are_fine_where_that_is_no_limit_of_the_network(facts: Facts) -> None:
    assert advise(facts) == []


@pytest.mark.parametrize(
    ("kind", "change"), [("ext4", "take a faster type of disk"), ("nfs4", "in the machine's region")]
)
def test_slow_storage_is_told_with_the_time_that_it_takes(kind: str, change: str) -> None:
    [advice] = advise(facts_of(kind, {1: (0.05, 0.05), 16: (0.1, 0.1)}))
    assert advice.startswith("the storage gives 0.100 GB/s at most")
    assert "all 10.00 GB take 100 s" in advice and change in advice


def test_a_late_first_byte_of_gcsfuse_wants_metadata_cached() -> None:
    [advice] = advise(facts_of("fuse", first_byte=0.4))
    assert "takes 0.40 s" in advice and "metadata-cache:ttl-secs:-1" in advice


def test_a_late_first_byte_elsewhere_is_a_matter_of_regions() -> None:
    [advice] = advise(facts_of("nfs4", first_byte=0.4))
    assert "region" in advice and "metadata-cache" not in advice


def test_a_late_first_byte_of_a_disk_is_nothing_to_change() -> None:
    assert advise(facts_of("ext4", first_byte=0.4)) == []


def test_more_than_the_page_cache_can_hold_wants_a_file_cache() -> None:
    [advice] = advise(facts_of("fuse.gcsfuse", num_bytes=480 * 10**9))
    assert "480.00 GB and 100.00 GB of memory are free" in advice
    assert "file-cache:max-size-mb:-1" in advice


def test_a_file_cache_is_an_option_of_gcsfuse_only() -> None:
    assert advise(facts_of("nfs4", num_bytes=480 * 10**9)) == []


@pytest.mark.parametrize(("kind", "place"), [("fuse", "gke-gcsfuse/memory-limit"), ("nfs4", "in its log")])
def test_repeated_reads_are_told(kind: str, place: str) -> None:
    [advice] = advise(facts_of(kind, num_retries=3))
    assert "3 read(s) failed" in advice and place in advice


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (
            facts_of("ext4", {1: (6.0, 0.5), 16: (9.0, 2.0)}),
            "may be of the page cache: 6.00 GB/s with 1 reader, and 8.00",
        ),
        (facts_of("tmpfs"), "tmpfs: the files lie in memory"),
        (facts_of(seconds=0.02), "a measurement had bytes for 0.020 s only"),
    ],
)
def test_doubtful_figures_have_a_note(facts: Facts, text: str) -> None:
    [note] = notes(facts)
    assert text in note


@pytest.mark.parametrize("facts", [facts_of(), facts_of(again=0.3), facts_of("ext4"), buffered_only("gs", 1, 2, 3)])
def test_firm_figures_have_no_note(facts: Facts) -> None:
    assert notes(facts) == []


@pytest.mark.parametrize(
    ("facts", "readers", "direct"),
    [
        (facts_of(), 16, False),
        (facts_of(rates=LITTLE_READ_AHEAD), 16, True),
        (facts_of("ext4", {1: (2.0, 2.0), 4: (2.1, 2.1), 16: (2.15, 2.15)}), 1, False),
        (facts_of("ext4", {1: (1.0, 1.2), 4: (2.0, 2.4), 16: (2.0, 2.4)}), 4, False),  # 20 % is not worth the cache
        (facts_of("ext4", {1: (6.0, 0.5), 4: (7.0, 1.9), 16: (9.0, 2.0)}), 4, None),
        (facts_of("tmpfs", {1: (3.0, 3.0), 4: (6.0, 9.0)}), 4, False),
        (facts_of("overlay", {1: (1.0, None), 4: (2.0, None)}), 4, False),
        (buffered_only("gs", 0.2, 0.7, 1.5), 16, False),
    ],
)
def test_settings_are_the_fewest_readers_and_direct_where_clearly_faster(
    facts: Facts, readers: int, direct: bool | None
) -> None:
    settings = choose_settings(facts)
    assert (settings.load_readers, settings.load_direct) == (readers, direct)


@pytest.mark.parametrize(
    ("direct", "flags"),
    [
        (True, "--load-readers 4 --load-direct"),
        (False, "--load-readers 4 --no-load-direct"),
        (None, "--load-readers 4"),
    ],
)
def test_settings_are_flags_of_the_command_line(direct: bool | None, flags: str) -> None:
    assert Settings(4, direct, ()).flags == flags


def test_settings_have_their_figures() -> None:
    readers, direct = choose_settings(facts_of(rates=LITTLE_READ_AHEAD)).reasons
    assert "1: 0.30 GB/s, 4: 1.00 GB/s, 16: 2.40 GB/s" in readers
    assert direct == "direct: 2.40 GB/s around the page cache, 0.80 GB/s through it, with 16 readers"


def test_advice_comes_in_a_fixed_order() -> None:
    facts = facts_of(rates=LITTLE_READ_AHEAD, read_ahead_kib=128, num_retries=1, first_byte=1.0)
    assert [text.split()[0] for text in advise(facts)] == ["read-ahead", "the", "1"]
