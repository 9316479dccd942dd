"""Two choices that a load makes from what it measures: how many readers, and whether around the page cache."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 0.5
WORTH = 1.08  # more readers stay when they bring this factor
CACHED_RATE = 1.5e9  # bytes/s of one reader: a page cache that does not tell what it holds (FUSE), or as good
PROBE_EXTENTS = 8  # of each kind
PROBE_SKIPPED = 4  # of them the first, which ran beside the other kind, or before there were enough readers
PROBE_READERS = 4  # at least, on a disk: one or two reads through the page cache do not keep it busy
DIRECT_GAIN = 1.1  # direct reads must be faster by this, because they leave nothing in the page cache for others


@dataclass(slots=True)
class ReaderCount:
    """Doubles the readers while that brings more bytes a second; goes back when it brought nothing, or errors."""

    target: int
    limit: int
    _started: float = 0.0
    _bytes: int = 0
    _retries: int = 0
    _best_rate: float = 0.0
    _before: int = 0  # target that `_best_rate` was measured with; 0: none yet
    _is_settled: bool = False

    def observe(self, now: float, num_bytes: int, num_retries: int) -> int:
        """What has been read until `now` (seconds), in all; returns the target."""
        if not self._started:
            self._started, self._bytes, self._retries = now, num_bytes, num_retries
        if now - self._started >= WINDOW_SECONDS:
            rate = (num_bytes - self._bytes) / (now - self._started)
            self._decide(rate, num_retries > self._retries)
            self._started, self._bytes, self._retries = now, num_bytes, num_retries
        return self.target

    def _decide(self, rate: float, has_errors: bool) -> None:
        if has_errors:
            self.target, self._is_settled = max(1, self.target // 2), True
        elif self._is_settled:
            return
        elif rate >= WORTH * self._best_rate:
            self._best_rate, self._before = rate, self.target
            self.target = min(self.limit, 2 * self.target)
            self._is_settled = self.target == self._before
        else:
            self.target, self._is_settled = self._before, True


@dataclass(slots=True)
class DirectChoice:
    """Whether reads go around the page cache. `choice` is None while the first extents are being compared.

    Extents that are in the page cache already are read from there and say nothing; this is about the others.
    """

    choice: bool | None
    is_given: bool = field(init=False)  # by the caller: nothing is compared
    _rates: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    _num_direct: int = 0

    def __post_init__(self) -> None:
        self.is_given = self.choice is not None

    def next(self) -> bool:
        """For the extent that is started now. Call it, and `observe`, under one lock."""
        if self.choice is not None:
            return self.choice
        if len(self._rates[False]) >= PROBE_EXTENTS and self._num_direct < PROBE_EXTENTS:
            self._num_direct += 1
            return True
        return False

    def observe(self, is_direct: bool, num_bytes: int, seconds: float) -> None:
        """An extent has been read."""
        if self.choice is not None:
            return
        self._rates[is_direct].append(num_bytes / max(seconds, 1e-9))
        buffered, direct = (statistics.median(rates[PROBE_SKIPPED:] or [0.0]) for rates in self._rates.values())
        if len(self._rates[False]) >= PROBE_EXTENTS and buffered >= CACHED_RATE:
            self._decide(False, f"one reader gets {buffered / 1e9:.2f} GB/s, as from the page cache")
        elif len(self._rates[True]) >= PROBE_EXTENTS:
            is_faster = direct >= DIRECT_GAIN * buffered
            rates = f"{direct / 1e9:.3f} GB/s a reader directly, {buffered / 1e9:.3f} through the page cache"
            self._decide(is_faster, rates)

    def refuse(self) -> None:
        """Direct reads are not possible."""
        self._decide(False, "the storage does not support direct reads")

    def _decide(self, choice: bool, reason: str) -> None:
        self.choice = choice
        logger.info("reads go %s the page cache: %s", "around" if choice else "through", reason)
