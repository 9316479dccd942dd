"""Which source an address means."""

from __future__ import annotations

from pathlib import Path

from torchinfer.loader.folder import FolderSource
from torchinfer.loader.gcs import GcsSource, is_gcs_address
from torchinfer.loader.source import Source


def open_source(path: str | Path) -> Source:
    """The source of a folder, or of gs://bucket/prefix.

    Raises:
        CheckpointError: there is no such folder or prefix, or it cannot be listed.
    """
    return GcsSource(path) if is_gcs_address(path) else FolderSource(path)
