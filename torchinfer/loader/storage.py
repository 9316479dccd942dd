"""Which source an address means, and what is in it."""

from __future__ import annotations

from pathlib import Path

from torchinfer.loader.folder import FolderSource
from torchinfer.loader.gcs import GcsSource, is_gcs_address
from torchinfer.loader.source import Source
from torchinfer.loader.stall import unless_stalled


def open_source(path: str | Path) -> Source:
    """The source of a folder, or of gs://bucket/prefix; waits for a mount as long as it hangs.

    Raises:
        CheckpointError: there is no such folder or prefix, or it cannot be listed.
    """
    return GcsSource(path) if is_gcs_address(path) else FolderSource(path)


def list_source(path: str | Path) -> tuple[Source, list[str]]:
    """The source of an address and the names of its files, sorted.

    Raises:
        CheckpointError: as `open_source`.
        StalledError: the storage hangs.
    """
    source = unless_stalled(f"open {path}", lambda trial: open_source(path))
    return source, unless_stalled(f"list {path}", lambda trial: source.names())
