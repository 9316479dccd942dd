"""The tokenizer of a checkpoint: read in place from a disk, copied from network storage."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchinfer.errors import CheckpointError
from torchinfer.fake_gcs import FakeGcs
from torchinfer.loader.mount import Mount
from torchinfer.tokenizer import Tokenizer
from torchinfer.tokenizer_files import load_tokenizer

MODEL = Path(__file__).parents[1] / "recipes" / "tiny-llama"
TEXT = "The quick brown fox, twice: größer 🙂"
KINDS = ("disk", "mount", "bucket")
COPIED = ("mount", "bucket")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bucket's folder with the files of a tokenizer, and others."""
    found = tmp_path / "root" / "bucket"
    found.mkdir(parents=True)
    for file in MODEL.glob("*.json"):
        shutil.copy(file, found)
    (found / "model.safetensors").write_bytes(bytes(100))
    return found


@pytest.fixture
def address(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where it lies: on this disk, on a mount over a network, or in a bucket."""
    with contextlib.ExitStack() as stack:
        if request.param == "mount":
            mount = Mount("0:0", "/", "fuse.gcsfuse", "bucket", ())
            monkeypatch.setattr("torchinfer.loader.folder.mount_of", lambda path: mount)
        elif request.param == "bucket":
            gcs = stack.enter_context(FakeGcs(folder.parent))
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
        yield "gs://bucket" if request.param == "bucket" else str(folder)


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The files that each tokenizer was made of, where they were copied; the folder of copies is empty in the end."""
    found: list[list[str]] = []
    whole = Tokenizer.from_folder

    def from_folder(path: str | Path, *, address: str | None = None) -> Tokenizer | None:
        if Path(path).is_relative_to(tmp_path / "temporary"):
            found.append(sorted(file.name for file in Path(path).iterdir()))
        return whole(path, address=address)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(Tokenizer, "from_folder", from_folder)
    return found


@pytest.mark.parametrize("address", KINDS, indirect=True)
def test_it_is_the_same_wherever_it_lies(address: str) -> None:
    found, expected = load_tokenizer(address), Tokenizer.from_folder(MODEL)
    assert found is not None and expected is not None
    assert found.encode(TEXT) == expected.encode(TEXT)


@pytest.mark.parametrize("address", ["disk"], indirect=True)
def test_from_a_disk_nothing_is_copied(address: str, copies: list[list[str]]) -> None:
    load_tokenizer(address)
    assert copies == []


@pytest.mark.parametrize("address", COPIED, indirect=True)
def test_over_a_network_its_files_are_copied_and_no_weights(
    address: str, copies: list[list[str]], tmp_path: Path
) -> None:
    load_tokenizer(address)
    names = {file.name for file in MODEL.glob("*.json")} - {"model.safetensors.index.json"}
    assert copies == [sorted(names)]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("address", KINDS, indirect=True)
def test_where_there_are_no_files_there_is_none(address: str, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(address) is None


@pytest.mark.parametrize("address", KINDS, indirect=True)
def test_errors_name_the_address_and_not_the_copies(address: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"cannot load the tokenizer of {address}: "):
        load_tokenizer(address)


@pytest.mark.parametrize("address", COPIED, indirect=True)
def test_a_file_that_is_no_tokenizer_s_is_refused(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchinfer.tokenizer_files.MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"config.json has \d+ bytes; at most 100 are allowed"):
        load_tokenizer(address)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere' does not exist; pass the folder"):
        load_tokenizer(tmp_path / "nowhere")
