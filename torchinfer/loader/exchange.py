"""Processes of one node send each other what several of them need, so that the storage gives it once (sharing.py).

What is sent, and when, is agreed in rounds, over the group's gloo. In each round every process says one word: the
extent that it has read and offers, that it has none, that it has read all, or that it failed. Then all of them know the
same words, carry out the transfers in the order of the ranks, and begin the next round. No extent has to wait for a
certain other one, as it would in an order fixed by the plan, where memory held by what was read early can be what the
next in order waits for. So nothing waits in a circle:

- a process enters the next round whatever its readers do; between two rounds it only places what has been read;
- memory to receive into is set aside before the readers start: no transfer waits for staging memory;
- where few tensors may be open at once, a reader waits for that before it has staging memory, and what is received has
  room (opening.py);
- so an extent that was read is sent, and its staging memory given back, after rounds that all processes enter.

Tensors are sent in the dtype of the file and converted by those who receive them. That is the model's dtype in almost
every checkpoint, it shares the work evenly, and values go the same way as without an exchange.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader.assembly import Assembly
from torchinfer.loader.memory import Staging
from torchinfer.loader.opening import OpenTensors
from torchinfer.loader.placement import Placement
from torchinfer.loader.plan import Piece
from torchinfer.loader.readers import Filled
from torchinfer.loader.retry import Stopped
from torchinfer.loader.rounds import DONE, NOTHING, Rounds
from torchinfer.loader.sharing import SharedExtent, SharedPlan, column_cut, cut_of, num_parts, rows_of
from torchinfer.parallel import Shard

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.005  # in which a process that has nothing to place looks whether a round has ended


@dataclass(slots=True)
class Exchange:
    """One process's side of the exchange; a context manager, entered and left by all of them. For one thread.

    Raises:
        CheckpointError: another process failed, or is gone.
    """

    plan: SharedPlan
    rounds: Rounds
    placements: Mapping[str, Placement]
    assembly: Assembly
    staging: Staging
    device: torch.device
    tensors: OpenTensors | None = None  # those that are put together, where they are few at once
    num_received: int = 0  # bytes
    _lane: Tensor = field(init=False)  # uint8 host memory for one piece
    _index: dict[tuple[str, int], int] = field(init=False)  # shard and begin of an extent -> its place in the plan
    _names: set[str] = field(init=False)
    _ready: list[Filled] = field(default_factory=list)
    _error: Exception | None = None  # of this process, which the others do not know yet
    _is_reading: bool = True

    def __enter__(self) -> Self:
        self._index = {(item.extent.shard, item.extent.begin): i for i, item in enumerate(self.plan.items)}
        self._names = self.plan.names
        try:
            self._lane = self.staging.take(self.plan.staging_bytes, threading.Event())
            self._connect()
        except BaseException as error:
            self._tell(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.rounds.is_open:
            self._tell(error)

    def place_of(self, piece: Piece) -> Tensor | None:
        """As the assembly's, but what is sent to others stays in staging memory until then. For any thread."""
        if piece.entry.name not in self._names:
            return self.assembly.place_of(piece)
        if self.tensors is not None:
            self.tensors.enter(piece)
        return None

    def offer(self, filled: Filled) -> bool:
        """Take an extent that has been read, if it is a shared one."""
        if (filled.extent.shard, filled.extent.begin) not in self._index:
            return False
        self._ready.append(filled)
        return True

    def step(self) -> None:
        """Go on with the rounds without waiting for others; with transfers, if all have agreed on some."""
        if self.rounds.is_under_way:
            return
        # After transfers the others are here too: what is ready goes at once, in rounds that nobody waits for.
        while self.rounds.is_begun and self._end_round():
            self.rounds.begin(self._word())
        self.rounds.begin(self._word())

    def finish(self) -> None:
        """Go on until all processes have read all and got all."""
        self._is_reading = False
        while self.rounds.is_open:
            if not self.rounds.is_begun:
                self.rounds.begin(self._word())
            self._end_round()

    def _connect(self) -> None:
        """NCCL makes its connections where all take part; not all do in what follows."""
        if not self._is_on_device:
            return
        try:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.rounds.peers.group)
        except RuntimeError as error:
            raise CheckpointError(
                f"process {self.rounds.shard.rank} of the {self.rounds.shard.world} that load together cannot connect "
                f"{self.device} with the others': {error}; look at NCCL_DEBUG=INFO, or load with exchange=False"
            ) from error

    def _word(self) -> int:
        if self._ready:
            return self._index[self._ready[0].extent.shard, self._ready[0].extent.begin]
        return NOTHING if self._is_reading else DONE

    def _end_round(self) -> bool:
        """Wait for the words and do what they say; whether there was anything to transfer."""
        words = self.rounds.agree()
        self._transfer(words)
        if self._error is not None:
            raise self._error
        self.rounds.is_open = any(word != DONE for word in words)
        return any(word >= 0 for word in words)

    def _transfer(self, words: list[int]) -> None:
        for owner, word in enumerate(words):
            if word < 0:
                continue
            item = self.plan.items[word]
            if owner == self.rounds.shard.rank:
                self._send(item)
            elif self.rounds.shard.rank in item.holders:
                self._receive(item)
        self.rounds.is_open = True

    def _send(self, item: SharedExtent) -> None:
        filled = self._ready.pop(0)
        others = [rank for rank in item.holders if rank != self.rounds.shard.rank]
        for piece in item.extent.pieces:
            content = filled.bytes_of(piece)
            if self._is_on_device:
                content = content.to(self.device, non_blocking=True)
            parts = self._parts(piece, content, others)
            self._talk([self._operation(dist.isend, part, rank) for rank, part in parts])
            rows = self._rows(piece, self.rounds.shard.rank)
            self._put(piece, rows, _bytes_of(rows, piece, content) if rows else None, is_part=False)
        buffer = filled.take_buffer()
        assert buffer is not None
        self.staging.give_back(buffer)

    def _receive(self, item: SharedExtent) -> None:
        if self.tensors is not None and self._error is None:
            self.tensors.receive(item.extent)
        for piece in item.extent.pieces:
            rows, cut = self._rows(piece, self.rounds.shard.rank), column_cut(self.placements[piece.entry.name])
            part = None
            if rows is not None:
                part = self._space(rows.num_bytes // num_parts(cut, piece.entry) if cut else rows.num_bytes)
                self._talk([self._operation(dist.irecv, part, item.owner)])
                self.num_received += len(part)
            self._put(piece, rows, part, is_part=True)

    def _put(self, piece: Piece, rows: Piece | None, content: Tensor | None, is_part: bool) -> None:
        """Bring this process's rows of a piece to their place, if it has some. An error waits until all transfers of
        the round are done: others take part in them and would wait for ever."""
        if self._error is not None:
            return
        try:
            if rows is not None and content is not None:
                self.assembly.put(rows, content, is_part)
            self.assembly.complete([piece])
            self.assembly.wait()
        except Exception as error:  # of any kind: `_end_round` raises it
            self._error = error

    def _rows(self, piece: Piece, rank: int) -> Piece | None:
        return rows_of(piece, self.placements[piece.entry.name], Shard(rank, self.rounds.shard.world))

    def _parts(self, piece: Piece, content: Tensor, others: list[int]) -> list[tuple[int, Tensor]]:
        """What each of the others gets of a piece: uint8 [num_bytes], contiguous; nothing for some."""
        placement = self.placements[piece.entry.name]
        if column_cut(placement) is None:
            found = [(rank, self._rows(piece, rank)) for rank in others]
            return [(rank, _bytes_of(rows, piece, content)) for rank, rows in found if rows is not None]
        value = content.view(piece.entry.dtype).view(piece.shape)
        space = self._space(piece.num_bytes)
        parts = []
        for rank in others:
            cut = cut_of(placement, piece.entry, Shard(rank, self.rounds.shard.world))
            assert cut is not None
            columns = value.narrow(cut.dim, cut.start, cut.stop - cut.start)
            num_bytes = piece.num_bytes // num_parts(cut, piece.entry)
            first = cut.start // (cut.stop - cut.start) * num_bytes
            part = space[first : first + num_bytes]
            part.view(piece.entry.dtype).view(columns.shape).copy_(columns)
            parts.append((rank, part))
        return parts

    @property
    def _is_on_device(self) -> bool:
        """Whether tensors are sent from device to device; otherwise over the host."""
        return self.device.type == "cuda" and "nccl" in dist.get_backend_config(self.rounds.peers.group)

    def _space(self, num_bytes: int) -> Tensor:
        if self._is_on_device:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._lane[:num_bytes]

    def _operation(self, kind: Callable[..., dist.Work | None], part: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(kind, part, group=self.rounds.peers.group, group_peer=rank)

    def _talk(self, operations: list[dist.P2POp]) -> None:
        if not operations:
            return
        with self.rounds.talking():
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def _tell(self, error: BaseException) -> None:
        """Say that this process failed to all, after what was agreed before."""
        self._error = error if isinstance(error, Exception) else Stopped(type(error).__name__)
        try:
            if self.rounds.is_begun:
                self._transfer(self.rounds.agree(self._error))
        except CheckpointError as answer:  # another one failed, too
            logger.info("gave up: %s", answer)
        else:
            self.rounds.tell(self._error)


def _bytes_of(rows: Piece, piece: Piece, content: Tensor) -> Tensor:
    """Of some rows of a piece, uint8 [num_bytes], a view."""
    start = rows.offset - piece.offset
    return content[start : start + rows.num_bytes]
