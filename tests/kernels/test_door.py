"""The choice of ports by the door: the variable with which a wrong result is bisected."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from torchinfer.kernels.cpu import library

CODE = """
import torch
from torchinfer import kernels

folders = {function.__module__.split(".")[2] for function in kernels.load_ports("cpu").values()}
prepared = kernels.prepare(torch.ones(64, 64))
print(*sorted(folders), "and matrices as they are" if prepared is None else "and matrices of their own")
assert torch.equal(kernels.linear(torch.ones(1, 64), torch.ones(64, 64)), torch.full((1, 64), 64.0))
"""


def choice(**variables: str) -> str:
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_environment_forces_the_reference_of_every_op() -> None:
    assert choice(TORCHINFER_KERNELS="reference") == "reference and matrices as they are"


@pytest.mark.skipif(library.open_library() is None, reason="the CPU library is not built")
def test_otherwise_the_cpu_has_its_own() -> None:
    assert choice(TORCHINFER_KERNELS="") == "cpu reference and matrices of their own"
