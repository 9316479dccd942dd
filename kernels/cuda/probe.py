"""Whether Triton can launch kernels here: before its first launch it builds an extension of Python that calls CUDA."""

from __future__ import annotations

import subprocess

import triton
from triton.errors import TritonError

NEEDS = (
    "Triton builds what launches its kernels, once for a machine, and needs for it a C compiler (gcc, clang, or CC), "
    "Python's headers (Python.h: python3-dev) and libcuda.so.1 in the list of ldconfig"
)


def problem() -> str | None:
    """Build it, or take what was built before; what is wrong if that fails, and None if nothing is."""
    try:
        _ = triton.runtime.driver.active.utils
    # An assertion where there is no libcuda, RuntimeError without a compiler, and others of what it calls.
    except (AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError, TritonError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{reason}. {NEEDS}"
    return None
