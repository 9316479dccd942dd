"""Calls of the storage that may hang: each runs in a thread of its own, and another thread tries again.

A system call on a mount that hangs can be neither ended nor given a time limit. So the caller waits for a thread that
calls; when it has brought less than STALL_BYTES in STALL_SECONDS, another begins anew, through a handle of its own, and
after MAX_STALLS there is an error. A thread that was left behind ends when the storage answers, and what it gets is
thrown away. What reads the weights does the same with its extents (readers.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torchinfer.errors import CheckpointError
from torchinfer.loader.retry import Attempts, PersistentReader, Result, Stopped
from torchinfer.loader.source import Source

logger = logging.getLogger(__name__)

STALL_SECONDS = 60.0  # after which another thread tries, when it brought less than
STALL_BYTES = 1 << 20  # or a trickle would never end; at that rate 128 MiB, the longest extents, take two hours
MAX_STALLS = 3  # of one call, or of one extent; of what is measured one: another try would not be the same
POLL_SECONDS = 0.1


class StalledError(CheckpointError):
    """The storage hangs: whatever else it is asked would hang as long."""


@dataclass(slots=True)
class Progress:
    """Whether bytes come as they should: STALL_BYTES in the time of a stall."""

    num_bytes: int = 0  # since then
    since: float = field(default_factory=time.monotonic)

    def count(self, num_bytes: int) -> None:
        """So many bytes have come."""
        self.num_bytes += num_bytes
        if self.num_bytes >= STALL_BYTES:
            self.num_bytes, self.since = 0, time.monotonic()

    def is_stalled(self, seconds: float) -> bool:
        """Whether that time has passed with less."""
        return time.monotonic() - self.since > seconds


@dataclass(slots=True)
class Trial:
    """One of the times that something is tried: what the thread that tries reads with."""

    attempts: Attempts = field(default_factory=Attempts)
    progress: Progress = field(default_factory=Progress)

    def count(self, num_bytes: int) -> None:
        """So many bytes have come."""
        self.progress.count(num_bytes)


def unless_stalled(
    what: str, call: Callable[[Trial], Result], stop: threading.Event | None = None, max_stalls: int = MAX_STALLS
) -> Result:
    """What `call` returns or raises. It must write to nothing but memory of its own: several may run at once.

    Raises:
        StalledError: less than STALL_BYTES came in STALL_SECONDS, `max_stalls` times; `what` says what of which file.
        Stopped: `stop` is set.
    """
    for number in range(1, max_stalls + 1):
        trial, results, errors = Trial(), list[Result](), list[BaseException]()
        thread = threading.Thread(target=_run, args=(call, trial, results, errors), name="header", daemon=True)
        try:
            thread.start()  # where Ctrl-C may come, too
            _wait(thread, trial, stop)
        finally:
            trial.attempts.stop.set()
        for error in errors:
            raise error
        for result in results:
            return result
        came = f"only {trial.progress.num_bytes} bytes" if trial.progress.num_bytes else "nothing"
        if number < max_stalls:
            logger.warning("cannot %s: %s came for %g s; another thread tries again", what, came, STALL_SECONDS)
    times = f", {max_stalls} times" if max_stalls > 1 else ""
    raise StalledError(
        f"cannot {what}: {came} came for {STALL_SECONDS:g} s{times}; check the storage (and the mount) and try again"
    )


def read_file(source: Source, name: str, max_bytes: int) -> bytes:
    """A small file as a whole; refused when it is larger than `max_bytes`, before memory is taken."""

    def read(trial: Trial) -> bytes:
        stat = source.stat(name)
        if stat.size > max_bytes:
            raise CheckpointError(f"{source.address}/{name} has {stat.size} bytes; at most {max_bytes} are allowed")
        content = bytearray(stat.size)
        with PersistentReader(source, name, stat, trial.attempts) as reader:
            reader.read_into(0, memoryview(content), trial.count)
        return bytes(content)

    return unless_stalled(f"read {source.address}/{name}", read)


def _run(call: Callable[[Trial], Result], trial: Trial, results: list[Result], errors: list[BaseException]) -> None:
    try:
        results.append(call(trial))
    except BaseException as error:  # whatever it is belongs to the thread that waits
        errors.append(error)


def _wait(thread: threading.Thread, trial: Trial, stop: threading.Event | None) -> None:
    """Until the thread has ended, or too little has come in STALL_SECONDS."""
    while thread.is_alive() and not trial.progress.is_stalled(STALL_SECONDS):
        if stop is not None and stop.is_set():
            raise Stopped
        thread.join(POLL_SECONDS)
