"""What processes that load together say to each other: in each round every one of them a word, over the group's gloo.

A process that fails says so in the next round, and all give up; the first round is after their preparations. One that
ends closes its connections, which the others see at once; one that hangs runs into the group's timeout, which its maker
chose.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.loader.retry import Stopped
from torchinfer.loader.sharing import NARROW_BYTES
from torchinfer.parallel import Shard

logger = logging.getLogger(__name__)

NOTHING, DONE, FAILED = -1, -2, -3  # words of a round; others are indices of extents
TEXT_BYTES = 2000  # of the error that a process which failed tells the others


@dataclass(frozen=True, slots=True)
class Peers:
    """The processes that load one model together."""

    group: dist.ProcessGroup  # with the ranks of the shards, and gloo for the CPU; NCCL is used where it has it
    block_bytes: int | None = None  # length of what is sent at once; None: as extents are
    narrow_bytes: int = NARROW_BYTES  # rows of a tensor that are fewer are not read by their process alone


def find_peers(shard: Shard, peers: Peers | None) -> Peers | None:
    """`peers`, or those of torch.distributed's default group if that will do.

    Raises:
        ConfigError: `peers` will not do.
    """
    if peers is None:
        if not dist.is_available() or not dist.is_initialized() or dist.group.WORLD is None:
            return None
        default = dist.group.WORLD
        fits = (default.rank(), default.size()) == (shard.rank, shard.world)
        return Peers(default) if fits and has_gloo(default) else None
    if (peers.group.rank(), peers.group.size()) != (shard.rank, shard.world):
        raise ConfigError(
            f"this process has rank {peers.group.rank()} of {peers.group.size()} in the group, but loads shard "
            f"{shard.rank} of {shard.world}; pass the group whose ranks are the shards"
        )
    if not has_gloo(peers.group):
        raise ConfigError(
            f"the group has {dist.get_backend_config(peers.group)}, but processes talk over gloo; make it with "
            "backend='cpu:gloo,cuda:nccl'"
        )
    return peers


@dataclass(slots=True)
class Rounds:
    """One process's side; for one thread.

    Raises:
        CheckpointError: another process failed, or is gone.
    """

    shard: Shard
    peers: Peers
    is_open: bool = True  # the others wait for this process's next word, or will
    _round: dist.Work | None = None
    _words: list[Tensor] = field(default_factory=list)

    @property
    def is_begun(self) -> bool:
        return self._round is not None

    @property
    def is_under_way(self) -> bool:
        """Whether it is begun, and some have not said their word yet."""
        return self._round is not None and not self._round.is_completed()

    def begin(self, word: int) -> None:
        """Say a word, and wait for nobody."""
        self._words = [torch.zeros(1, dtype=torch.int64) for _ in range(self.shard.world)]
        with self.talking():
            own = torch.tensor([word], dtype=torch.int64)
            self._round = dist.all_gather(self._words, own, group=self.peers.group, async_op=True)

    def agree(self, error: Exception | None = None) -> list[int]:
        """Wait for the words of the round. `is_open` is False afterwards.

        Raises:
            CheckpointError: one of them is FAILED; `error` is what to say of it where it was this process's.
        """
        assert self._round is not None
        self.is_open = False
        with self.talking():
            self._round.wait()
            self._round = None
            words = [int(word) for word in self._words]
            if FAILED not in words:
                return words
            rank = words.index(FAILED)
            text = _encode(error) if rank == self.shard.rank else torch.zeros(TEXT_BYTES, dtype=torch.uint8)
            dist.broadcast(text, group=self.peers.group, group_src=rank)
        raise CheckpointError(
            f"process {rank} of the {self.shard.world} that load together failed, so this one gave up too; there: "
            f"{_decode(text)}"
        )

    def tell(self, error: BaseException) -> None:
        """Say FAILED to all, between two rounds."""
        try:
            self.begin(FAILED)
            self.agree(error if isinstance(error, Exception) else Stopped(type(error).__name__))
        except CheckpointError as answer:  # this one at least
            logger.info("gave up: %s", answer)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """What comes before the first round: an error in it is one in all, who wait for each other at its end."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise
        self.begin(NOTHING)
        self.agree()
        self.is_open = True

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Errors of torch.distributed in it are CheckpointErrors, after which nobody is waited for."""
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises for whatever happened to the connection
            self.is_open = False
            raise CheckpointError(
                f"process {self.shard.rank} of the {self.shard.world} that load together lost another one: {error}; "
                "look for the one that ended or hangs, and load again in all of them"
            ) from error


def has_gloo(group: dist.ProcessGroup) -> bool:
    """Whether processes of a group can talk on the host."""
    return "cpu:gloo" in dist.get_backend_config(group)


def _encode(error: Exception | None) -> Tensor:
    """uint8 [TEXT_BYTES], filled up with zeros."""
    text = f"{type(error).__name__}: {error}".encode()[:TEXT_BYTES]
    return torch.tensor(list(text.ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)


def _decode(text: Tensor) -> str:
    return bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
