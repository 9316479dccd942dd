"""How many readers, and whether around the page cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchinfer.loader.folder import FolderSource
from torchinfer.loader.options import PROBE_BYTES, LoadOptions
from torchinfer.loader.tuning import (
    CACHED_RATE,
    PROBE_EXTENTS,
    PROBE_SKIPPED,
    DirectChoice,
    ReaderCount,
)


def settle(rate_of: Callable[[int], float], first: int, limit: int) -> int:
    """The target after 30 windows in which n readers get rate_of(n) bytes a second."""
    count, now, num_bytes = ReaderCount(first, limit), 1.0, 0
    for _ in range(30):
        count.observe(now, num_bytes, 0)
        now, num_bytes = now + 0.6, num_bytes + int(0.6 * rate_of(count.target))
    return count.target


@pytest.mark.parametrize(
    ("rate_of", "expected"),
    [
        (lambda n: 1e8 * n, 64),  # each reader brings its own stream
        (lambda n: 1e8 * min(n, 16), 16),
        (lambda n: 1e9, 2),  # one is enough: what the first window had is kept
        (lambda n: 1e9 / n, 2),
    ],
)
def test_readers_grow_as_long_as_they_bring_more(rate_of: Callable[[int], float], expected: int) -> None:
    assert settle(rate_of, 2, 64) == expected


def test_the_limit_holds() -> None:
    assert settle(lambda n: 1e8 * n, 4, 10) == 10


def test_errors_halve_the_readers() -> None:
    count = ReaderCount(16, 64)
    count.observe(1.0, 0, 0)
    assert count.observe(2.0, 10**9, 3) == 8
    assert count.observe(3.0, 10**9, 4) == 4
    assert count.observe(4.0, 10**9, 12) == 2


def course(count: ReaderCount, rate_of: Callable[[int], float], num_windows: int, failing: set[int]) -> list[int]:
    """The target after each window in which n readers get rate_of(n) bytes a second; some have an error."""
    now, num_bytes, num_errors, targets = 1.0, 0, 0, []
    count.observe(now, num_bytes, num_errors)
    for window in range(num_windows):
        now, num_bytes = now + 0.6, num_bytes + int(0.6 * rate_of(count.target))
        num_errors += window in failing
        targets.append(count.observe(now, num_bytes, num_errors))
    return targets


def test_readers_come_back_after_an_error_in_steps_up_to_what_brings_more() -> None:
    targets = course(ReaderCount(8, 64), lambda n: 1e8 * n, 20, failing={1})
    assert targets == [16, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 64, 64, 64, 64]
    targets = course(ReaderCount(8, 64), lambda n: 1e8 * min(n, 16), 12, failing={1})
    assert targets == [16, 8, 12, 16, 20, 24, 28, 32, 16, 16, 16, 16]  # 32 bring no more than 16


def test_readers_that_were_settled_come_back_to_what_was_best() -> None:
    targets = course(ReaderCount(2, 64), lambda n: 1e8 * min(n, 16), 12, failing={6, 7})
    assert targets == [4, 8, 16, 32, 16, 16, 8, 4, 8, 12, 16, 16]


def test_an_error_in_the_first_window_does_not_keep_readers_few() -> None:
    assert course(ReaderCount(8, 64), lambda n: 1e8 * n, 30, failing={0})[-1] == 64


def test_readers_are_raised_no_further_than_the_limit() -> None:
    count = ReaderCount(2, 3)
    count.raise_to(4)
    assert count.target == 3
    count.raise_to(1)
    assert count.target == 3


def observe(choice: DirectChoice, buffered: float, direct: float, extents: int = 20) -> list[bool]:
    started = []
    for _ in range(extents):
        started.append(choice.next())
        rate = direct if started[-1] else buffered
        choice.observe(started[-1], 10**8, 10**8 / rate)
    return started


def test_direct_reads_are_chosen_where_they_are_faster() -> None:
    choice = DirectChoice(None)
    started = observe(choice, 1e8, 3e8)
    assert started[: 2 * PROBE_EXTENTS] == [False] * PROBE_EXTENTS + [True] * PROBE_EXTENTS
    assert choice.choice is True


def test_they_are_not_where_they_are_not() -> None:
    choice = DirectChoice(None)
    observe(choice, 1e8, 1.05e8)
    assert choice.choice is False


def test_what_ran_beside_the_other_kind_does_not_count() -> None:
    choice = DirectChoice(None)
    observe(choice, 1e8, 1e8, PROBE_EXTENTS + PROBE_SKIPPED)
    observe(choice, 1e8, 3e8)
    assert choice.choice is True


@pytest.mark.parametrize("is_direct", [False, True])
def test_an_extent_that_hangs_does_not_leave_the_choice_open(is_direct: bool) -> None:
    choice, is_hanging = DirectChoice(None), True
    for _ in range(2 * PROBE_EXTENTS + 1):
        started = choice.next()
        if started is is_direct and is_hanging:
            is_hanging = False  # is given to another reader, and never heard of again
            continue
        choice.observe(started, 10**8, 1.0)
    assert choice.choice is False


def test_they_are_not_tried_where_the_file_is_in_memory() -> None:
    choice = DirectChoice(None)
    assert not any(observe(choice, 1.1 * CACHED_RATE, 1e12))
    assert choice.choice is False


@pytest.mark.parametrize("wanted", [True, False])
def test_a_given_choice_stays(wanted: bool) -> None:
    choice = DirectChoice(wanted)
    assert observe(choice, 1e8, 1e8) == [wanted] * 20


def test_storage_may_refuse() -> None:
    choice = DirectChoice(True)
    choice.refuse()
    assert choice.next() is False


def test_what_several_processes_read_is_not_read_around_the_page_cache_unless_it_is_asked_for(tmp_path: Path) -> None:
    source = FolderSource(tmp_path)
    assert LoadOptions().direct_choice(source, PROBE_BYTES).choice is None
    assert LoadOptions().direct_choice(source, PROBE_BYTES, is_read_by_several=True).choice is False
    assert LoadOptions(direct=True).direct_choice(source, PROBE_BYTES, is_read_by_several=True).choice is True
