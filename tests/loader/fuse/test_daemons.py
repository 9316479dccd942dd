"""FUSE daemons that die or hang."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchinfer.cli import main
from torchinfer.errors import CheckpointError
from torchinfer.fake_gcs import Behaviour
from torchinfer.loader import Checkpoint, LoadOptions
from torchinfer.loader.doctor import diagnose
from torchinfer.loader.readers import Readers
from torchinfer.loader.stall import StalledError
from torchinfer.tokenizer_files import load_tokenizer

Mount = Callable[..., Any]  # these are of conftest.py
Fill = Callable[..., Any]
Left = Callable[[], list[threading.Thread]]
OnRead = Callable[[Callable[[int], object]], None]
NOTHING_KEPT = ("--dir-cache-time", "1ms", "--attr-timeout", "0s")

MODEL = Path(__file__).parents[3] / "recipes" / "tiny-llama"

pytestmark = pytest.mark.fuse


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stop_at(bucket: Any, number: int) -> Callable[[int], object]:
    """The daemon hangs from the read with this number on."""
    return lambda found: bucket.daemon.send_signal(signal.SIGSTOP) if found == number else None


def let_go(bucket: Any, readers_left: Left) -> None:
    """End the daemon: then the kernel lets all readers go."""
    bucket.daemon.kill()
    for thread in readers_left():
        thread.join(10)
    assert readers_left() == []


def test_a_daemon_that_is_killed_is_an_error_with_advice(
    toy: Path, mount: Mount, fill: Fill, on_read: OnRead, readers_left: Left
) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)

    def kill(number: int) -> None:
        if number == 3:
            bucket.daemon.kill()
            bucket.daemon.wait()

    on_read(kill)
    with pytest.raises(CheckpointError, match=r"the FUSE daemon of this mount died: mount it again"):
        fill(checkpoint)
    assert readers_left() == []


@pytest.mark.parametrize("direct", [False, True])
def test_a_daemon_that_is_killed_in_the_middle_of_a_read_is_the_same_error(
    toy: Path, mount: Mount, fill: Fill, readers_left: Left, direct: bool
) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)
    bucket.gcs.set(Behaviour(latency=60))
    threading.Timer(0.3, bucket.daemon.kill).start()
    with pytest.raises(CheckpointError, match=r"errno 10[37]\); the FUSE daemon of this mount died: mount it again"):
        fill(checkpoint, LoadOptions(readers=4, direct=direct))
    assert readers_left() == []


def test_a_daemon_that_was_dead_before_is_the_same_error(toy: Path, mount: Mount) -> None:
    bucket = mount(toy)
    bucket.daemon.kill()
    bucket.daemon.wait()
    with pytest.raises(CheckpointError, match="the FUSE daemon of this mount died: mount it again"):
        Checkpoint.open(bucket.point)


def test_a_daemon_that_hangs_is_given_up(
    toy: Path, mount: Mount, fill: Fill, on_read: OnRead, readers_left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchinfer.loader.weights.Readers", partial(Readers, stall_seconds=0.3))
    monkeypatch.setattr("torchinfer.loader.readers.JOIN_SECONDS", 0.1)
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)
    on_read(stop_at(bucket, 3))
    with pytest.raises(CheckpointError, match=r"gave nothing of model-.* for 0.9 s; check the storage"):
        fill(checkpoint)
    let_go(bucket, readers_left)


@pytest.mark.parametrize(
    ("read", "times"),
    [(Checkpoint.open, ", 3 times"), (load_tokenizer, ", 3 times"), (diagnose, "")],
    ids=["a checkpoint", "a tokenizer", "doctor"],
)
def test_a_daemon_that_hangs_from_the_beginning_is_given_up(
    toy: Path, mount: Mount, readers_left: Left, short_stalls: None, read: Callable[[str], object], times: str
) -> None:
    bucket = mount(toy, *NOTHING_KEPT)
    bucket.daemon.send_signal(signal.SIGSTOP)
    with pytest.raises(StalledError, match=rf"cannot open {bucket.point}: nothing came for 0.2 s{times}; check the"):
        read(str(bucket.point))
    let_go(bucket, readers_left)


def test_a_daemon_that_hangs_while_headers_are_read_is_given_up(
    toy: Path, mount: Mount, on_read: OnRead, readers_left: Left, short_stalls: None
) -> None:
    bucket = mount(toy)
    on_read(stop_at(bucket, 3))  # 1, 2: JSON files
    with pytest.raises(StalledError, match=r"cannot read the header of .*model-\d-of-2.*: nothing came for 0.2 s, 3"):
        Checkpoint.open(bucket.point)
    let_go(bucket, readers_left)


def test_a_daemon_that_hangs_while_a_tokenizer_is_read_is_given_up(
    mount: Mount, on_read: OnRead, readers_left: Left, short_stalls: None
) -> None:
    bucket = mount(MODEL)
    on_read(stop_at(bucket, 3))
    with pytest.raises(StalledError, match=rf"cannot read {bucket.point}/.*\.json: nothing came for 0.2 s, 3 times"):
        load_tokenizer(bucket.point)
    let_go(bucket, readers_left)


def test_a_daemon_that_hangs_while_doctor_measures_is_given_up(
    toy: Path, mount: Mount, on_read: OnRead, readers_left: Left, short_stalls: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = mount(toy)
    on_read(stop_at(bucket, 7))  # before: to the first byte five times, and whether there are direct reads
    assert main(["doctor", str(bucket.point)]) == 1
    what = rf"cannot read model-1-of-2.safetensors of {bucket.point} with 1 reader: nothing came for 0.2 s"
    error = rf"torchinfer: error: {what}; .* again; measured before: \S+ ms to the first byte\n"
    assert re.fullmatch(error, capsys.readouterr().err)
    let_go(bucket, readers_left)


def test_a_daemon_that_hangs_for_a_while_is_waited_for(
    toy: Path, mount: Mount, fill: Fill, on_read: OnRead, expected: dict[str, Tensor]
) -> None:
    bucket = mount(toy)
    checkpoint = Checkpoint.open(bucket.point)

    def stop(number: int) -> None:
        if number == 3:
            bucket.daemon.send_signal(signal.SIGSTOP)
            threading.Timer(0.5, bucket.daemon.send_signal, (signal.SIGCONT,)).start()

    on_read(stop)
    assert same(fill(checkpoint)[0], expected)
