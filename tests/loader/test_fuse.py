"""Real FUSE mounts: `rclone mount` of the server of torchinfer.fake_gcs, as gcsfuse mounts a bucket.

A mount whose daemon hangs would hang whoever reads it. So each daemon is killed after LIMIT_SECONDS, which ends every
read of its mount with an error, and each mount is undone whatever the test did.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import google_crc32c
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchinfer.cli import main
from torchinfer.errors import CheckpointError
from torchinfer.fake_gcs import Behaviour, FakeGcs
from torchinfer.loader import Checkpoint, LoadOptions, load_model, load_weights
from torchinfer.loader.doctor import diagnose
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.readers import Readers
from torchinfer.loader.retry import RetryPolicy
from torchinfer.loader.weights import LoadReport
from torchinfer.models.config import ModelConfig
from torchinfer.testing import save_random_checkpoint, tiny_config
from torchinfer.weight_map import Target

pytestmark = pytest.mark.fuse

LIMIT_SECONDS = 60.0
CPU = torch.device("cpu")
NO_RETRIES = ("--low-level-retries", "1")  # by rclone: what it does not hide reaches the loader
NOTHING_KEPT = ("--dir-cache-time", "1ms", "--attr-timeout", "0s")
EXTENT_BYTES = 4 << 20
NUM_TENSORS = 10
FOUR = LoadOptions(readers=4)


class Toy(nn.Module):
    """40 MB in two shards: ten extents of EXTENT_BYTES."""

    CHECKPOINT: ClassVar[Mapping[str, Target]] = {f"w{i}": Target(f"w{i}") for i in range(NUM_TENSORS)}
    IGNORED: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        for name in self.CHECKPOINT:
            self.register_parameter(name, nn.Parameter(torch.empty(1000, 1000)))


def write_toy(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"w{i}": torch.randn(1000, 1000, generator=generator) for i in range(NUM_TENSORS)}
    weight_map = {}
    for first in (0, 1):
        shard = f"model-{first + 1}-of-2.safetensors"
        names = list(tensors)[first::2]
        save_file({name: tensors[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "config.json").write_text('{"architectures": ["Toy"]}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_random_checkpoint(tiny_config("mixtral"), folder)
    return folder


@dataclass
class Bucket:
    """A mounted bucket."""

    gcs: FakeGcs
    point: Path
    daemon: subprocess.Popen[bytes]


Mount = Callable[..., Bucket]
OnRead = Callable[[Callable[[int], object]], None]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """mount(folder, *options): the folder as a bucket of the server, mounted by rclone with these options."""
    with contextlib.ExitStack() as stack:
        yield lambda folder, *options: stack.enter_context(mounted_bucket(folder, tmp_path, options))


@contextlib.contextmanager
def mounted_bucket(folder: Path, base: Path, options: tuple[str, ...]) -> Iterator[Bucket]:
    root, point = base / "root", base / "mount"
    root.mkdir()
    point.mkdir()
    (root / "bucket").symlink_to(folder)
    with FakeGcs(root) as gcs:
        endpoint = ("--gcs-endpoint", f"{gcs.endpoint}/storage/v1/", "--gcs-anonymous")
        with mounted(":gcs:bucket", point, *endpoint, "--vfs-read-chunk-size", "32M", *options) as daemon:
            yield Bucket(gcs, point, daemon)


@contextlib.contextmanager
def mounted(remote: str, point: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = ["rclone", "mount", remote, str(point), "--config", os.devnull, "--read-only", "--vfs-cache-mode", "off"]
    with (point.parent / "rclone.log").open("wb") as log:
        daemon = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    watchdog = threading.Timer(LIMIT_SECONDS, daemon.kill)
    watchdog.start()
    try:
        wait_for_mount(daemon, point)
        yield daemon
    finally:
        watchdog.cancel()
        daemon.kill()  # also when it is stopped; before anything touches the mount
        daemon.wait()
        unmount(point)


def wait_for_mount(daemon: subprocess.Popen[bytes], point: Path) -> None:
    while not is_mounted(point):
        log = (point.parent / "rclone.log").read_text()
        assert daemon.poll() is None, f"rclone ended: {log}"
        time.sleep(0.02)


def is_mounted(point: Path) -> bool:
    return f" {point} " in Path("/proc/self/mountinfo").read_text()


def unmount(point: Path) -> None:
    for command in (["fusermount3", "-u"], ["umount", "-l"]):
        if is_mounted(point):
            subprocess.run([*command, str(point)], timeout=LIMIT_SECONDS, check=False)
    assert not is_mounted(point)


def load_toy(folder: Path, options: LoadOptions = FOUR) -> tuple[dict[str, Tensor], LoadReport]:
    return fill_toy(Checkpoint.open(folder), options)


def fill_toy(checkpoint: Checkpoint, options: LoadOptions = FOUR) -> tuple[dict[str, Tensor], LoadReport]:
    with torch.device("meta"):
        model = Toy()
    report = load_weights(model, checkpoint, torch.float32, CPU, False, options)
    return model.state_dict(), report


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def expected(toy: Path) -> dict[str, Tensor]:
    """The toy as loaded from the disk."""
    return load_toy(toy)[0]


@pytest.fixture(autouse=True)
def short_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchinfer.loader.plan.NETWORK_EXTENT_BYTES", EXTENT_BYTES)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryPolicy, "delay", lambda policy, failures: 0.001)


def readers_left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "header"))]


# A mount that works


def test_a_mount_is_network_storage(toy: Path, mount: Mount) -> None:
    source = FolderSource(mount(toy).point)
    assert (source.kind, source.is_network) == ("fuse.rclone", True)


def test_a_folder_of_this_machine_behind_fuse_is_network_storage_too(tmp_path: Path) -> None:
    point = tmp_path / "mount"
    point.mkdir()
    (tmp_path / "folder").mkdir()
    with mounted(str(tmp_path / "folder"), point):
        assert FolderSource(point).is_network


def test_a_model_is_what_it_is_on_the_disk(tiny: Path, mount: Mount) -> None:
    models = []
    for place in (tiny, mount(tiny).point):
        checkpoint = Checkpoint.open(place)
        models.append(load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, CPU))
    on_disk, on_mount = (model.state_dict() for model in models)
    assert same(on_mount, on_disk)


@pytest.mark.parametrize("direct", [True, False, None])
@pytest.mark.parametrize("readers", [1, 8])
def test_options_change_nothing_but_the_way(
    toy: Path, mount: Mount, expected: dict[str, Tensor], readers: int, direct: bool | None
) -> None:
    found, report = load_toy(mount(toy).point, LoadOptions(readers=readers, direct=direct))
    assert same(found, expected)
    assert (report.is_direct, report.num_retries) == (bool(direct), 0)
    assert 1 <= report.num_readers <= readers


def test_inspect_says_what_it_says_of_the_disk(tiny: Path, mount: Mount, capsys: pytest.CaptureFixture[str]) -> None:
    point = mount(tiny).point
    assert [main(["inspect", str(place)]) for place in (tiny, point)] == [0, 0]
    text = capsys.readouterr().out.replace(str(point), str(tiny))
    assert text[: len(text) // 2] == text[len(text) // 2 :]


def test_doctor_measures_a_mount(toy: Path, mount: Mount) -> None:
    facts = diagnose(str(mount(toy).point), seconds=0.2).facts
    assert facts.mount is not None and facts.mount.source.endswith(":bucket")
    assert (facts.kind, facts.is_network, facts.has_direct) == ("fuse.rclone", True, True)


# Faults behind the mount


@pytest.mark.parametrize("behaviour", [Behaviour(fault="503", every=3), Behaviour(fault="truncate", every=2)])
def test_faults_that_the_daemon_hides_change_nothing(
    toy: Path, mount: Mount, expected: dict[str, Tensor], behaviour: Behaviour
) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)
    bucket.gcs.set(behaviour)
    assert same(fill_toy(checkpoint)[0], expected)


def test_errors_that_pass_are_survived(
    toy: Path, mount: Mount, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = mount(toy, *NO_RETRIES)
    checkpoint = Checkpoint.open(bucket.point)

    def delay(policy: RetryPolicy, failures: int) -> float:
        bucket.gcs.set(Behaviour())
        return 0.001

    monkeypatch.setattr(RetryPolicy, "delay", delay)
    bucket.gcs.set(Behaviour(fault="503"))
    found, report = fill_toy(checkpoint)
    assert same(found, expected) and report.num_retries > 0


def test_errors_that_stay_are_given_up(toy: Path, mount: Mount) -> None:
    bucket = mount(toy, *NO_RETRIES)
    checkpoint = Checkpoint.open(bucket.point)
    bucket.gcs.set(Behaviour(fault="403"))  # as EIO; with 503, rclone itself waits for up to 2 s before each request
    with pytest.raises(CheckpointError, match=r"Input/output error \(errno 5\); gave up after 8 attempts"):
        fill_toy(checkpoint)
    assert readers_left() == []


def test_a_bit_that_was_flipped_on_the_way_is_found_by_a_sums_file(tmp_path: Path, mount: Mount) -> None:
    (tmp_path / "toy").mkdir()
    write_toy(tmp_path / "toy", seed=0)
    shards = sorted((tmp_path / "toy").glob("*.safetensors"))
    sums = [f"{google_crc32c.value(shard.read_bytes()):08x}  {shard.name}\n" for shard in shards]
    (tmp_path / "toy" / "CRC32C").write_text("".join(sums))
    bucket = mount(tmp_path / "toy")
    checkpoint = Checkpoint.open(bucket.point)
    (bucket.point / "CRC32C").read_bytes()
    bucket.gcs.set(Behaviour(fault="flip", every=2))
    with pytest.raises(CheckpointError, match="do not have their CRC32C"):
        fill_toy(checkpoint, LoadOptions(readers=1, verify=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [(NO_RETRIES, "gave up after 8 attempts"), ((*NO_RETRIES, *NOTHING_KEPT), "was replaced or changed while it was")],
    ids=["the mount does not know", "the mount knows"],
)
def test_objects_that_are_replaced_during_a_load_are_an_error(
    tmp_path: Path, mount: Mount, on_read: OnRead, options: tuple[str, ...], message: str
) -> None:
    """A mount that keeps what it knew of an object asks for a generation that is not there any more."""
    for seed, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        write_toy(tmp_path / name, seed)

    def replace_all(number: int) -> None:
        if number == 3:
            for path in (tmp_path / "new").iterdir():
                os.replace(path, tmp_path / "old" / path.name)

    checkpoint = Checkpoint.open(mount(tmp_path / "old", *options).point)
    on_read(replace_all)
    with pytest.raises(CheckpointError, match=message):
        fill_toy(checkpoint, LoadOptions(readers=1))
    assert readers_left() == []


# Daemons that die or hang


def test_a_daemon_that_is_killed_is_an_error_with_advice(toy: Path, mount: Mount, on_read: OnRead) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)

    def kill(number: int) -> None:
        if number == 3:
            bucket.daemon.kill()
            bucket.daemon.wait()

    on_read(kill)
    with pytest.raises(CheckpointError, match=r"the FUSE daemon of this mount died: mount it again"):
        fill_toy(checkpoint)
    assert readers_left() == []


@pytest.mark.parametrize("direct", [False, True])
def test_a_daemon_that_is_killed_in_the_middle_of_a_read_is_the_same_error(
    toy: Path, mount: Mount, direct: bool
) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)
    bucket.gcs.set(Behaviour(latency=60))
    threading.Timer(0.3, bucket.daemon.kill).start()
    with pytest.raises(CheckpointError, match=r"errno 10[37]\); the FUSE daemon of this mount died: mount it again"):
        fill_toy(checkpoint, LoadOptions(readers=4, direct=direct))
    assert readers_left() == []


def test_a_daemon_that_was_dead_before_is_the_same_error(toy: Path, mount: Mount) -> None:
    bucket = mount(toy)
    bucket.daemon.kill()
    bucket.daemon.wait()
    with pytest.raises(CheckpointError, match="the FUSE daemon of this mount died: mount it again"):
        Checkpoint.open(bucket.point)


def test_a_daemon_that_hangs_is_given_up(
    toy: Path, mount: Mount, on_read: OnRead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchinfer.loader.weights.Readers", partial(Readers, stall_seconds=0.3))
    monkeypatch.setattr("torchinfer.loader.readers.JOIN_SECONDS", 0.1)
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)
    on_read(lambda number: bucket.daemon.send_signal(signal.SIGSTOP) if number == 3 else None)
    with pytest.raises(CheckpointError, match=r"gave nothing of model-.* for 0.9 s; check the storage"):
        fill_toy(checkpoint)
    bucket.daemon.kill()
    for thread in readers_left():  # they end when the kernel lets them go
        thread.join(10)
    assert readers_left() == []


def test_a_daemon_that_hangs_from_the_beginning_is_given_up(
    toy: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchinfer.loader.stall.STALL_SECONDS", 0.3)
    bucket = mount(toy, *NOTHING_KEPT)
    bucket.daemon.send_signal(signal.SIGSTOP)
    with pytest.raises(CheckpointError, match=rf"cannot open {bucket.point}: nothing came for 0.3 s, 3 times"):
        Checkpoint.open(bucket.point)
    bucket.daemon.kill()
    for thread in readers_left():
        thread.join(10)
    assert readers_left() == []


def test_a_daemon_that_hangs_while_headers_are_read_is_given_up(
    toy: Path, mount: Mount, on_read: OnRead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchinfer.loader.stall.STALL_SECONDS", 0.3)
    bucket = mount(toy)
    on_read(lambda number: bucket.daemon.send_signal(signal.SIGSTOP) if number == 3 else None)  # 1, 2: JSON files
    with pytest.raises(
        CheckpointError, match=r"cannot read the header of .*model-\d-of-2.*: nothing came for 0.3 s, 3"
    ):
        Checkpoint.open(bucket.point)
    bucket.daemon.kill()
    for thread in readers_left():
        thread.join(10)
    assert readers_left() == []


def test_a_daemon_that_hangs_for_a_while_is_waited_for(
    toy: Path, mount: Mount, on_read: OnRead, expected: dict[str, Tensor]
) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)

    def stop(number: int) -> None:
        if number == 3:
            bucket.daemon.send_signal(signal.SIGSTOP)
            threading.Timer(0.5, bucket.daemon.send_signal, (signal.SIGCONT,)).start()

    on_read(stop)
    assert same(fill_toy(checkpoint)[0], expected)
