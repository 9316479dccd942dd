"""One XLA program on all chips (GSPMD), written from the point of view of a chip.

A tensor on several chips is one tensor to torch: what they have, one behind the other along the dimension in which it
is cut, or what each of them has a copy of. Inside of a program `to_local` gives a chip's share of it; what is computed
from shares is each chip's own, as it is on one chip, kernels too, and XLA adds nothing to it. `all_reduce` adds up what
chips have, `reshard` cuts it along another dimension, `to_global` gives what they have together. Tensors are put on the
chips in their final places, and never change them: a tensor that torch_xla 2.9 has to move costs a program a step.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchinfer.errors import DeviceError
from torchinfer.hosts import find_hosts

_QUESTION = """
import torch_xla
import torch_xla.core.xla_model as xla_model
device = torch_xla.device()
print(xla_model.xla_device_kind(device))
print(xla_model.get_memory_info(device)["bytes_limit"])
"""
REPLICATED = -1  # in place of a dimension: every chip has all of the tensor
STACKED = 0  # the dimension of tensors of which each chip has one of its own, whatever is in it


def start(num_chips: int) -> None:
    """Let XLA run programs on `num_chips` chips: all of this process's slice, with PJRT_DEVICE set before. XLA's CPU
    has as many as it is asked for when it starts, and never those of other processes.

    Raises:
        ConfigError: the hosts of the slice are named wrongly, see `find_hosts`.
        DeviceError: there are more or fewer, some are on hosts without a process that follows, or XLA has run programs
            on one chip in this process.
    """
    import torch_xla.runtime as runtime

    if not runtime.is_spmd() and _xlac()._xla_get_spmd_config_is_locked():
        raise DeviceError(
            f"tensor_parallel_size={num_chips}, but this process has used XLA on one chip, which cannot be changed: "
            "start the engine in a process of its own"
        )
    if os.environ["PJRT_DEVICE"] == "CPU":
        os.environ.setdefault("CPU_NUM_DEVICES", str(num_chips))
    elif not runtime.is_spmd():
        ask_chip()
    found, own = int(runtime.global_runtime_device_count()), len(own_chips())
    hosts = find_hosts()
    num_hosts = 1 if hosts is None or os.environ["PJRT_DEVICE"] == "CPU" else len(hosts.names)
    if own * num_hosts != found:
        raise DeviceError(
            f"tensor_parallel_size={num_chips}, but of {found} chips this process has {own}, and TPU_WORKER_HOSTNAMES "
            f"names {num_hosts} host{'s' if num_hosts > 1 else ''}: it must name all of them, in all of their pods, or "
            "take a topology of one host, such as v5e 2x4 (ct5lp-hightpu-8t) or v5p 2x2x1"
        )
    if found != num_chips:
        kind = os.environ["PJRT_DEVICE"]
        fewer = "TPU_VISIBLE_CHIPS shows a process fewer" if kind == "TPU" else "CPU_NUM_DEVICES is their number"
        raise DeviceError(
            f"tensor_parallel_size={num_chips}, but this process has {found} {kind} chip{'s' if found > 1 else ''}, "
            f"and an XLA program runs on all of them: use tensor_parallel_size={found} ({fewer}, before XLA starts)"
        )
    if not runtime.is_spmd():
        runtime.use_spmd()


def num_own_chips() -> int:
    """Chips of this process that programs run on."""
    return len(own_chips()) if is_started() else 1


def is_started() -> bool:
    """Whether XLA runs programs on several chips in this process."""
    return os.environ.get("XLA_USE_SPMD") == "1"


def own_chips() -> list[int]:
    """The numbers, among all chips, of those of this process."""
    return [int(name.rpartition(":")[2]) for name in _xlac()._xla_get_runtime_devices()]


@dataclass(frozen=True, slots=True)
class Chip:
    """What a TPU says of itself."""

    kind: str  # such as TPU v5 lite
    memory_bytes: int  # that programs can have


@functools.cache
def ask_chip() -> Chip:
    """Ask a TPU of this host, before XLA starts here: in a process of its own, because torch_xla 2.9 has no answers
    where programs are for several chips.

    Raises:
        DeviceError: the process failed, with its last words.
    """
    done = subprocess.run([sys.executable, "-c", _QUESTION], capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceError(f"the TPU does not say what it is: {words}; look whether another process has it")
    kind, memory_bytes = done.stdout.splitlines()[-2:]
    return Chip(kind, int(memory_bytes))


def put(share: Callable[[int], Tensor], dim: int, num_chips: int) -> Tensor:
    """Send each chip of this process its share, a tensor on the CPU that nobody writes to any more."""
    shares = [share(chip).contiguous() for chip in own_chips()]
    return _tensor(_xlac()._global_tensor_from_cpu_shards(shares, *_placing(shares[0].shape, dim, num_chips)))


def put_everywhere(tensor: Tensor, num_chips: int) -> Tensor:
    """Send every chip a tensor."""
    return put(lambda chip: tensor, REPLICATED, num_chips)


def zeros(shape: Sequence[int], dtype: torch.dtype, dim: int, num_chips: int) -> Tensor:
    """A tensor of zeros, made on the chips; `shape` is that of a share."""
    import torch_xla

    sharding, whole = _placing(shape, dim, num_chips)
    tensor = torch.zeros(whole, dtype=dtype, device=torch_xla.device())
    _xlac()._xla_mark_sharding(tensor, sharding)
    torch_xla.sync(wait=True)
    return tensor


def placeholder(shape: tuple[int, ...], dtype: torch.dtype, dim: int, num_chips: int) -> Tensor:
    """As `zeros`, without memory: for programs that are compiled and do not run."""
    sharding, whole = _placing(shape, dim, num_chips)
    tensor = local_placeholder(tuple(whole), dtype)
    _xlac()._xla_annotate_custom_sharding(tensor, sharding)
    return _tensor(tensor)


def local_placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on one chip without memory."""
    import torch_xla.core.xla_builder as xla_builder

    if dtype != torch.float8_e4m3fn:
        return _tensor(xla_builder.create_placeholder_tensor(shape, dtype))
    # Only that function's table of types lacks it in torch_xla 2.9.
    return _tensor(_xlac()._xla_create_placeholder_tensor(xla_builder.mkshape("f8e4m3fn", shape).shape))


