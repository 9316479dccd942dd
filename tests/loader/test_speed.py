"""Measuring a source: what is read, by whom, and what is left alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from torchinfer.errors import CheckpointError
from torchinfer.loader.folder import FileReader, FolderSource
from torchinfer.loader.source import ALIGNMENT, DirectUnsupportedError, FileStat, TransientError
from torchinfer.loader.speed import Piece, Row, Speed, SpeedTest
from torchinfer.loader.stall import StalledError

MIB = 1 << 20
OnRead = Callable[[Callable[[int], object]], None]
HangIn = Callable[[str, Path], None]


class Recorder(FolderSource):
    """A folder that remembers what was opened and read; direct reads work or fail as told, on any filesystem."""

    def __init__(self, path: Path, *, has_direct: bool = True, num_failures: int = 0) -> None:
        super().__init__(path)
        self.has_direct, self.num_failures = has_direct, num_failures
        self.opened: list[tuple[str, bool]] = []
        self.reads: list[tuple[str, int, int, bool]] = []  # name, begin, end, direct

    def open(self, name: str, stat: FileStat, *, end: int | None = None, direct: bool = False) -> FileReader:
        if direct and not self.has_direct:
            raise DirectUnsupportedError("no direct reads")
        self.opened.append((name, direct))
        return _RecordingReader(self, name, stat, direct)


class _RecordingReader(FileReader):
    def __init__(self, source: Recorder, name: str, stat: FileStat, is_direct: bool) -> None:
        super().__init__(source.path / name, stat, direct=False)
        self._source, self._name, self._mode = source, name, is_direct

    def read_some(self, offset: int, buffer: memoryview) -> int:
        if self._source.num_failures:
            self._source.num_failures -= 1
            raise TransientError("it hiccuped")
        count = super().read_some(offset, buffer)
        self._source.reads.append((self._name, offset, offset + count, self._mode))
        return count


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files: 3 MiB and a bit, 2 MiB, and one that is too small to count."""
    (tmp_path / "a.safetensors").write_bytes(bytes(3 * MIB + 5))
    (tmp_path / "b.safetensors").write_bytes(bytes(2 * MIB))
    (tmp_path / "config.json").write_bytes(bytes(100))
    return tmp_path


def measured(source: FolderSource) -> Speed:
    return SpeedTest(source, seconds=5.0).run()


def test_a_row_is_the_whole_blocks_of_all_files() -> None:
    stats = [FileStat(size, "1") for size in (2 * ALIGNMENT + 1, ALIGNMENT - 1, 3 * ALIGNMENT)]
    row = Row([("a", stats[0]), ("b", stats[1]), ("c", stats[2])])
    assert row.num_bytes == 5 * ALIGNMENT
    assert row.cut(ALIGNMENT, 4 * ALIGNMENT) == [
        Piece("a", stats[0], ALIGNMENT, 2 * ALIGNMENT),
        Piece("c", stats[2], 0, 2 * ALIGNMENT),
    ]


def test_each_number_of_readers_is_measured_buffered_and_direct(folder: Path) -> None:
    speed = measured(Recorder(folder))
    assert [(one.num_readers, one.direct) for one in speed.measurements] == [
        (1, False), (1, True), (4, False), (4, True), (16, False), (16, True),
    ]  # fmt: skip


def test_all_measurements_have_a_rate(folder: Path) -> None:
    assert all(one.rate > 0 for one in measured(Recorder(folder)).measurements)


def test_files_below_a_mebibyte_are_left_alone(folder: Path) -> None:
    source = Recorder(folder)
    speed = measured(source)
    assert {name for name, _ in source.opened} == {"a.safetensors", "b.safetensors"}
    assert (speed.num_files, speed.num_bytes) == (2, 5 * MIB + 5)


def test_no_byte_is_measured_twice(folder: Path) -> None:
    source = Recorder(folder)
    measured(source)
    ranges = sorted(source.reads[:-2])  # at last the first part is read twice again, for the page cache
    assert all(one[0] != other[0] or one[2] <= other[1] for one, other in pairwise(ranges))


def test_direct_reads_are_aligned(folder: Path) -> None:
    source = Recorder(folder)
    measured(source)
    ends = [edge for _, begin, end, direct in source.reads if direct for edge in (begin, end)]
    assert ends and all(edge % ALIGNMENT == 0 for edge in ends)


def test_each_reader_has_a_handle_of_its_own(folder: Path) -> None:
    source = Recorder(folder)
    SpeedTest(source, 5.0).measure([[piece] for piece in _blocks(source, 16)], direct=False)
    assert len(source.opened) == 16


def _blocks(source: FolderSource, count: int) -> list[Piece]:
    stat = source.stat("a.safetensors")
    return [Piece("a.safetensors", stat, start * ALIGNMENT, (start + 1) * ALIGNMENT) for start in range(count)]


