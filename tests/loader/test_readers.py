"""Readers side by side: right bytes whatever fails on the way, and nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.header import TensorEntry, read_header
from torchinfer.loader.memory import Staging
from torchinfer.loader.placement import Placement
from torchinfer.loader.plan import Piece, plan_extents
from torchinfer.loader.readers import Readers
from torchinfer.loader.retry import RetryPolicy
from torchinfer.loader.source import DirectUnsupportedError, TransientError
from torchinfer.loader.tuning import PROBE_READERS, DirectChoice, ReaderCount

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.002)
Faulty = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 40), (7,), (), (1000, 3), (64, 64), (1,)]
    for shard in ("a", "b"):
        save_file(
            {f"{shard}{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}, tmp_path / shard
        )
    return tmp_path


def headers(source: Any) -> dict[str, TensorEntry]:
    return {entry.name: entry for shard in "ab" for entry in read_header(source, shard, source.stat(shard))}


def make_readers(source: Any, places: dict[str, Tensor], *, num_readers: int = 3, direct: bool = False) -> Readers:
    """Readers of all tensors of two shards, in extents of 5,000 bytes; what `places` names is read into it."""
    entries = headers(source)
    extents = plan_extents({n: Placement(n) for n in entries}, entries, 5000)

    def place_of(piece: Piece) -> Tensor | None:
        name = piece.entry.name
        if name not in places:
            return None
        start = piece.offset - piece.entry.offset
        return places[name].view(-1).view(torch.uint8)[start : start + piece.num_bytes]

    return Readers(
        source=source,
        stats={shard: source.stat(shard) for shard in "ab"},
        extents=deque(extents),
        staging=Staging(16 << 20),
        place_of=place_of,
        count=ReaderCount(num_readers, num_readers),
        direct=DirectChoice(direct),
        policy=QUICK,
    )


def collect(readers: Readers, places: dict[str, Tensor]) -> dict[str, bytes]:
    """All bytes of each tensor, by way of staging memory or of its place."""
    found: dict[str, list[tuple[int, bytes]]] = {}
    for filled in readers.filled():
        for piece in filled.staged if filled else ():
            found.setdefault(piece.entry.name, []).append((piece.offset, filled.bytes_of(piece).numpy().tobytes()))
        if filled and filled.buffer is not None:
            filled.buffer.fill_(0xEE)  # whoever reads it after it was given back must see it
            readers.staging.give_back(filled.buffer)
    staged = {name: b"".join(part for _, part in sorted(parts)) for name, parts in found.items()}
    return staged | {name: place.numpy().tobytes() for name, place in places.items()}


def expected(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: t.numpy().tobytes() for shard in "ab" for name, t in load_file(folder / shard).items()}


def places_for(entries: dict[str, TensorEntry], names: list[str]) -> dict[str, Tensor]:
    return {name: torch.full(entries[name].shape, torch.nan) for name in names}


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("num_readers", [1, 7])
@pytest.mark.parametrize("placed", [0.0, 0.5, 1.0])
def test_every_tensor_arrives(folder: Path, faulty: Faulty, direct: bool, num_readers: int, placed: float) -> None:
    source = faulty(folder)
    rng, entries = random.Random(1), headers(source)
    places = places_for(entries, [name for name in entries if rng.random() < placed])
    readers = make_readers(source, places, num_readers=num_readers, direct=direct)
    assert collect(readers, places) == expected(folder)
    readers.close()
    assert source.open_handles == 0 and readers.most_readers <= num_readers
    assert readers.direct.choice is False or any(is_direct for _, is_direct in source.opened)


def test_transient_errors_and_short_reads_change_nothing(folder: Path, faulty: Faulty) -> None:
    def fault(number: int, offset: int) -> int:
        if number % 3 == 0:
            raise TransientError("it rains")
        return 1000

    source = faulty(folder)
    readers = make_readers(source, {})
    source.fault = fault
    assert collect(readers, {}) == expected(folder)
    assert readers.num_retries > 0
    readers.close()


def test_an_error_reaches_the_caller_and_leaves_no_thread(folder: Path, faulty: Faulty) -> None:
    def fault(number: int, offset: int) -> int | None:
        if number == 9:
            raise CheckpointError("the disk is gone")
        return None

    source = faulty(folder)
    readers = make_readers(source, {})
    source.fault, source.num_reads = fault, 0
    with pytest.raises(CheckpointError, match="the disk is gone"):
        collect(readers, {})
    readers.close()
    assert source.open_handles == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "reader"]


def test_closing_early_leaves_no_thread_and_no_handle(folder: Path, faulty: Faulty) -> None:
    source = faulty(folder)
    readers = make_readers(source, {}, num_readers=5)
    next(readers.filled())
    readers.close()
    assert source.open_handles == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "reader"]


def test_a_reader_that_hangs_is_replaced_and_what_it_brings_is_dropped(folder: Path, faulty: Faulty) -> None:
    hang = threading.Event()

    def fault(number: int, offset: int) -> int | None:
        if number == 4:
            assert hang.wait(60)
        return None

    source = faulty(folder)
    readers = make_readers(source, {})
    readers.stall_seconds = 0.5
    source.fault, source.num_reads = fault, 0
    assert collect(readers, {}) == expected(folder)
    assert readers.num_retries > 0
    hang.set()
    readers.close()
    assert source.open_handles == 0


def test_storage_that_hangs_for_good_is_an_error(folder: Path, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchinfer.loader.readers.JOIN_SECONDS", 0.1)
    hang = threading.Event()

    def fault(number: int, offset: int) -> int | None:
        assert hang.wait(60)
        return None

    source = faulty(folder)
    readers = make_readers(source, {})
    readers.stall_seconds, source.fault = 0.2, fault
    with pytest.raises(
        CheckpointError, match=r"gave nothing of a.* for 0.6 s; \d+ bytes of the load memory are held .*; check"
    ):
        collect(readers, {})
    readers.close()  # does not wait for them
    hang.set()
    deadline = time.monotonic() + 10
    while source.open_handles and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.open_handles == 0


def test_storage_without_direct_reads_is_read_through_the_page_cache(folder: Path, faulty: Faulty) -> None:
    source = faulty(folder)
    readers = make_readers(source, {}, direct=True)

    def fault(number: int, offset: int) -> int | None:
        if source.opened[-1][1]:
            raise DirectUnsupportedError("EINVAL")
        return None

    source.fault = fault
    readers.count.target = readers.count.limit = 1
    assert collect(readers, {}) == expected(folder)
    assert readers.direct.choice is False
    assert sum(is_direct for _, is_direct in source.opened) == 1
    readers.close()


@pytest.mark.parametrize(
    ("choice", "is_network", "is_measured"), [(None, False, False), (None, True, True), (False, False, True)]
)
def test_the_number_of_readers_is_given_while_direct_reads_are_compared_on_a_disk(
    folder: Path, choice: bool | None, is_network: bool, is_measured: bool
) -> None:
    source = FolderSource(folder)
    source.is_network = is_network
    readers = make_readers(source, {})
    readers.count = ReaderCount(2, 16)
    readers.direct.choice = choice
    readers._has_waited = True
    readers.extents.clear()  # nobody is started
    readers._adapt()
    assert (readers.count._started > 0) == is_measured
    assert readers.count.target == (2 if is_measured else PROBE_READERS)
