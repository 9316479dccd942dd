"""Reads that survive what passes: the handle is opened again and the read goes on where it stopped.

Delays double and are drawn at random between half and the whole (jitter), so that many readers that failed together
do not come back together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torchinfer.errors import CheckpointError
from torchinfer.loader.source import ALIGNMENT, FileStat, Reader, Source, TransientError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Stopped(Exception):
    """The load, or this reader, was given up while the read was under way."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again and when to give up; times in seconds."""

    attempts: int = 8  # in a row that bring no byte
    first_delay: float = 0.2
    max_delay: float = 10.0
    deadline: float = 180.0  # without a byte, over all attempts

    def delay(self, failures: int) -> float:
        """Before the next attempt, after this many in a row failed."""
        longest = min(self.max_delay, self.first_delay * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


METADATA_POLICY = RetryPolicy(attempts=5, max_delay=2.0, deadline=30.0)  # of calls that bring no bytes: list, stat


@dataclass(slots=True)
class Attempts:
    """What one reader, or several, try by: the policy, the order to stop, and the count of retries."""

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    stop: threading.Event = field(default_factory=threading.Event)
    num_retries: int = 0
    last_error: str = ""

    def run(self, what: str, attempt: Callable[[], bool]) -> None:
        """Call `attempt` until it returns True; False or progress in it means to call again at once.

        Raises:
            CheckpointError: the policy's limits are reached.
            Stopped: `stop` is set.
        """
        failures, since = 0, time.monotonic()
        while True:
            if self.stop.is_set():
                raise Stopped
            try:
                if attempt():
                    return
                failures, since = 0, time.monotonic()
            except TransientError as error:
                failures += 1
                self.num_retries += 1
                self.last_error = str(error)
                self._wait(what, error, failures, time.monotonic() - since)

    def call(self, what: str, function: Callable[[], Result]) -> Result:
        """What `function` returns, however many attempts it takes; raises like `run`."""
        results: list[Result] = []

        def attempt() -> bool:
            results.append(function())
            return True

        self.run(what, attempt)
        return results[0]

    def _wait(self, what: str, error: TransientError, failures: int, seconds: float) -> None:
        policy = self.policy
        if failures >= policy.attempts or seconds >= policy.deadline:
            raise CheckpointError(
                f"cannot {what}: {error}; gave up after {failures} attempts in {seconds:.1f} s without a byte "
                f"(limits: {policy.attempts} attempts, {policy.deadline:g} s); check the storage and load again"
            ) from error
        delay = policy.delay(failures)
        # Its text: a record with the error keeps its traceback, and in that the memory that was read into.
        logger.warning("cannot %s: %s; attempt %d follows in %.1f s", what, str(error), failures + 1, delay)
        if self.stop.wait(delay):
            raise Stopped


class PersistentReader:
    """A pinned file that is read in spite of transient errors. For one thread."""

    def __init__(
        self,
        source: Source,
        name: str,
        stat: FileStat,
        attempts: Attempts | None = None,
        *,
        end: int | None = None,
        direct: bool = False,
    ) -> None:
        self._source, self._name, self._stat = source, name, stat
        self._attempts = attempts or Attempts()
        self._end, self._direct = end, direct
        self._reader: Reader | None = None

    def __enter__(self) -> PersistentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the handle back."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def read_into(self, offset: int, buffer: memoryview, on_bytes: Callable[[int], None] | None = None) -> None:
        """Fill the whole of `buffer` with the file's bytes from `offset`; `on_bytes` hears of each part.

        Raises:
            CheckpointError: the file ends before that, or it cannot be read.
            Stopped: the load was given up.
        """
        done = 0

        def attempt() -> bool:
            nonlocal done
            count = self._read_some(offset + done, buffer[done:])
            if count == 0:
                raise CheckpointError(
                    f"{self._path} ends at byte {offset + done}, but bytes [{offset}, {offset + len(buffer)}) are "
                    "needed; it was cut off: copy or download it again"
                )
            done += count
            if on_bytes:
                on_bytes(count)
            return done == len(buffer)

        if len(buffer):
            self._attempts.run(f"read {self._path} from byte {offset}", attempt)

    def read_aligned(self, offset: int, buffer: memoryview, on_bytes: Callable[[int], None] | None = None) -> None:
        """Like `read_into`, for a direct reader: all is aligned, and what lies behind the file's end stays as it is.

        Raises:
            DirectUnsupportedError: the storage has no direct reads.
        """
        count = min(len(buffer), self._stat.size - offset)
        done = 0

        def attempt() -> bool:
            nonlocal done
            some = self._read_some(offset + done, buffer[done:])
            if done + some < count:
                some -= some % ALIGNMENT
                if some == 0:
                    raise TransientError(f"a direct read at byte {offset + done} gave less than {ALIGNMENT} bytes")
            done += some
            if on_bytes:
                on_bytes(some)
            return done >= count

        if count:
            self._attempts.run(f"read {self._path} from byte {offset}", attempt)

    def check(self) -> None:
        """See that the file that was read is still the pinned one.

        Raises:
            CheckpointError: it is not, or it cannot be looked at.
            Stopped: the load was given up.
        """

        def attempt() -> bool:
            self._use(lambda reader: reader.check())
            return True

        if self._reader is not None:
            self._attempts.run(f"look at {self._path}", attempt)

    @property
    def _path(self) -> str:
        return f"{self._source.address}/{self._name}"

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        return self._use(lambda reader: reader.read_some(offset, buffer))

    def _use(self, use: Callable[[Reader], Result]) -> Result:
        """With a handle that is new after an error."""
        if self._reader is None:
            self._reader = self._source.open(self._name, self._stat, end=self._end, direct=self._direct)
        try:
            return use(self._reader)
        except TransientError:
            self.close()
            raise
