"""The logits of the reference, on disk, so that one model at a time is in memory.

The file has no name: it is gone when the process is, however that ends. Its space is reserved before it is used. It is
read and written, not mapped: under a map a disk's error would be a signal and not an exception.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer.errors import ConfigError

SMALLEST = float(np.finfo(np.float16).min)


def needed_bytes(num_rows: int, vocab_size: int, dtype: str) -> int:
    """Size of a store."""
    return num_rows * vocab_size * np.dtype(dtype).itemsize


def space_problems(num_bytes: int, folder: str | Path | None) -> list[str]:
    """Why a store of this size does not fit, if so."""
    path = Path(folder or tempfile.gettempdir())
    if not path.is_dir():
        return [f"scratch={str(path)!r} must be a folder that is there"]
    free = shutil.disk_usage(path).free
    if num_bytes <= free:
        return []
    return [
        f"the reference's logits take {num_bytes / 1e9:.2f} GB, but {path} has {free / 1e9:.2f} GB free; lower "
        "max_tokens, set reference_dtype to float16, or name another folder with scratch"
    ]


class ReferenceStore:
    """[num_rows, vocab_size] logits; float16 holds differences from the largest in the row. Use it with `with`."""

    def __init__(self, num_rows: int, vocab_size: int, dtype: str, folder: str | Path | None) -> None:
        """
        Raises:
            ConfigError: the folder has not enough space.
        """
        self._dtype = np.dtype(dtype)
        self._vocab_size = vocab_size
        self._file = tempfile.TemporaryFile(prefix="torchinfer-eval-", dir=folder)
        try:
            os.posix_fallocate(self._file.fileno(), 0, needed_bytes(num_rows, vocab_size, dtype))
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"no space for the reference's logits: {error}; name another folder with scratch"
            ) from error

    def write(self, row: int, logits: Tensor) -> None:
        """Put [N, vocab_size] float32 at `row`."""
        if self._dtype == np.float16:
            logits = (logits - logits.amax(-1, keepdim=True)).clamp(min=SMALLEST).half()
        self._seek(row)
        self._file.write(logits.cpu().contiguous().numpy().data)

    def read(self, row: int, count: int) -> Tensor:
        """[count, vocab_size] from `row` on, on the host."""
        values: NDArray[np.floating] = np.empty((count, self._vocab_size), self._dtype)
        self._seek(row)
        found = self._file.readinto(values.data.cast("B"))
        assert found == values.nbytes, (row, count)
        return torch.from_numpy(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _seek(self, row: int) -> None:
        self._file.seek(row * self._vocab_size * self._dtype.itemsize)
