"""Real FUSE mounts: `rclone mount` of the server of torchinfer.fake_gcs, as gcsfuse mounts a bucket.

A mount whose daemon hangs would hang whoever reads it. So each daemon is killed after LIMIT_SECONDS, which ends every
read of its mount with an error, and each mount is undone whatever the test did.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchinfer.fake_gcs import FakeGcs
from torchinfer.loader import Checkpoint, LoadOptions, load_weights
from torchinfer.loader.retry import RetryPolicy
from torchinfer.loader.weights import LoadReport
from torchinfer.testing import save_random_checkpoint, tiny_config
from torchinfer.weight_map import Target

LIMIT_SECONDS = 60.0
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


@pytest.fixture
def write() -> Callable[[Path, int], None]:
    """write(folder, seed): a toy with other values."""
    return write_toy


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
Fill = Callable[..., tuple[dict[str, Tensor], LoadReport]]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """mount(folder, *options): the folder as a bucket of the server, mounted by rclone with these options."""
    with contextlib.ExitStack() as stack:
        yield lambda folder, *options: stack.enter_context(mounted_bucket(folder, tmp_path, options))


@pytest.fixture
def mount_local(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """mount_local(folder): where rclone mounts a folder of this machine."""
    with contextlib.ExitStack() as stack:

        def mount(folder: Path) -> Path:
            point = tmp_path / "mount"
            point.mkdir()
            stack.enter_context(mounted(str(folder), point))
            return point

        yield mount


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


@pytest.fixture(scope="module")
def fill() -> Fill:
    """fill(checkpoint, options): the tensors of a toy that is loaded, and the report."""

    def load(checkpoint: Checkpoint, options: LoadOptions = FOUR) -> tuple[dict[str, Tensor], LoadReport]:
        with torch.device("meta"):
            model = Toy()
        report = load_weights(model, checkpoint, torch.float32, torch.device("cpu"), False, options)
        return model.state_dict(), report

    return load


@pytest.fixture(scope="module")
def expected(toy: Path, fill: Fill) -> dict[str, Tensor]:
    """The toy as loaded from the disk."""
    return fill(Checkpoint.open(toy))[0]


@pytest.fixture(autouse=True)
def short_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchinfer.loader.plan.NETWORK_EXTENT_BYTES", EXTENT_BYTES)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryPolicy, "delay", lambda policy, failures: 0.001)


@pytest.fixture
def readers_left() -> Callable[[], list[threading.Thread]]:
    """Those that read at the moment."""
    return lambda: [each for each in threading.enumerate() if each.name.startswith(("reader", "header", "doctor"))]
