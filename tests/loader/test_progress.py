"""What a person sees of a load: a progress bar and one line, on a terminal only."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig

WriteShards = Any  # that of conftest.py


class Terminal:
    """A pseudo-terminal to write to, and what was written."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))  # rows, columns
        self.stream: TextIOWrapper = os.fdopen(slave, "w", encoding="utf-8")
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def text(self) -> str:
        """All of it; nothing can be written any more."""
        self.stream.close()
        self._thread.join(10)
        return b"".join(self._parts).decode()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._master, 4096)
            except OSError:  # EIO: nobody has the other end open any more
                part = b""
            if not part:
                break
            self._parts.append(part)
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    found = Terminal()
    yield found
    found.text()


def load(folder: Path, terminal: Terminal, progress: bool) -> str:
    """What a load writes to the terminal."""
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    with pytest.MonkeyPatch.context() as patch:  # here: between setup and call pytest sets sys.stderr itself
        patch.setattr(sys, "stderr", terminal.stream)
        load_model(checkpoint, config, torch.float32, torch.device("cpu"), progress=progress)
    return terminal.text()


@pytest.fixture
def folder(write_shards: WriteShards, llama_tensors: dict[str, Tensor]) -> Path:
    found: Path = write_shards({"model.safetensors": llama_tensors})
    return found


def test_a_terminal_gets_a_bar_and_one_line(folder: Path, llama_tensors: dict[str, Tensor], terminal: Terminal) -> None:
    first, *_, last, line, end = re.split(r"[\r\n]+", load(folder, terminal, progress=True).lstrip("\r"))
    size = f"{sum(tensor.nbytes for tensor in llama_tensors.values()) / 1e3:.1f}k"
    assert re.match(rf"weights: +0%.* 0\.00/{size} ", first)
    rates = r"\[00:\d\d<.*B/s, average \d\.\d\d GB/s, \d+ readers\]"
    assert re.match(rf"weights: 100%.* {size}/{size} {rates}", last)
    rates = r"0\.0\d\d GB in \d+\.\d\d s: \d\.\d\d GB/s with 1 readers"
    assert re.fullmatch(
        rf"loaded {len(llama_tensors)} tensors, {rates}; host memory on the way \d+ MB, 0 retries", line
    )
    assert end == ""


def test_a_terminal_gets_nothing_that_was_not_asked_for(folder: Path, terminal: Terminal) -> None:
    assert load(folder, terminal, progress=False) == ""


def test_what_is_no_terminal_gets_no_bar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint.open(folder)
    load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, torch.device("cpu"), progress=True)
    assert capsys.readouterr().err == ""
