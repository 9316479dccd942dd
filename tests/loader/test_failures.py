"""The ways in which a load can fail, end to end: each is an error that names it, or changes nothing; nothing is left.

docs/loading.md has the same table for users. Unit tests of the parts have the variants.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader import Checkpoint, LoadOptions, load_weights
from torchinfer.loader.assembly import Assembly
from torchinfer.loader.checkpoint import INDEX
from torchinfer.loader.readers import Readers
from torchinfer.loader.retry import RetryPolicy
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig

Bed = Any  # that of conftest.py
GAVE_UP = r"gave up after 8 attempts in .* \(limits: 8 attempts, 180 s\); check the storage and load again"
ALONE, FOUR = LoadOptions(readers=1), LoadOptions(readers=4)
VERIFIED = LoadOptions(readers=4, verify=True)


@dataclass(frozen=True)
class Row:
    """One way to fail: what is done, and part of the error's message, or of the log's where the load recovers."""

    inject: Callable[[Bed], object]
    message: str
    dtype: torch.dtype = torch.float32
    options: LoadOptions = FOUR


def table(storage: str | None, rows: dict[str, Row]) -> Callable[[Any], Any]:
    """Parametrize a test with rows, on one storage or on both."""

    def decorate(test: Any) -> Any:
        test = pytest.mark.parametrize("row", rows.values(), ids=[name.replace(" ", "-") for name in rows])(test)
        return pytest.mark.parametrize("storage", [storage], indirect=True)(test) if storage else test

    return decorate


def check_error(bed: Bed, row: Row) -> None:
    with pytest.raises(CheckpointError, match=row.message):
        bed.load(row.inject, row.dtype, row.options)
    assert bed.left() == []


def check_recovery(bed: Bed, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    expected = bed.load(lambda bed: None, row.dtype, row.options)
    with caplog.at_level(logging.WARNING, "torchinfer"):
        found = bed.load(row.inject, row.dtype, row.options)
    assert re.search(row.message, caplog.text)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bed.left(kept=[*expected.values(), *found.values()]) == []


# Files that are wrong before the load begins: refused before any tensor is read


def edit(bed: Bed, change: Callable[[dict[str, Any]], object], *, more: bytes = b"") -> None:
    """Change what the first shard's header says of its first tensor; `more` comes behind the file."""
    content = bed.first.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    change(min(header.values(), key=lambda entry: entry["data_offsets"]))
    text = json.dumps(header).encode()
    bed.first.write_bytes(len(text).to_bytes(8, "little") + text + content[data:] + more)


def move(entry: dict[str, Any], num_bytes: int) -> None:
    entry["data_offsets"] = [offset + num_bytes for offset in entry["data_offsets"]]


def set_length(bed: Bed, length: int) -> None:
    bed.first.write_bytes(length.to_bytes(8, "little") + bed.first.read_bytes()[8:])


