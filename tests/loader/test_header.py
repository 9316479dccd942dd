"""safetensors headers: what the library writes is read, and no lie is believed."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchinfer.errors import CheckpointError
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.header import DTYPES, MAX_HEADER_BYTES, TensorEntry, read_header

FILE = "model.safetensors"
FLOATS = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def read(folder: Path) -> list[TensorEntry]:
    source = FolderSource(folder)
    return read_header(source, FILE, source.stat(FILE))


def floats(**changes: object) -> dict[str, object]:
    return FLOATS | changes


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_every_dtype_of_the_library_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.zeros(6, 8, dtype=torch.uint8).view(dtype)
    save_file({"x": tensor}, tmp_path / FILE)
    (entry,) = read(tmp_path)
    assert (entry.dtype, entry.shape, entry.num_bytes) == (dtype, tuple(tensor.shape), 48)
    assert entry.offset + entry.num_bytes == os.path.getsize(tmp_path / FILE)


def test_metadata_and_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "plain": torch.ones(3)}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    shapes = {entry.name: entry.shape for entry in read(tmp_path)}
    assert shapes == {"scalar": (), "empty": (0, 3), "plain": (3,)}


def test_a_file_without_tensors_is_read(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    write_raw(tmp_path / FILE, {})
    assert read(tmp_path) == []


CASES = {
    "dtype": ({"x": floats(dtype="F4")}, r"'x' has dtype 'F4'; known are BOOL, U8"),
    "dtype not a string": ({"x": floats(dtype=["F32"])}, r"dtype \['F32'\]"),
    "missing field": ({"x": {"dtype": "F32", "shape": [2]}}, "must have exactly dtype, shape and data_offsets"),
    "field too many": ({"x": floats(stride=[1])}, "must have exactly"),
    "no object": ({"x": 5}, "'x' must have exactly"),
    "negative size": ({"x": floats(shape=[-1, 4])}, r"shape \[-1, 4\]"),
    "fraction": ({"x": floats(shape=[2.0, 2])}, r"shape \[2.0, 2\]"),
    "true as size": ({"x": floats(shape=[True, 4])}, r"shape \[True, 4\]"),
    "too many dimensions": ({"x": floats(shape=[1] * 65)}, "at most 64 sizes"),
    "size beyond 64 bits": ({"x": floats(shape=[2**63, 0])}, r"shape \[9223372036854775808, 0\]"),
    "product overflow": ({"x": floats(shape=[2**32, 2**32])}, r"more than 2\^63 bytes of F32"),
    "overflow to zero": ({"x": floats(shape=[2**62, 2**62, 0], data_offsets=[0, 0])}, r"more than 2\^63 bytes"),
    "too few bytes": ({"x": floats(data_offsets=[0, 12])}, r"has 12 bytes .* shape \[2, 2\] needs 16"),
    "backward": ({"x": floats(data_offsets=[16, 0])}, "begin <= end"),
    "three offsets": ({"x": floats(data_offsets=[0, 8, 16])}, r"data_offsets \[0, 8, 16\]"),
    "overlap": (
        {"x": floats(), "y": floats(shape=[2], data_offsets=[8, 16])},
        r"'y' begins at data byte 8 and overlaps the tensor before it; it must begin at 16",
    ),
    "same place": ({"x": floats(), "y": floats()}, "'y' begins at data byte 0 and overlaps"),
    "hole": ({"x": floats(shape=[2], data_offsets=[8, 16])}, "'x' begins at data byte 8 and leaves a hole"),
    "beyond the end": ({"x": floats(shape=[8], data_offsets=[0, 32])}, "header describes .*: it is truncated"),
    "extra bytes": ({"x": floats(shape=[2], data_offsets=[0, 8])}, "8 are extra"),
    "metadata": ({"__metadata__": {"epoch": 3}, "x": FLOATS}, "__metadata__ must map strings to strings"),
    "a list": (b'{"x": [1]}', "'x' must have exactly"),
    "not an object": (b"[1, 2]", r"begins with b'\[1, 2\]'; it must begin with '\{'"),
    "leading blank": (b" {}", r"begins with b' \{\}'"),
    "no JSON": (b'{"x": }', "is not valid JSON: Expecting value"),
    "no UTF-8": (b'{"\xff": 1}', "is not valid JSON: 'utf-8' codec"),
    "UTF-16": ('{"x": {}}'.encode("utf-16-le"), "is not valid JSON"),
    "NaN": (b'{"x": NaN}', "NaN is not JSON"),
    "same name twice": (b'{"x": %b, "x": %b}' % ((json.dumps(FLOATS).encode(),) * 2), "key 'x' stands twice"),
    "same field twice": (b'{"x": {"dtype": "F32", "dtype": "F64"}}', "key 'dtype' stands twice"),
    "depth": (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "endless number": (b'{"x": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
}


@pytest.mark.parametrize(("header", "message"), CASES.values(), ids=list(CASES))
def test_a_lying_header_is_refused(
    tmp_path: Path, write_raw: Callable[..., Path], header: object, message: str
) -> None:
    write_raw(tmp_path / FILE, header, bytes(16))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


LENGTHS = {
    "larger than the file": (1000, "header has 1000 bytes, but the file ends after 18"),
    "larger than allowed": (MAX_HEADER_BYTES + 1, "header has 100000001 bytes; at most 100000000"),
    "largest": (2**64 - 1, "header has 18446744073709551615 bytes"),
    "cut": (1, r"is not valid JSON"),
    "nothing": (0, "begins with b''"),
}


@pytest.mark.parametrize(("length", "message"), LENGTHS.values(), ids=list(LENGTHS))
def test_a_lying_header_length_is_refused(
    tmp_path: Path, write_raw: Callable[..., Path], length: int, message: str
) -> None:
    write_raw(tmp_path / FILE, {}, bytes(16), length)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_a_header_length_is_checked_before_memory_is_taken(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    write_raw(tmp_path / FILE, {}, bytes(16), MAX_HEADER_BYTES)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="truncated"):
        read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_length_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / FILE).write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"has {size} bytes; a safetensors file has at least 8"):
        read(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3), "y": torch.ones(5)}, tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    for size in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"git-lfs pointer of 64 bytes.*git lfs pull"):
        read(tmp_path)


def test_all_problems_come_at_once_and_many_are_counted(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    write_raw(tmp_path / FILE, {f"x{number}": floats(dtype="F4") for number in range(30)})
    with pytest.raises(CheckpointError, match=r"(?s)'x0'.*'x19'.*and 10 more") as caught:
        read(tmp_path)
    assert "'x20'" not in str(caught.value)


def test_an_absurd_name_is_cut_in_the_message(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    write_raw(tmp_path / FILE, {"n" * 100_000: floats(dtype="F4")})
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 1000