def test_time_out_ends_a_measurement_after_the_read_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(80 * MIB))
    source = Recorder(tmp_path)
    stat = source.stat("file")
    found = SpeedTest(source, 1e-9).measure([[Piece("file", stat, 0, 80 * MIB)]], direct=False)
    assert found.num_bytes == 8 * MIB


def test_without_direct_reads_there_are_buffered_ones(folder: Path) -> None:
    speed = measured(Recorder(folder, has_direct=False))
    assert [one.direct for one in speed.measurements] == [False] * 3


def test_reads_that_failed_once_are_counted(folder: Path) -> None:
    assert measured(Recorder(folder, num_failures=1)).num_retries == 1


def test_the_same_bytes_are_read_again(folder: Path) -> None:
    again = measured(Recorder(folder)).again_rate
    assert again is not None and again > 0


def test_a_file_of_one_mebibyte_is_enough(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    assert len(measured(Recorder(tmp_path)).measurements) == 6


def test_a_folder_of_small_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB - 1))
    with pytest.raises(CheckpointError, match=r"has 1 file\(s\), none of which has 1 MiB; doctor needs a file of at"):
        SpeedTest(FolderSource(tmp_path), 1.0)


def test_an_empty_folder_on_gcsfuse_may_lack_implicit_dirs(tmp_path: Path) -> None:
    source = FolderSource(tmp_path)
    source.kind = "fuse.gcsfuse"
    with pytest.raises(CheckpointError, match="implicit-dirs"):
        SpeedTest(source, 1.0)


def test_a_file_that_changes_meanwhile_is_an_error(folder: Path) -> None:
    test = SpeedTest(FolderSource(folder), 1.0)
    (folder / "b.safetensors").write_bytes(bytes(MIB))
    with pytest.raises(CheckpointError, match=r"b\.safetensors was replaced or changed"):
        test.run()
    assert readers_left() == []


def test_an_error_of_one_reader_of_several_is_an_error(folder: Path) -> None:
    source = Recorder(folder)
    test = SpeedTest(source, 5.0)
    parts = [*([piece] for piece in _blocks(source, 3)), [Piece("b.safetensors", FileStat(MIB, "another"), 0, MIB)]]
    with pytest.raises(CheckpointError, match=r"b\.safetensors was replaced or changed"):
        test.measure(parts, direct=False)


# Storage that hangs. Without direct ones, 5 reads are of first bytes, then 1, 4 and 16 readers have one each, then two
# are again.


@pytest.mark.parametrize(
    ("stalled", "message"),
    [
        (1, "cannot read b.safetensors of {folder} with 1 reader: nothing came for 0.2 s; check .* and try again$"),
        (
            6,
            "a.safetensors of {folder} with 1 reader: nothing .* again; measured before: [0-9.]+ ms to the first byte$",
        ),
        (7, "with 4 readers: only 491520 bytes came .* byte, [0-9.]+ GB/s with 1 reader$"),
        (28, "cannot read a.safetensors of {folder} again: only .* GB/s with 16 readers$"),
    ],
    ids=["first byte", "one reader", "one of four readers", "again"],
)
def test_a_read_that_hangs_is_given_up_with_what_was_measured_before(
    folder: Path, on_read: OnRead, hang: threading.Event, short_stalls: None, stalled: int, message: str
) -> None:
    on_read(lambda number: hang.wait(60) if number == stalled else None)
    with pytest.raises(StalledError, match=message.format(folder=folder)):
        measured(Recorder(folder, has_direct=False))


@pytest.mark.parametrize(
    ("call", "path", "message"),
    [
        ("scandir", "", "cannot list {folder}: nothing came for 0.2 s; check"),
        ("stat", "b.safetensors", "cannot look at {folder}/b.safetensors: nothing came for 0.2 s; check"),
        ("open", "b.safetensors", "cannot read b.safetensors of {folder} with 1 reader: nothing came for 0.2 s; check"),
    ],
)
def test_calls_of_the_system_that_hang_are_given_up(
    folder: Path, hang_in: HangIn, short_stalls: None, call: str, path: str, message: str
) -> None:
    source = Recorder(folder)
    hang_in(call, folder / path)
    with pytest.raises(StalledError, match=message.format(folder=folder)):
        measured(source)


def test_ctrl_c_does_not_wait_for_a_read_that_hangs(folder: Path, on_read: OnRead, hang: threading.Event) -> None:
    has_ended = threading.Event()

    def action(number: int) -> None:
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)
            hang.wait(60)
            has_ended.set()

    on_read(action)
    with pytest.raises(KeyboardInterrupt):
        measured(Recorder(folder, has_direct=False))
    assert not has_ended.is_set()


def readers_left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("header", "doctor"))]
