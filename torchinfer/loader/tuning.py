"""Two choices that a load makes from what it measures: how many readers, and whether around the page cache."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 0.5
WORTH = 1.08  # more readers stay when they bring this factor
STEPS = 16  # in which all readers come back after errors, a window each
CACHED_RATE = 1.5e9  # bytes/s of one reader: a page cache that does not tell what it holds (FUSE), or as good
PROBE_EXTENTS = 8  # of each kind, at least
PROBE_SKIPPED = 4  # of them the first, which ran beside the other kind, or before there were enough readers
PROBE_READERS = 4  # at least, on a disk: one or two reads through the page cache do not keep it busy
DIRECT_GAIN = 1.1  # direct reads must be faster by this, because they leave nothing in the page cache for others


@dataclass(slots=True)
class ReaderCount:
    """How many readers: doubled while that brings more bytes a second, and where it brought nothing, one doubling back.

    After errors AIMD, as of TCP's congestion control: an error halves the readers, and each window without one adds
    some, up to where they were or would have been; there it is measured again whether so many bring more.
    Source: Chiu and Jain, 1989, https://doi.org/10.1016/0169-7552(89)90019-6; RFC 5681, section 3.1.
    """

    target: int
    limit: int
    _goal: int = field(init=False)  # what `target` grows to; it is judged when there are so many
    _has_errors: bool = False  # there were some: `target` grows in steps
    _started: float = 0.0
    _bytes: int = 0
    _retries: int = 0
    _best_rate: float = 0.0
    _best: int = 0  # readers that `_best_rate` was measured with; 0: none yet

    def __post_init__(self) -> None:
        self._goal = self.target

    def observe(self, now: float, num_bytes: int, num_retries: int) -> int:
        """What has been read until `now` (seconds), in all; returns the target."""
        if not self._started:
            self._started, self._bytes, self._retries = now, num_bytes, num_retries
        if now - self._started >= WINDOW_SECONDS:
            rate = (num_bytes - self._bytes) / (now - self._started)
            self._decide(rate, num_retries > self._retries)
            self._started, self._bytes, self._retries = now, num_bytes, num_retries
        return self.target

    def raise_to(self, target: int) -> None:
        """At least so many, as far as the limit allows."""
        self.target = max(self.target, min(target, self.limit))
        self._goal = max(self._goal, self.target)

    def _decide(self, rate: float, has_errors: bool) -> None:
        if has_errors:
            self.target, self._has_errors = max(1, self.target // 2), True
            return
        if self.target == self._goal != self._best:
            if rate >= WORTH * self._best_rate:
                self._best_rate, self._best = rate, self.target
                self._goal = min(self.limit, 2 * self.target)
            else:
                self._goal = self._best
        step = max(1, self.limit // STEPS) if self._has_errors else self.limit
        self.target = min(self._goal, self.target + step)


@dataclass(slots=True)
class DirectChoice:
    """Whether reads go around the page cache. `choice` is None while the first extents are being compared.

    Extents that are in the page cache already are read from there and say nothing; this is about the others.
    """

    choice: bool | None
    is_given: bool = field(init=False)  # by the caller: nothing is compared
    _rates: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def __post_init__(self) -> None:
        self.is_given = self.choice is not None

    def next(self) -> bool:
        """For the extent that is started now. Call it, and `observe`, under one lock.

        What counts is what has been read: of those that were started some may hang, and never end.
        """
        return len(self._rates[False]) >= PROBE_EXTENTS if self.choice is None else self.choice

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
