"""Mounts that work, and faults behind them that a mount hides or shows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from torch import Tensor

from torchinfer.cli import main
from torchinfer.errors import CheckpointError
from torchinfer.fake_gcs import Behaviour
from torchinfer.loader import Checkpoint, LoadOptions, load_model
from torchinfer.loader.doctor import diagnose
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.retry import RetryPolicy
from torchinfer.models.config import ModelConfig
from torchinfer.tokenizer_files import load_tokenizer

Mount = Callable[..., Any]  # these are of conftest.py
Fill = Callable[..., Any]
Write = Callable[[Path, int], None]
Left = Callable[[], list[threading.Thread]]
OnRead = Callable[[Callable[[int], object]], None]
NO_RETRIES = ("--low-level-retries", "1")  # by rclone: what it does not hide reaches the loader
NOTHING_KEPT = ("--dir-cache-time", "1ms", "--attr-timeout", "0s")

MODEL = Path(__file__).parents[3] / "recipes" / "tiny-llama"

pytestmark = pytest.mark.fuse


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_mount_is_network_storage(toy: Path, mount: Mount) -> None:
    source = FolderSource(mount(toy).point)
    assert (source.kind, source.is_network) == ("fuse.rclone", True)


def test_a_folder_of_this_machine_behind_fuse_is_network_storage_too(
    tmp_path: Path, mount_local: Callable[[Path], Path]
) -> None:
    (tmp_path / "folder").mkdir()
    assert FolderSource(mount_local(tmp_path / "folder")).is_network


def test_a_model_is_what_it_is_on_the_disk(tiny: Path, mount: Mount) -> None:
    models = []
    for place in (tiny, mount(tiny).point):
        checkpoint = Checkpoint.open(place)
        models.append(
            load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, torch.device("cpu"))
        )
    on_disk, on_mount = (model.state_dict() for model in models)
    assert same(on_mount, on_disk)


@pytest.mark.parametrize("direct", [True, False, None])
@pytest.mark.parametrize("readers", [1, 8])
def test_options_change_nothing_but_the_way(
    toy: Path, mount: Mount, fill: Fill, expected: dict[str, Tensor], readers: int, direct: bool | None
) -> None:
    found, report = fill(Checkpoint.open(mount(toy).point), LoadOptions(readers=readers, direct=direct))
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


def test_a_tokenizer_is_what_it_is_on_the_disk(mount: Mount) -> None:
    on_disk, on_mount = load_tokenizer(MODEL), load_tokenizer(mount(MODEL).point)
    assert on_disk is not None and on_mount is not None
    assert on_mount.encode("The quick brown fox") == on_disk.encode("The quick brown fox")


# Faults behind the mount


@pytest.mark.parametrize("behaviour", [Behaviour(fault="503", every=3), Behaviour(fault="truncate", every=2)])
def test_faults_that_the_daemon_hides_change_nothing(
    toy: Path, mount: Mount, fill: Fill, expected: dict[str, Tensor], behaviour: Behaviour
) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)
    bucket.gcs.set(behaviour)
    assert same(fill(checkpoint)[0], expected)


def test_errors_that_pass_are_survived(
    toy: Path, mount: Mount, fill: Fill, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = mount(toy, *NO_RETRIES)
    checkpoint = Checkpoint.open(bucket.point)

    def delay(policy: RetryPolicy, failures: int) -> float:
        bucket.gcs.set(Behaviour())
        return 0.001

    monkeypatch.setattr(RetryPolicy, "delay", delay)
    bucket.gcs.set(Behaviour(fault="503"))
    found, report = fill(checkpoint)
    assert same(found, expected) and report.num_retries > 0


def test_errors_that_stay_are_given_up(toy: Path, mount: Mount, fill: Fill, readers_left: Left) -> None:
    bucket = mount(toy, *NO_RETRIES)
    checkpoint = Checkpoint.open(bucket.point)
    bucket.gcs.set(Behaviour(fault="403"))  # as EIO; with 503, rclone itself waits for up to 2 s before each request
    with pytest.raises(CheckpointError, match=r"Input/output error \(errno 5\); gave up after 8 attempts"):
        fill(checkpoint)
    assert readers_left() == []


def test_a_bit_that_was_flipped_on_the_way_is_found_by_a_sums_file(
    tmp_path: Path, mount: Mount, fill: Fill, write: Write
) -> None:
    (tmp_path / "toy").mkdir()
    write(tmp_path / "toy", 0)
    shards = sorted((tmp_path / "toy").glob("*.safetensors"))
    sums = [f"{google_crc32c.value(shard.read_bytes()):08x}  {shard.name}\n" for shard in shards]
    (tmp_path / "toy" / "CRC32C").write_text("".join(sums))
    bucket = mount(tmp_path / "toy")
    checkpoint = Checkpoint.open(bucket.point)
    (bucket.point / "CRC32C").read_bytes()
    bucket.gcs.set(Behaviour(fault="flip", every=2))
    with pytest.raises(CheckpointError, match="do not have their CRC32C"):
        fill(checkpoint, LoadOptions(readers=1, verify=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [(NO_RETRIES, "gave up after 8 attempts"), ((*NO_RETRIES, *NOTHING_KEPT), "was replaced or changed while it was")],
    ids=["the mount does not know", "the mount knows"],
)
def test_objects_that_are_replaced_during_a_load_are_an_error(
    tmp_path: Path,
    mount: Mount,
    fill: Fill,
    write: Write,
    on_read: OnRead,
    readers_left: Left,
    options: tuple[str, ...],
    message: str,
) -> None:
    """A mount that keeps what it knew of an object asks for a generation that is not there any more."""
    for seed, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, seed)

    def replace_all(number: int) -> None:
        if number == 3:
            for path in (tmp_path / "new").iterdir():
                os.replace(path, tmp_path / "old" / path.name)

    checkpoint = Checkpoint.open(mount(tmp_path / "old", *options).point)
    on_read(replace_all)
    with pytest.raises(CheckpointError, match=message):
        fill(checkpoint, LoadOptions(readers=1))
    assert readers_left() == []
