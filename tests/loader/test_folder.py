"""Folders and byte ranges."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from torchinfer.errors import CheckpointError
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.mount import Mount
from torchinfer.loader.retry import PersistentReader, RetryPolicy
from torchinfer.loader.source import is_inside
from torchinfer.loader.stall import read_file


def persistent(folder: Path) -> PersistentReader:
    source = FolderSource(folder)
    return PersistentReader(source, "file", source.stat("file"))


@pytest.mark.parametrize("name", ["absent", "absent\0", "absent/deeper"])
def test_a_path_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"absent.*does not exist; pass the folder"):
        FolderSource(tmp_path / name)


def test_an_empty_path_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="the path is empty; pass the folder that holds"):
        FolderSource("")


@pytest.mark.parametrize(("path", "has_advice"), [("org/Model-7B", True), ("/org/model", False), ("model", False)])
def test_what_may_be_a_name_on_the_hub_gets_advice(
    path: str, has_advice: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as found:
        FolderSource(path)
    assert ("hf download NAME --local-dir FOLDER" in str(found.value)) == has_advice


def test_a_path_that_is_too_long_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="errno 36"):
        FolderSource("x" * 5000)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is a file; .* it: {tmp_path}$"):
        FolderSource(tmp_path / "model.safetensors")


def test_names_are_sorted_files_without_folders(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert FolderSource(tmp_path).names() == ["a", "b"]


def test_a_byte_range_fills_the_given_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    buffer = bytearray(10)
    with persistent(tmp_path) as reader:
        reader.read_into(42, memoryview(buffer))
    assert bytes(buffer) == bytes(range(42, 52))


def test_a_range_beyond_the_end_says_where_the_file_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with (
        persistent(tmp_path) as reader,
        pytest.raises(CheckpointError, match=r"ends at byte 100, but bytes \[95, 105\)"),
    ):
        reader.read_into(95, memoryview(bytearray(10)))


def test_a_read_in_small_pieces_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    whole_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole_read(fd, [buffers[0][:7]], offset))
    assert read_file(FolderSource(tmp_path), "file", 100) == bytes(range(100))


def test_a_reader_closes_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    source = FolderSource(tmp_path)
    with source.open("file", source.stat("file")):
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_small_file_that_is_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(bytes(11))
    with pytest.raises(CheckpointError, match=r"config\.json has 11 bytes; at most 10"):
        read_file(FolderSource(tmp_path), "config.json", 10)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is not a regular file"):
        read_file(FolderSource(tmp_path), "pipe", 10)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "a\0b", "\ud800"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    assert not is_inside(name)
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        FolderSource(tmp_path).stat(name)


@pytest.mark.parametrize("name", ["a", "a b", "sub/a.safetensors", "..a", "模型.safetensors"])
def test_other_names_are_allowed(name: str) -> None:
    assert is_inside(name)


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blob")
    source = FolderSource(tmp_path / "snapshot")
    assert source.names() == ["model.safetensors"]
    assert read_file(source, "model.safetensors", 100) == b"content"


def test_an_error_of_the_system_is_reported_with_its_number(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent: No such file or directory \(errno 2\)"):
        FolderSource(tmp_path).stat("absent")


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_listing_survives_what_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "file").touch()
    whole, failures = getattr(os, call), iter([errno.EIO, errno.ESTALE])

    def failing(*arguments: object, **options: object) -> object:
        for number in failures:
            raise OSError(number, os.strerror(number))
        return whole(*arguments, **options)

    monkeypatch.setattr(RetryPolicy, "delay", lambda self, failures: 0.0)
    monkeypatch.setattr(os, call, failing)
    source = FolderSource(tmp_path)
    assert source.names() == ["file"] and source.stat("file").size == 0


def test_listing_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(tmp_path)

    def failing(path: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(RetryPolicy, "delay", lambda self, failures: 0.0)
    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(
        CheckpointError, match=r"cannot list .*: Input/output error \(errno 5\); gave up after 5 attempts"
    ):
        source.names()


def replace_keeping_size_and_time(path: Path) -> None:
    status = path.stat()
    path.with_suffix(".new").write_bytes(path.read_bytes()[::-1])
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_suffix(".new"), path)


def test_a_file_that_was_replaced_by_one_of_the_same_size_and_time_is_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with persistent(tmp_path) as reader:
        replace_keeping_size_and_time(tmp_path / "file")
        with pytest.raises(CheckpointError, match="file was replaced or changed while it was read"):
            reader.read_into(0, memoryview(bytearray(10)))


def test_another_owner_or_mode_does_not_make_another_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with persistent(tmp_path) as reader:
        (tmp_path / "file").chmod(0o640)
        os.link(tmp_path / "file", tmp_path / "link")
        reader.read_into(0, memoryview(bytearray(10)))
        reader.check()


@pytest.mark.parametrize(
    ("kind", "is_pinned"), [("ext4", True), ("nfs4", True), ("fuse.gcsfuse", False), ("9p", False)]
)
def test_an_inode_pins_a_file_where_it_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_pinned: bool
) -> None:
    """A FUSE daemon may number a file anew when it is looked up again."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    mount = Mount("0:0", "/", kind, "none", ())
    monkeypatch.setattr("torchinfer.loader.folder.mount_of", lambda path: mount)
    with persistent(tmp_path) as reader:
        replace_keeping_size_and_time(tmp_path / "file")
        with pytest.raises(CheckpointError, match="replaced") if is_pinned else contextlib.nullcontext():
            reader.read_into(0, memoryview(bytearray(10)))
