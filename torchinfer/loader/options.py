"""How a checkpoint is read: what one may choose, and what is chosen otherwise."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torchinfer.errors import ConfigError
from torchinfer.loader.source import Source
from torchinfer.loader.tuning import DirectChoice

FIRST_READERS, MOST_READERS = min(8, max(2, os.cpu_count() or 2)), 16  # on local storage
FIRST_NETWORK_READERS, MOST_NETWORK_READERS = 8, 64
PROBE_BYTES = 1 << 30  # loads of less do not try direct reads: the comparison would cost more than it brings


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint is read; the ranges are EngineConfig's."""

    # Bytes of host memory on the way, what tensors become on it included, parameters not. None: 2 GiB, or more where
    # the largest tensors need it.
    memory: int | None = None
    readers: int | None = None  # at most, each with a file handle of its own; None: as many as bring more
    direct: bool | None = None  # around the page cache (O_DIRECT); None: what the first extents show to be faster
    verify: bool = False  # compare whole files with their CRC32C: the storage's, or that of a file CRC32C beside them
    exchange: bool | None = None  # processes send each other what several need; None: where that is faster

    def __post_init__(self) -> None:
        if self.exchange and self.verify:
            raise ConfigError(
                "exchange=True and verify=True exclude each other: to verify, every process reads whole files; switch "
                "one of them off"
            )

    def reader_counts(self, source: Source) -> tuple[int, int]:
        """How many read at first, and at most."""
        first, most = FIRST_READERS, MOST_READERS
        if source.is_network:
            first, most = FIRST_NETWORK_READERS, MOST_NETWORK_READERS
        return self.readers or first, self.readers or most

    def direct_choice(self, source: Source, num_bytes: int, is_read_by_several: bool = False) -> DirectChoice:
        """Whether to read around the page cache, for a load of so many bytes; not where several processes read the same
        of themselves, so that the storage gives it to the first of them only."""
        is_small = num_bytes < PROBE_BYTES or is_read_by_several
        is_pointless = source.kind == "gs" or (self.direct is None and is_small)
        return DirectChoice(False if is_pointless else self.direct)


DEFAULT_OPTIONS = LoadOptions()
