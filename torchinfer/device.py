"""Devices: which are there, how much memory they have, how to wait for them. The only file that imports torch_xla,
besides kernels/tpu."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from torchinfer import spmd
from torchinfer.control_groups import free_memory
from torchinfer.errors import DeviceError

TENSOR_CORES = {"TPU v5 lite": 1, "TPU v5e": 1, "TPU v5": 2, "TPU v5p": 2}  # of a chip that is one device
DEFAULT_CACHE_SHARE = {"cpu": 0.25, "cuda": 0.9, "xla": 0.9}  # of the free memory, after the weights


def resolve_device(name: str, num_chips: int = 1) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `xla`; on CUDA that of this process, of `num_chips` with one each.

    Raises:
        DeviceError: when the device is not there, or has not so many chips.
    """
    name = device_type(name)
    if name == "xla":
        return _xla_device(num_chips)
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device='cuda' was asked for, but torch sees no CUDA device; check the driver, or use cpu")
    if name == "cuda" and torch.cuda.device_count() < num_chips:
        raise DeviceError(
            f"tensor_parallel_size={num_chips} needs a CUDA device for each part of the model, but torch sees "
            f"{torch.cuda.device_count()}: use at most that, or look at CUDA_VISIBLE_DEVICES"
        )
    return torch.device(name)


def device_type(name: str) -> str:
    """`auto` is xla if there is a TPU, else cuda if there is a GPU, else cpu."""
    return ("xla" if _has_tpu() else "cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _has_tpu() -> bool:
    if os.environ.get("PJRT_DEVICE", "").upper() == "TPU":
        return True
    return importlib.util.find_spec("torch_xla") is not None and bool(list(Path("/dev").glob("accel[0-9]*")))


def _xla_device(num_chips: int) -> torch.device:
    if importlib.util.find_spec("torch_xla") is None:
        raise DeviceError("device='xla' needs torch_xla, which is not installed; pip install 'torchinfer[xla]'")
    os.environ.setdefault("PJRT_DEVICE", "TPU" if _has_tpu() else "CPU")
    import torch_xla

    if num_chips == 1 and spmd.is_started():
        raise DeviceError(
            "tensor_parallel_size=1, but XLA programs of this process run on several chips since an engine asked for "
            "them: start this engine in a process of its own"
        )
    try:
        if num_chips > 1:
            spmd.start(num_chips)
        return torch.device(torch_xla.device())
    except RuntimeError as error:
        raise DeviceError(f"XLA device {os.environ['PJRT_DEVICE']} cannot be started: {error}") from error


def tensor_cores(device: torch.device) -> int | None:
    """Cores of a TPU that kernels/tpu has kernels for, v5e and v5p; None elsewhere."""
    if device.type != "xla" or os.environ.get("PJRT_DEVICE") != "TPU":
        return None
    import torch_xla.core.xla_model as xla_model

    kind = spmd.ask_chip().kind if spmd.is_started() else xla_model.xla_device_kind(device)
    return TENSOR_CORES.get(kind)


def bound_cpu_caches() -> None:
    """Keep oneDNN, which torch calls on the CPU, from remembering a program and memory for every batch size it met.

    By default it keeps 1,024: a gigabyte for a model of 5 million parameters. Making one anew costs about half a
    millisecond. Takes effect if nothing was computed before.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def has_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether numbers of a dtype can be made on a device, and read again."""
    try:
        return torch.ones(1, device=device).to(dtype).float().item() == 1
    except (RuntimeError, TypeError):  # what torch and its backends raise for a dtype that they lack
        return False


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own threads stay asleep: they would spin on the cores that the CPU library computes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def free_memory_bytes(device: torch.device, used_bytes: int = 0) -> int:
    """Bytes that are free on the device now. `used_bytes`: what the caller has on each of several TPUs, which cannot be
    asked for it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "xla" and os.environ.get("PJRT_DEVICE") == "TPU":
        if spmd.is_started():
            return spmd.ask_chip().memory_bytes - used_bytes
        import torch_xla.core.xla_model as xla_model

        memory = xla_model.get_memory_info(device)
        return int(memory["bytes_limit"]) - int(memory["bytes_used"])
    return _free_host_bytes() // (spmd.num_own_chips() if device.type == "xla" else 1)


def _free_host_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    fields = dict(line.split(":", 1) for line in lines)
    if "MemAvailable" not in fields:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    available = int(fields["MemAvailable"].split()[0]) * 1024
    allowed = free_memory()
    return available if allowed is None else min(available, allowed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xla":
        import torch_xla.core.xla_model as xla_model

        xla_model.wait_device_ops()


def host_ints(size: int, device: torch.device) -> torch.Tensor:
    """int32 [size] on the host, pinned for CUDA: torch hands its memory out again when all copies of it are done."""
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")


def start_copies(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Copies on the host, and a call that waits for them: for what was launched so far, and not for what comes later.

    Only CUDA copies; elsewhere the tensors themselves come back, and nothing has to be waited for.
    """
    if not tensors or tensors[0].device.type != "cuda":
        return tensors, lambda: None
    copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
    for copy, each in zip(copies, tensors, strict=True):
        copy.copy_(each, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return copies, done.synchronize


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """CUDA: what a call takes at most of the device's memory beside what is taken before; its memory is given back."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    release_memory(device)
    return peak


def release_memory(device: torch.device) -> None:
    """Give back to the device what torch holds of it and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def total_memory_bytes(device: torch.device) -> int:
    """CUDA: bytes of the device, used or not."""
    return int(torch.cuda.mem_get_info(device)[1])


def flush(device: torch.device) -> None:
    """XLA: run what was recorded, and wait until it is done and transfers have left the host's memory."""
    import torch_xla

    torch_xla.sync(wait=True)
    synchronize(device)


def count_compilations() -> int:
    """XLA programs compiled by this process, those read from the persistent cache not counted."""
    import torch_xla.debug.metrics as metrics

    # A timer, not the counter UncachedCompile, which includes what comes from the persistent cache.
    timer = metrics.metric_data("CompileTime")
    return int(timer[0]) if timer else 0


def keep_compiled_programs(folder: Path) -> None:
    """Keep XLA's compiled programs in a folder between processes. Call before the first program is compiled."""
    import torch_xla.runtime

    folder.mkdir(parents=True, exist_ok=True)
    torch_xla.runtime.initialize_cache(str(folder), readonly=False)


def mark_as_donated(tensors: list[torch.Tensor]) -> None:
    """Let the program that is being traced write these inputs in place."""
    for tensor in tensors:
        torch.ops.xla.dynamo_set_buffer_donor_(tensor, True)