def whole_shape(share: Sequence[int], dim: int, num_chips: int) -> torch.Size:
    """Of what all chips have together."""
    return torch.Size(size * num_chips if at == dim else size for at, size in enumerate(share))


def to_local(tensor: Tensor, dim: int, num_chips: int) -> Tensor:
    """A chip's share of a tensor that was put in its place before the program."""
    return _tensor(torch.ops.torchinfer.spmd_to_local(tensor, dim, num_chips))


def to_global(tensor: Tensor, dim: int, num_chips: int) -> Tensor:
    """What all chips have, along `dim`, as a tensor that stays where it is; REPLICATED: they have the same."""
    return _tensor(torch.ops.torchinfer.spmd_to_global(tensor, dim, num_chips))


def reshard(tensor: Tensor, source: int, target: int, num_chips: int) -> Tensor:
    """A chip's share along `target` of what chips have along `source`, which its number divides evenly: by an
    all-to-all. To REPLICATED: all of it, by an all-gather; from there nothing is sent."""
    whole = to_global(tensor, source, num_chips)
    assert target == REPLICATED or whole.shape[target] % num_chips == 0, f"{whole.shape} among {num_chips} chips"
    return to_local(whole, target, num_chips)


def all_reduce(tensor: Tensor, num_chips: int) -> Tensor:
    """The sum of what all chips have."""
    return _tensor(torch.ops.torchinfer.spmd_all_reduce(tensor, num_chips))


@torch.library.custom_op("torchinfer::spmd_to_local", mutates_args=(), device_types="xla")
def _to_local(tensor: Tensor, dim: int, num_chips: int) -> Tensor:
    _xlac()._xla_mark_sharding(tensor, _sharding(tensor.ndim, dim, num_chips))  # nothing is done if it is that already
    return _tensor(_xlac()._spmd_full_to_shard_shape(tensor))


@_to_local.register_fake
def _(tensor: Tensor, dim: int, num_chips: int) -> Tensor:
    shape = list(tensor.shape)
    if dim != REPLICATED:
        shape[dim] //= num_chips
    return tensor.new_empty(shape)


@torch.library.custom_op("torchinfer::spmd_to_global", mutates_args=(), device_types="xla")
def _to_global(tensor: Tensor, dim: int, num_chips: int) -> Tensor:
    from torch_xla.distributed.spmd.xla_sharding import ShardingType

    _xlac()._mark_manual_sharding(tensor, _xlac().OpSharding([], [], [], ShardingType.MANUAL))
    sharding, shape = _placing(tensor.shape, dim, num_chips)
    return _tensor(_xlac()._spmd_shard_to_full_shape(tensor, sharding, list(shape), tensor.dtype))


@_to_global.register_fake
def _(tensor: Tensor, dim: int, num_chips: int) -> Tensor:
    return tensor.new_empty(whole_shape(tensor.shape, dim, num_chips))


@torch.library.custom_op("torchinfer::spmd_all_reduce", mutates_args=(), device_types="xla")
def _all_reduce(tensor: Tensor, num_chips: int) -> Tensor:
    return _tensor(_xlac()._xla_spmd_all_reduce("sum", tensor, 1.0, [list(range(num_chips))]))


@_all_reduce.register_fake
def _(tensor: Tensor, num_chips: int) -> Tensor:
    return torch.empty_like(tensor)


def _placing(shape: Sequence[int], dim: int, num_chips: int) -> tuple[Any, torch.Size]:
    return _sharding(len(shape), dim, num_chips), whole_shape(shape, dim, num_chips)


@functools.lru_cache
def _sharding(ndim: int, dim: int, num_chips: int) -> Any:
    """XLA's name for a place: one axis of chips, in the order of their numbers."""
    import torch_xla.distributed.spmd as spmd

    mesh = spmd.Mesh(np.arange(num_chips), (num_chips,), ("model",))
    return mesh.get_op_sharding(tuple("model" if at == dim else None for at in range(ndim)))


def _xlac() -> Any:
    import torch_xla

    return torch_xla._XLAC  # type: ignore[attr-defined]


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
