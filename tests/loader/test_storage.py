"""Which source an address means."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchinfer.errors import CheckpointError
from torchinfer.fake_gcs import FakeGcs
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.gcs import GcsSource
from torchinfer.loader.storage import open_source


def test_a_path_is_a_folder(tmp_path: Path) -> None:
    assert isinstance(open_source(tmp_path), FolderSource)


@pytest.mark.parametrize("address", ["gs://bucket/model", Path("gs://bucket/model")])
def test_gs_is_cloud_storage(address: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket" / "model").mkdir(parents=True)
    (tmp_path / "bucket" / "model" / "config.json").write_text("{}")
    with FakeGcs(tmp_path) as gcs:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
        source = open_source(address)
    assert isinstance(source, GcsSource)
    assert source.names() == ["config.json"]


def test_an_address_without_a_bucket_is_refused_and_not_taken_for_a_folder() -> None:
    with pytest.raises(CheckpointError, match="'gs:' is not an address in Cloud Storage"):
        open_source(Path("gs://"))