def flip(path: Path) -> None:
    """Turn the last bit over."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def write_sums(bed: Bed) -> None:
    sums = [f"{google_crc32c.value((bed.folder / shard).read_bytes()):08x}  {shard}\n" for shard in bed.shards]
    (bed.folder / "CRC32C").write_text("".join(sums))


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in tensors.items() if other != name}


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
DAMAGED = {
    "truncated": Row(lambda bed: os.truncate(bed.first, bed.first.stat().st_size - 1), "header describes .* truncated"),
    "header length too small": Row(lambda bed: set_length(bed, 5), "the header of model-1.* is not valid JSON"),
    "header length too large": Row(lambda bed: set_length(bed, 10**9), "has 1000000000 bytes; at most 100000000 are"),
    "header beyond the file": Row(lambda bed: set_length(bed, 50_000), "header has 50000 bytes, but the file ends"),
    "git-lfs pointer": Row(
        lambda bed: bed.first.write_text(LFS_POINTER), "is a git-lfs pointer .*; run 'git lfs pull'"
    ),
    "web page": Row(lambda bed: bed.first.write_text(PAGE), "it is damaged or no safetensors file, download it again"),
    "overlap": Row(lambda bed: edit(bed, lambda entry: move(entry, 4)), "overlaps the tensor before it"),
    "gap": Row(lambda bed: edit(bed, lambda entry: move(entry, 4)), "leaves a hole before it; it must begin at 0"),
    "trailing bytes": Row(lambda bed: edit(bed, lambda entry: None, more=b"abc"), "header describes .*: 3 are extra"),
    "wrong number of bytes": Row(
        lambda bed: edit(bed, lambda entry: entry.update(dtype="F64")), r"has \d+ bytes .*, but F64 of shape .* needs"
    ),
    "missing shard": Row(lambda bed: bed.first.unlink(), f"1 of 4 shards that {INDEX} names are not there: model-1"),
    "missing tensor": Row(
        lambda bed: bed.write(without(bed.tensors, "model.norm.weight")), "1 tensor missing: 'model.norm.weight'"
    ),
    "unexpected tensor": Row(
        lambda bed: bed.write(bed.tensors | {"extra": torch.ones(1)}), "1 tensor unexpected: 'extra'"
    ),
    "value beyond float16": Row(
        lambda bed: bed.write(bed.tensors | {"model.norm.weight": torch.full((16,), 1e6)}),
        "'model.norm.weight' has values from 1000000.0 .*use dtype bfloat16 or float32",
        dtype=torch.float16,
    ),
}


@table(None, DAMAGED)
def test_what_is_wrong_from_the_beginning_is_an_error(bed: Bed, row: Row) -> None:
    row.inject(bed)
    check_error(bed, replace(row, inject=lambda bed: None))


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_a_flipped_bit_is_found_by_a_sums_file(bed: Bed) -> None:
    write_sums(bed)
    flip(bed.first)
    row = Row(lambda bed: None, "1 files do not have their CRC32C: model-1", options=VERIFIED)
    check_error(bed, row)


# Folders that fail while they are read


def fail(bed: Bed, code: int, times: int | None = None) -> None:
    """The first reads, or all, fail with this errno."""

    def action(number: int) -> None:
        if times is None or number <= times:
            raise OSError(code, os.strerror(code))

    bed.on_read(action)


def at_second_read(bed: Bed, action: Callable[[Path], object]) -> None:
    """In the middle of the first shard, do something to all of them."""
    bed.on_read(lambda number: [action(bed.folder / shard) for shard in bed.shards] if number == 2 else None)


def overwrite(path: Path) -> None:
    """With as many other bytes."""
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def fail_check(bed: Bed) -> None:
    """The last look at the first shard fails once."""
    whole, calls = os.fstat, count(1)

    def fstat(descriptor: int) -> os.stat_result:
        if next(calls) == 2:  # the first is that of open
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return whole(descriptor)

    bed.patch.setattr(os, "fstat", fstat)


def put_another_in_its_place(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes()[:-64] + bytes(64))
    os.replace(path.with_suffix(".new"), path)


def stall(bed: Bed, *, is_first_only: bool) -> None:
    """Reads hang; until the load has been given up."""
    given_up = threading.Event()

    def release() -> None:
        given_up.set()
        for thread in bed.reader_threads():
            thread.join(60)

    bed.on_end = release
    bed.patch.setattr("torchinfer.loader.weights.Readers", partial(Readers, stall_seconds=bed.stall_seconds))
    bed.patch.setattr("torchinfer.loader.readers.JOIN_SECONDS", 0.1)
    bed.on_read(lambda number: given_up.wait(60) if number == 1 or not is_first_only else None)


FOLDER_PASSES = {
    "input/output error": Row(lambda bed: fail(bed, errno.EIO, 3), r"Input/output error \(errno 5\); attempt 2"),
    "stale handle": Row(lambda bed: fail(bed, errno.ESTALE, 3), r"Stale file handle \(errno 116\); attempt 2"),
    "stale handle at the end": Row(fail_check, r"Stale file handle \(errno 116\); attempt 2", options=ALONE),
    "stalled read": Row(
        lambda bed: stall(bed, is_first_only=True), r"gave 0 bytes of \[.*\) in 0.3 s: another reader tries"
    ),
}
FOLDER_STAYS = {
    "input/output error": Row(lambda bed: fail(bed, errno.EIO), rf"Input/output error \(errno 5\); {GAVE_UP}"),
    "stale handle": Row(lambda bed: fail(bed, errno.ESTALE), rf"Stale file handle \(errno 116\); {GAVE_UP}"),
    "dead FUSE daemon": Row(lambda bed: fail(bed, errno.ENOTCONN), "errno 107.*FUSE daemon .* died: mount it again"),
    "no permission": Row(lambda bed: fail(bed, errno.EACCES), "errno 13.*permission is missing: check the mode, or"),
    "stalled reads": Row(
        lambda bed: stall(bed, is_first_only=False), "gave nothing of model-1.* for 0.9 s; check the storage"
    ),
    "file removed": Row(lambda bed: bed.first.unlink(), "cannot open .*errno 2.*; check that it exists"),
    "truncated": Row(
        lambda bed: at_second_read(bed, lambda path: os.truncate(path, 100)),
        "model-1.* ends at byte .* are needed; it was cut off",
        options=ALONE,
    ),
    "overwritten": Row(lambda bed: at_second_read(bed, overwrite), "model-1.* was replaced or changed", options=ALONE),
    "replaced": Row(
        lambda bed: at_second_read(bed, put_another_in_its_place), "model-2.* was replaced or changed", options=ALONE
    ),
}


@table("folder", FOLDER_PASSES)
def test_folders_that_fail_for_a_while(bed: Bed, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    check_recovery(bed, row, caplog)


@table("folder", FOLDER_STAYS)
def test_folders_that_fail(bed: Bed, row: Row) -> None:
    check_error(bed, row)


# Cloud Storage that fails while it is read


def replace_objects(bed: Bed) -> None:
    assert bed.gcs is not None
    for shard in bed.shards:
        bed.gcs.replace(f"bucket/{shard}")


def replace_at_retry(bed: Bed) -> None:
    """Each object is replaced when the first half of one has been read."""
    bed.on_retry = lambda: replace_objects(bed)
    bed.behave(fault="truncate", every=1000)


def close(bed: Bed) -> None:
    assert bed.gcs is not None
    bed.gcs.close()


def behave(**behaviour: Any) -> Callable[[Bed], None]:
    return lambda bed: bed.behave(**behaviour)


def no_answer(bed: Bed) -> None:
    """With the times of a load, scaled: three streams stall in the time of one reader."""
    bed.patch.setattr("torchinfer.loader.weights.Readers", partial(Readers, stall_seconds=3 * bed.stall_seconds))
    bed.behave(latency=60)


GCS_PASSES = {
    **{
        f"{status} for a while": Row(behave(fault=status, every=2), f"Cloud Storage answered {status}: .*; attempt 2")
        for status in ("408", "429", "500", "503")
    },
    "truncated body": Row(behave(fault="truncate", every=2), r"the answer ended \d+ bytes early; attempt 2"),
    "stalled stream": Row(behave(fault="stall", every=2), "no byte came for 0.3 s; attempt 2 follows"),
}
GCS_STAYS = {
    **{
        status: Row(behave(fault=status), f"Cloud Storage answered {status}: injected; {GAVE_UP}")
        for status in ("408", "429", "500", "503")
    },
    **{
        status: Row(behave(fault=status), rf"cannot read gs://bucket/model-.*: {status}: .*roles/storage.objectViewer")
        for status in ("401", "403")
    },
    "404": Row(behave(fault="404"), "gs://bucket/model-.* was replaced or changed while it was read"),
    "no answer": Row(no_answer, r"gave nothing of model-.* for 2.7 s \(last error: no byte came for 0.3 s\); check"),
    "server gone": Row(close, f"ConnectionRefusedError: .*; {GAVE_UP}"),
    "replaced": Row(replace_objects, "gs://bucket/model-.* was replaced or changed while it was read"),
    "replaced in the middle": Row(replace_at_retry, "gs://bucket/model-1.* was replaced or changed", options=ALONE),
    "flipped bit": Row(behave(fault="flip", every=1000), "1 files do not have their CRC32C", options=VERIFIED),
}


@table("gs", GCS_PASSES)
def test_cloud_storage_that_fails_for_a_while(bed: Bed, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    check_recovery(bed, row, caplog)


@table("gs", GCS_STAYS)
def test_cloud_storage_that_fails(bed: Bed, row: Row) -> None:
    check_error(bed, row)


# Ctrl-C


def interrupt_while_placing(bed: Bed) -> None:
    whole = Assembly.complete

    def complete(assembly: Assembly, pieces: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        whole(assembly, pieces)

    bed.patch.setattr(Assembly, "complete", complete)


def interrupt_while_reading(bed: Bed, num_before: int = 0, num_readers: int = 4) -> None:
    """When all readers have failed and wait for their next attempt, and the main thread waits for them; after
    `num_before` reads that succeed."""
    bed.patch.setattr(RetryPolicy, "delay", lambda policy, failures: 600.0)
    calls = count(1)

    def action(number: int) -> None:
        if number <= num_before:
            return
        if next(calls) == num_readers:
            os.kill(os.getpid(), signal.SIGINT)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    bed.on_read(action)


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
@pytest.mark.parametrize("interrupt", [interrupt_while_placing, interrupt_while_reading])
def test_ctrl_c_leaves_nothing(bed: Bed, interrupt: Callable[[Bed], None]) -> None:
    with pytest.raises(KeyboardInterrupt):
        bed.load(interrupt, torch.float32, FOUR)
    assert bed.left() == []


@pytest.mark.parametrize("num_readers", [1, 4], ids=["of a disk", "over a network"])
@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_ctrl_c_while_headers_are_read_leaves_nothing(
    bed: Bed, num_readers: int, request: pytest.FixtureRequest
) -> None:
    if num_readers > 1:
        request.getfixturevalue("network_mounts")
    interrupt_while_reading(bed, 2, num_readers)  # after config.json and the index
    with pytest.raises(KeyboardInterrupt):
        Checkpoint.open(bed.folder)
    deadline = time.monotonic() + 10  # Python takes a thread for ended whose join was interrupted
    while bed.reader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bed.left() == []


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_a_model_whose_load_was_interrupted_can_be_loaded_again(bed: Bed) -> None:
    checkpoint = Checkpoint.open(bed.folder)
    with torch.device("meta"):
        model = build_model(ModelConfig.from_dict(checkpoint.config))
    with bed.patch.context() as patch:
        interrupt_while_placing(replace(bed, patch=patch))
        with pytest.raises(KeyboardInterrupt):
            load_weights(model, checkpoint, torch.float32, torch.device("cpu"), progress=False)
    load_weights(model, checkpoint, torch.float32, torch.device("cpu"), progress=False)
    expected = bed.load(lambda bed: None, torch.float32, FOUR)
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
