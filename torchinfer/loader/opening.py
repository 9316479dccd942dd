"""Tensors that are put together whole and handed over then, so that their memory is free again: few at once, within a
limit.

    extents   begin when what they open has room, beside what is open and what the extents before them in the order open
    tensors   are open from the first extent that has a piece of them until they were handed over

Nobody waits for ever: when all that began is done, what is open is what the order leaves open at that place, and the
limit is at least the most of that. So the next extent has room then.

Processes that exchange all extents (exchange.py) have one order and one limit. Each begins those that it reads; what
comes before them in the order counts as begun, whoever reads it. One that is received has room without waiting: it had
it in the process that read it, and when that began it, at most what is whole here by now was whole there. And the first
extent in the order that has not begun is begun by its reader, when all before it have been sent.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchinfer.loader.plan import Extent, Piece
from torchinfer.loader.retry import Stopped


@dataclass(frozen=True, slots=True)
class Deliver:
    """What becomes of a tensor as soon as it is whole."""

    send: Callable[[str, Tensor], Tensor]  # its name and values -> what the model gets in its place
    num_bytes: int = 0  # of host memory, that a call takes at most beside the tensor


@dataclass(frozen=True, slots=True)
class OpeningPlan:
    """Extents in an order in which few bytes of parameters are open at once."""

    extents: tuple[Extent, ...]
    parameters: tuple[frozenset[str], ...]  # of each extent
    num_bytes: Mapping[str, int]  # of each parameter

    @property
    def most_bytes(self) -> int:
        """Open at once at most, where each extent begins when the one before is done."""
        remaining = Counter(name for names in self.parameters for name in names)
        is_open: set[str] = set()
        most = 0
        for names in self.parameters:
            is_open |= names
            most = max(most, sum(self.num_bytes[name] for name in is_open))
            remaining.subtract(names)
            is_open = {name for name in is_open if remaining[name]}
        return most


def plan_opening(
    extents: Sequence[Extent], parameter_of: Mapping[str, str], num_bytes: Mapping[str, int]
) -> OpeningPlan:
    """The order: of the extents that have a piece of what is open the one that leaves least open; where nothing is,
    the next one of the files. Extents are cut where a parameter begins that is larger than they are, or the one before
    it would still be open then. `parameter_of`: checkpoint tensor -> parameter."""
    extents = _cut(extents, parameter_of, num_bytes)
    names = [
        frozenset(parameter_of[piece.entry.name] for piece in extent.pieces if not piece.is_filler)
        for extent in extents
    ]
    users: dict[str, set[int]] = {}
    for index, own in enumerate(names):
        for name in own:
            users.setdefault(name, set()).add(index)
    left, order, is_open = dict.fromkeys(range(len(extents))), list[int](), set[str]()

    def growth(index: int) -> tuple[int, int]:
        new = sum(num_bytes[name] for name in names[index] - is_open)
        return new - sum(num_bytes[name] for name in names[index] if users[name] == {index}), index

    while left:
        index = min({index for name in is_open for index in users[name]} or [next(iter(left))], key=growth)
        del left[index]
        order.append(index)
        for name in names[index]:
            users[name].discard(index)
        is_open = {name for name in is_open | names[index] if users[name]}
    return OpeningPlan(tuple(extents[i] for i in order), tuple(names[i] for i in order), num_bytes)


def _cut(extents: Sequence[Extent], parameter_of: Mapping[str, str], num_bytes: Mapping[str, int]) -> list[Extent]:
    found, begun = list[Extent](), set[str]()
    for extent in extents:
        first = 0
        for index, piece in enumerate(extent.pieces):
            name = None if piece.is_filler else parameter_of[piece.entry.name]
            if name is not None and name not in begun and num_bytes[name] > extent.num_bytes and index > first:
                found.append(Extent(extent.shard, extent.pieces[first:index]))
                first = index
            begun |= {name} if name is not None else set()
        found.append(Extent(extent.shard, extent.pieces[first:]))
    return found


@dataclass(slots=True)
class OpenTensors:
    """Lets extents begin; `enter` is for any thread, the others for one."""

    plan: OpeningPlan
    limit: int  # bytes, not less than the plan's `most_bytes`
    stop: threading.Event
    peak: int = 0
    _index: dict[tuple[str, int], int] = field(init=False)  # shard and begin of an extent -> its place in the order
    _num_begun: int = 0
    _open: set[str] = field(default_factory=set)
    _condition: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._index = {(extent.shard, extent.begin): i for i, extent in enumerate(self.plan.extents)}

    def enter(self, piece: Piece) -> None:
        """Wait until the extent that begins with this piece has room. Other pieces have it, and what is read once more.

        Raises:
            Stopped: `stop` was set meanwhile.
        """
        index = self._index.get((piece.entry.shard, piece.offset), -1)
        with self._condition:
            while not self._begin(index):
                if self.stop.is_set():
                    raise Stopped
                self._condition.wait(0.1)

    def receive(self, extent: Extent) -> None:
        """Note that another process has begun an extent."""
        with self._condition:
            has_room = self._begin(self._index[extent.shard, extent.begin])
            assert has_room, f"{extent.shard} at {extent.begin} had room in another process, and has none in this one"

    def _begin(self, index: int) -> bool:
        """Open what the extents to this place open, if it has room."""
        if index < self._num_begun:
            return True
        wanted = self._open.union(*self.plan.parameters[self._num_begun : index + 1])
        num_bytes = sum(self.plan.num_bytes[name] for name in wanted)
        if num_bytes > self.limit:
            return False
        self._num_begun, self._open = index + 1, wanted
        self.peak = max(self.peak, num_bytes)
        self._condition.notify_all()
        return True

    def close(self, parameter: str) -> None:
        """Note that a parameter has been handed over."""
        with self._condition:
            self._open.discard(parameter)
            self._condition.notify_all()
