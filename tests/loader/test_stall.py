"""Storage that hangs while a checkpoint is opened: another thread tries again, and not for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader import Checkpoint
from torchinfer.loader.checkpoint import HEADER_READERS
from torchinfer.loader.retry import Stopped
from torchinfer.loader.stall import STALL_BYTES, StalledError, Trial, unless_stalled
from torchinfer.planner.source import read_source
from torchinfer.tokenizer_files import load_tokenizer

pytestmark = pytest.mark.usefixtures("short_stalls")

SHARDS = [f"model-{number}.safetensors" for number in range(40)]  # more than are read side by side
WriteShards = Callable[..., Path]
OnRead = Callable[[Callable[[int], object]], None]
HangIn = Callable[[str, Path], None]


@pytest.fixture
def folder(write_shards: WriteShards) -> Path:
    return write_shards({shard: {f"x{number}": torch.full((4,), number)} for number, shard in enumerate(SHARDS)})


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture(params=["disk", "network"])
def side_by_side(request: pytest.FixtureRequest) -> None:
    """Headers are read one after the other, or several at once."""
    if request.param == "network":
        request.getfixturevalue("network_mounts")


@pytest.mark.usefixtures("side_by_side")
@pytest.mark.parametrize("stalled", [1, 2, 3, 7], ids=["config", "index", "first header", "fifth header"])
def test_a_read_that_hangs_once_is_tried_by_another_thread(
    folder: Path, on_read: OnRead, hang: threading.Event, caplog: pytest.LogCaptureFixture, stalled: int
) -> None:
    expected = values(Checkpoint.open(folder))
    on_read(lambda number: hang.wait(60) if number == stalled else None)
    found = values(Checkpoint.open(folder))
    assert "nothing came for 0.2 s; another thread tries again" in caplog.text
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.usefixtures("side_by_side")
def test_headers_that_hang_for_good_are_an_error_that_names_one(
    folder: Path, on_read: OnRead, hang: threading.Event
) -> None:
    """After the time of one, not of one wave of readers after the other."""
    numbers: list[int] = []

    def action(number: int) -> None:
        if number > 2:
            numbers.append(number)
            hang.wait(60)

    on_read(action)
    with pytest.raises(
        StalledError,
        match=r"cannot read the header of .*/model-\d+\.safetensors: nothing came for 0.2 s, 3 times; check",
    ):
        Checkpoint.open(folder)
    assert len(numbers) < 3 * len(SHARDS)


def test_headers_over_a_network_are_read_side_by_side(folder: Path, on_read: OnRead, network_mounts: None) -> None:
    together = threading.Barrier(HEADER_READERS)
    on_read(lambda number: together.wait(10) if 2 < number <= 2 + HEADER_READERS else None)  # 1, 2: JSON files
    assert len(Checkpoint.open(folder).tensors) == len(SHARDS)


def test_a_configuration_that_hangs_is_an_error_at_once(folder: Path, on_read: OnRead, hang: threading.Event) -> None:
    on_read(lambda number: hang.wait(60))
    with pytest.raises(StalledError, match=r"cannot read .*/config\.json: nothing came for 0.2 s, 3 times"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("call", "path", "message"),
    [
        ("stat", "", "cannot open {folder}: nothing came"),
        ("scandir", "", "cannot list {folder}: nothing came"),
        ("stat", "config.json", "cannot read {folder}/config.json: nothing came"),
        ("stat", SHARDS[5], f"cannot read the header of {{folder}}/{SHARDS[5]}: nothing came"),
        ("open", SHARDS[5], f"cannot read the header of {{folder}}/{SHARDS[5]}: nothing came"),
    ],
)
def test_calls_of_the_system_that_hang_are_given_up(
    folder: Path, hang_in: HangIn, call: str, path: str, message: str
) -> None:
    hang_in(call, folder / path)
    with pytest.raises(StalledError, match=message.format(folder=folder)):
        Checkpoint.open(folder)


def test_a_tensor_that_hangs_is_an_error_that_names_it(folder: Path, on_read: OnRead, hang: threading.Event) -> None:
    checkpoint = Checkpoint.open(folder)
    on_read(lambda number: hang.wait(60))
    with pytest.raises(CheckpointError, match=r"cannot read 'x3' of .*/model-3\.safetensors: nothing came for 0.2 s"):
        checkpoint.read("x3")


def test_bytes_that_come_slowly_are_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    def read(trial: Trial) -> str:
        for _ in range(12):
            time.sleep(0.05)
            trial.count(STALL_BYTES // 2)
        return "all of them"

    assert unless_stalled("read slowly", read) == "all of them"
    assert not caplog.text


def test_a_trickle_is_a_stall() -> None:
    def read(trial: Trial) -> None:
        while not trial.attempts.stop.wait(0.01):
            trial.count(1)

    with pytest.raises(StalledError, match=r"cannot read slowly: only \d+ bytes came for 0.2 s, 3 times"):
        unless_stalled("read slowly", read)


def test_what_is_measured_is_tried_once(hang: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        StalledError, match=r"cannot measure: nothing came for 0.2 s; check the storage \(and the mount"
    ):
        unless_stalled("measure", lambda trial: hang.wait(60), max_stalls=1)
    assert not caplog.text


@pytest.mark.parametrize(
    ("call", "path", "message"),
    [
        ("stat", "", "cannot open {folder}: nothing came for 0.2 s, 3 times"),
        ("scandir", "", "cannot list {folder}: nothing came"),
        ("stat", "tokenizer.json", "cannot read {folder}/tokenizer.json: nothing came"),
        ("open", "tokenizer.json", "cannot read {folder}/tokenizer.json: nothing came"),
    ],
)
def test_a_tokenizer_on_a_mount_that_hangs_is_given_up(
    tmp_path: Path, hang_in: HangIn, network_mounts: None, call: str, path: str, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    hang_in(call, tmp_path / path)
    with pytest.raises(StalledError, match=message.format(folder=tmp_path)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_bytes_hang_is_given_up(
    tmp_path: Path, on_read: OnRead, hang: threading.Event, network_mounts: None
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    on_read(lambda number: hang.wait(60))
    with pytest.raises(StalledError, match=f"cannot read {tmp_path}/tokenizer.json: nothing came for 0.2 s, 3 times"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("path", ["", "config.json"], ids=["folder", "file"])
def test_a_plan_of_what_hangs_is_given_up(folder: Path, hang_in: HangIn, path: str) -> None:
    hang_in("stat", folder)
    with pytest.raises(StalledError, match=f"cannot open {folder}: nothing came for 0.2 s, 3 times"):
        read_source(folder / path, "auto", None)


def test_what_a_call_raises_is_raised_here() -> None:
    def fail(trial: Trial) -> None:
        raise FileNotFoundError("config.json")

    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        unless_stalled("read", fail)


def test_a_thread_that_is_left_behind_is_told_to_stop(hang: threading.Event) -> None:
    trials: list[Trial] = []
    numbers = count()

    def call(trial: Trial) -> int:
        trials.append(trial)
        number = next(numbers)
        if number == 0:
            hang.wait(60)
        return number

    assert unless_stalled("count", call) == 1
    assert trials[0].attempts.stop.is_set() and trials[0] is not trials[1]


def test_who_is_told_to_stop_does_not_wait(hang: threading.Event) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        unless_stalled("wait", lambda trial: hang.wait(60), stop)
