"""The CPU library: loading it, its functions, and what it cannot take turned into exceptions.

It is built from src/ by the top-level CMakeLists.txt, knows nothing of Python or torch, and picks its instructions at
run time. A machine without it computes with the reference.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from torchinfer.kernels.cpu.cpus import usable_cpus

logger = logging.getLogger(__name__)

LIBRARY_VARIABLE = "TORCHINFER_CPU_LIBRARY"  # scripts/sanitize has one of its own
PATH = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name("libtorchinfer_cpu.so"))
ISA_VARIABLE = "TORCHINFER_CPU_ISA"
PINNED_VARIABLE = "TORCHINFER_CPU_PINNED"
MOST_THREADS = 1024  # api.cpp takes no more
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype in src/types.h
CACHE_DTYPES = {**DTYPES, torch.int8: 3, torch.float8_e4m3fn: 4}  # CacheDtype
STATUS = {1: "a tensor is not aligned to its elements", 2: "a shape, dtype or size does not fit", 3: "no memory"}

_starting = threading.RLock()  # held while threads of the library are replaced, and until they are counted
_POINTER, _INT32, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
# Name after torchinfer_cpu_ -> arguments, as src/api.cpp has them.
PROTOTYPES: dict[str, tuple[type, ...]] = {
    "choose_level": (ctypes.c_char_p,),
    "num_threads": (),
    "wanted_threads": (),
    "configure": (_INT32, _INT32),
    "pack": (_POINTER, _POINTER, _POINTER),
    "linear": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32),
    "measure_read": (_POINTER, _INT64, _INT32, _INT64),
    "measure_products": (_INT32, _INT64),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _FLOAT, _FLOAT, _INT32),
    "layer_norm": (*(_POINTER,) * 4, *(_INT64,) * 3, _FLOAT, _INT32),
    "attention": (_POINTER,),
    "write_kv": (_POINTER,),
    "quantize": (_POINTER,),
    "rotary": (*(_POINTER,) * 4, *(_INT64,) * 5, _INT32, _INT32),
    "gated_activation": (_POINTER, _POINTER, _INT64, _INT64, _INT64, _INT32, _INT32),
    "attention_layer": (_POINTER,),
    "mlp_layer": (_POINTER,),
    "sample": (_POINTER,),
}


@functools.cache
def open_library() -> ctypes.CDLL | None:
    """The library at the level that the environment names, or the best one; None if there is none, which is logged.

    Raises:
        ValueError: the machine does not have the level that TORCHINFER_CPU_ISA names, or TORCHINFER_CPU_PINNED is
            neither 0 nor 1.
    """
    with _starting:
        return _opened()


@functools.cache  # here too: of threads that come at once, one opens it
def _opened() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        logger.warning("no CPU kernels, PyTorch computes instead: %s; install again with a C++ compiler", error)
        return None
    for name, arguments in PROTOTYPES.items():
        function = getattr(library, f"torchinfer_cpu_{name}")
        function.argtypes, function.restype = arguments, _INT32
    library.torchinfer_cpu_packed_bytes.argtypes = (_POINTER,)
    library.torchinfer_cpu_packed_bytes.restype = _INT64
    library.torchinfer_cpu_measure_products.restype = _INT64
    for name in ("level", "levels"):
        getattr(library, f"torchinfer_cpu_{name}").restype = ctypes.c_char_p
    choose_level(library, os.environ.get(ISA_VARIABLE, ""))
    threads = _start_threads(library, 0, None)
    logger.info("CPU kernels: %s, %d threads", library.torchinfer_cpu_level().decode(), threads)
    return library


def levels(library: ctypes.CDLL) -> list[str]:
    """Names of the levels that this machine has, the best first."""
    names: str = library.torchinfer_cpu_levels().decode()
    return names.split()


def choose_level(library: ctypes.CDLL, name: str) -> None:
    """Use a level from now on, "" for the best. What was packed for another stays valid.

    Raises:
        ValueError: this machine does not have it.
    """
    if library.torchinfer_cpu_choose_level(name.encode()):
        raise ValueError(f"{ISA_VARIABLE}={name!r}, but this machine has {', '.join(levels(library))}: use one of them")


def configure(num_threads: int = 0, is_pinned: bool | None = None) -> None:
    """Set the threads, the caller among them; 0: as many as `usable_cpus`. Not while it computes.

    Pinned: each to one of the CPUs that the process may use, but for the caller, to which the first one is left: all
    that it starts later would be bound to that CPU with it. None: as TORCHINFER_CPU_PINNED says. Forked processes do
    the same. Where the system does not let all threads start, those that it does compute, and one line says so.

    Raises:
        ValueError: more than 1024 threads, or TORCHINFER_CPU_PINNED is neither 0 nor 1.
    """
    _start_threads(loaded(), num_threads, is_pinned)


def _start_threads(library: ctypes.CDLL, num_threads: int, is_pinned: bool | None) -> int:
    """How many there are; who asks the library itself must know that nobody configures it meanwhile."""
    is_pinned = _is_pinned() if is_pinned is None else is_pinned
    with _starting:
        check(library.torchinfer_cpu_configure(num_threads or min(usable_cpus(), MOST_THREADS), is_pinned))
        started: int = library.torchinfer_cpu_num_threads()
        wanted: int = library.torchinfer_cpu_wanted_threads()
    if started < wanted:
        rule = "raise its limit of threads (ulimit -u, TasksMax of the service, pids of the container)"
        logger.warning("CPU kernels: the system let %d of %d threads start: %s", started, wanted, rule)
    return started


def _is_pinned() -> bool:
    value = os.environ.get(PINNED_VARIABLE) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{PINNED_VARIABLE}={value!r} is neither 0 nor 1")
    return value == "1"


def loaded() -> ctypes.CDLL:
    """The library, where a port is called and so it must be there."""
    library = open_library()
    assert library is not None, "ports are only used with the library"
    return library


def check(status: int) -> None:
    """Raise what a function of the library returned, ValueError, if it is not success."""
    if status:
        raise ValueError(f"the CPU kernel was not run: {STATUS[status]}")


def require(is_fit: bool, rule: str, *tensors: Tensor) -> None:
    """Refuse tensors before their memory is handed out.

    Raises:
        ValueError: with the rule, the shapes and dtypes.
    """
    if not is_fit:
        found = ", ".join(
            f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())} on {tensor.device}"
            for tensor in tensors
        )
        raise ValueError(f"{rule}; got {found}" if tensors else rule)


def with_dense_rows(x: Tensor) -> Tensor:
    """x, [T, ...], or a copy, so that only the rows, [...], are apart from each other."""
    stride = 1
    for size, actual in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if actual != stride and size != 1:
            return x.contiguous()
        stride *= size
    return x
