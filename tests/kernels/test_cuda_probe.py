"""Without what Triton needs at its first launch PyTorch computes, and the log says what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is missing elsewhere is here")

PROGRAM = """
import logging, os, sys
from triton.backends.nvidia.driver import CudaDriver
from torchinfer import kernels

CudaDriver.is_active = staticmethod(lambda: True)  # as with a card
logging.basicConfig(level=logging.INFO)
# The driver's library, then a compiler, then headers; with a cache in which nobody has built anything.
for env in ({}, {"TRITON_LIBCUDA_PATH": "/nowhere", "PATH": "/nowhere"}, {"CC": "/nowhere/gcc"}, {"CC": "/bin/false"}):
    os.environ.update(env)
    kernels._folders.clear()
    kernels._loaded.clear()
    kernels.load_ports("cuda")
"""
REASONS = (
    "AssertionError: libcuda.so cannot found",
    "RuntimeError: Failed to find C compiler",
    "FileNotFoundError: .*/nowhere/gcc",
    "CalledProcessError: .*/bin/false.* returned non-zero",
)


def test_what_is_missing_is_named_and_pytorch_computes(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_LIBCUDA_PATH")}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING:torchinfer.kernels:")]
    for line, reason in zip(warnings, REASONS, strict=True):
        pattern = f"PyTorch computes in place of the kernels for CUDA, .*: {reason}.*needs .*Python.h.* libcuda.so.1"
        assert re.search(pattern, line), line
    assert done.stderr.count("INFO:torchinfer.kernels:kernels for cuda: reference for linear, rms_norm") == len(REASONS)
