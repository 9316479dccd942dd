"""Processes of one machine that divide a model among its GPUs: tensor parallelism over torch.distributed.

The first process has the engine that is asked, starts the others, and tells them what it is asked (`lockstep`). Each
has the GPU of its rank and a model of its own sizes (`parallel`); parts of sums are added up by NCCL. On the CPU the
same runs over gloo, for development.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchinfer.config import EngineConfig
from torchinfer.device import device_type
from torchinfer.errors import ConfigError
from torchinfer.link import Link
from torchinfer.loader.assembly import parameter_bytes
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.opening import Deliver
from torchinfer.loader.options import LoadOptions
from torchinfer.loader.weights import build_empty, load_weights
from torchinfer.lockstep import Group
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import Shard, connect, divide, tensors_of

logger = logging.getLogger(__name__)

END_SECONDS = 10.0  # for the others, after the first one has said that it ends
MEET_SECONDS = 600.0  # in which each has to begin a sum that others wait in


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes, and the file by which they find each other."""

    shard: Shard
    device: str  # cuda or cpu
    store: str

    def join(self) -> None:
        """Make torch.distributed's default group of all of them."""
        if self.device == "cuda":
            torch.cuda.set_device(self.shard.rank)
        with _to_stderr():  # gloo says on standard output whom it has met
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo",
                store=dist.FileStore(self.store, self.shard.world),  # type: ignore[attr-defined]
                rank=self.shard.rank,
                world_size=self.shard.world,
                timeout=timedelta(seconds=MEET_SECONDS),
                device_id=torch.device("cuda", self.shard.rank) if self.device == "cuda" else None,
            )


def leave() -> None:
    """End this process's part of the group, and its threads: not while the interpreter ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _to_stderr() -> Iterator[None]:
    """Standard output goes to standard error, that of libraries in C too."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)


def has_ranks(config: EngineConfig) -> bool:
    """Whether an engine is several processes of this machine."""
    return config.tensor_parallel_size > 1 and device_type(config.device) != "xla"


def start_ranks(config: EngineConfig) -> Group:
    """Start all processes but the first, which is this one.

    Raises:
        ConfigError: this process is in a group of torch.distributed already.
    """
    if dist.is_initialized():
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} makes torch.distributed's default group, which this "
            "process has already: close the engine that made it, or use a process of its own"
        )
    world, name = config.tensor_parallel_size, device_type(config.device)
    folder = tempfile.mkdtemp(prefix="torchinfer-")
    store = str(Path(folder) / "store")
    processes: list[subprocess.Popen[bytes]] = []

    def close() -> None:
        leave()
        for process in processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)

    group = Group(True, [], close)
    try:
        for rank in range(1, world):
            own, other = socket.socketpair()
            with other:
                processes.append(_spawn(other, name, world))
            group.links.append(Link(own, f"rank {rank}"))
        log_level = logging.getLogger("torchinfer").getEffectiveLevel()
        for rank, link in enumerate(group.links, 1):
            link.send(asdict(config), [rank, world, name, store], log_level)
        Rank(Shard(0, world), name, store).join()
    except BaseException:
        group.close()
        raise
    return group


def _spawn(link: socket.socket, device: str, world: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world, 1)))
    command = [sys.executable, "-m", "torchinfer.rank_process", str(link.fileno())]
    # Ctrl-C reaches a whole group of processes, but the first one decides how its engine ends.
    return subprocess.Popen(command, pass_fds=[link.fileno()], env=environment, stdout=2, start_new_session=True)


def load_ranked(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    options: LoadOptions,
    quantization: str | Mapping[str, str] | None = None,
    moe_mode: str = "dropless",
    moe_capacity_factor: float = 1.25,
    progress: bool = False,
) -> tuple[Decoder, int]:
    """This rank's part of a model, and how many parameters the whole one has. Tensors are put together on the device,
    quantized, as in one process, bit by bit, and cut then. So each rank gets all of the checkpoint: from the storage,
    or, where that is behind a network or read around the page cache, each byte from the rank that reads it for all.

    Raises what `load_model` raises, and:
        ConfigError: the ranks cannot divide the quantized matrices.
    """
    whole, checkpoint = build_empty(checkpoint, model_config, device, quantization, moe_mode, moe_capacity_factor)
    shard = Shard(dist.get_rank(), dist.get_world_size())
    model = divide(whole, shard.world)

    def send(name: str, tensor: Tensor) -> Tensor:
        own = model.divisions[name].of(tensor, shard).to(device)
        return own if own.numel() == tensor.numel() else own.clone(memory_format=torch.contiguous_format)

    share_bytes = max(parameter_bytes(model.local, dtype).values()) if device.type == "cpu" else 0
    deliver = Deliver(send, share_bytes)
    load_weights(whole, checkpoint, dtype, device, progress and shard.rank == 0, options, shard, deliver=deliver)
    loaded = whole.state_dict()
    for name, tensor in tensors_of(whole).items():
        own = tensor if name in loaded else send(name, tensor)  # what no checkpoint has: constants
        _put(model.local, name, own)
    connect(model.local, _all_reduce)
    model.local.gather = _Gather(model_config.vocab_size)
    return model.local, model.num_parameters


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    is_parameter = attribute in dict(module.named_parameters(recurse=False))
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _all_reduce(tensor: Tensor) -> Tensor:
    """The sum of what all ranks have, in its place."""
    dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True, slots=True)
class _Gather:
    """From a rank's columns of logits all of them, without what pads the vocabulary."""

    vocab_size: int

    def __call__(self, logits: Tensor) -> Tensor:
        num_ranks, num_rows = dist.get_world_size(), len(logits)
        found = logits.new_empty(num_ranks * num_rows, logits.shape[1])
        dist.all_gather_into_tensor(found, logits.contiguous())
        return found.view(num_ranks, num_rows, -1).transpose(0, 1).flatten(1)[:, : self.vocab_size]
