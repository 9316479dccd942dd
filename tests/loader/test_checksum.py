"""CRC32C of files, put together from parts in any order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchinfer.errors import CheckpointError
from torchinfer.loader.checksum import SUMS, Checksums, Part, add_part, combine, crc32c, read_sums
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.source import FileStat


def octets(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("content", "expected"), [(bytes(32), 0x8A9136AA), (bytes([255] * 32), 0x62A8AB43), (bytes(range(32)), 0x46DD794E)]
)
def test_the_examples_of_the_rfc(content: bytes, expected: int) -> None:
    assert crc32c(octets(content)) == expected  # RFC 3720, section B.4


def test_parts_make_the_whole() -> None:
    rng = random.Random(0)
    for _ in range(50):
        first, second = (rng.randbytes(rng.randrange(0, 300)) for _ in range(2))
        combined = combine(crc32c(octets(first)), crc32c(octets(second)), len(second))
        assert combined == crc32c(octets(first + second))


def test_neighbouring_parts_are_one_and_others_are_not() -> None:
    content = random.Random(2).randbytes(1000)
    parts: list[Part] = []
    for begin, end in ((100, 300), (300, 300), (300, 450), (500, 600)):
        add_part(parts, begin, octets(content[begin:end]))
    assert parts == [(100, 450, crc32c(octets(content[100:450]))), (500, 600, crc32c(octets(content[500:600])))]


def test_files_are_checked_whatever_the_order_of_their_parts() -> None:
    content = random.Random(1).randbytes(1000)
    sums = Checksums({"a": crc32c(octets(content)), "b": 7})
    stats = {"a": FileStat(1000, "")}
    parts: list[Part] = []
    for begin in (400, 0, 700):
        add_part(parts, begin, octets(content[begin : {400: 700, 0: 400, 700: 1000}[begin]]))
    sums.add("a", *parts)
    sums.check(stats)
    sums.add("b", (0, 3, crc32c(octets(b"xyz"))))
    with pytest.raises(CheckpointError, match=r"1 files do not have their CRC32C: b has [0-9a-f]{8}, 00000007 is"):
        sums.check({**stats, "b": FileStat(3, "")})


def test_sums_come_from_the_storage_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / SUMS).write_text("0000002a  a\n000000ff  sub/b\n")
    source = FolderSource(tmp_path)
    stats = {"a": FileStat(1, "", crc32c=5), "sub/b": FileStat(1, "")}
    assert read_sums(source, stats) == {"a": 5, "sub/b": 255}


def test_a_file_without_a_sum_is_an_error(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"nothing to verify model.safetensors .* 1 files have no CRC32C; write"):
        read_sums(FolderSource(tmp_path), {"model.safetensors": FileStat(1, "")})


def test_a_malformed_sums_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / SUMS).write_text("0000002a  a\nnonsense\n")
    with pytest.raises(CheckpointError, match=r"line 2 of CRC32C is 'nonsense'; '<8 hex digits>"):
        read_sums(FolderSource(tmp_path), {"a": FileStat(1, "")})
