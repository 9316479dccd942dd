"""The levels of the CPU library, each forced in turn; and where the kernels for CUDA run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torchinfer.kernels.cpu import library

OPENED = library.open_library()
LEVELS = library.levels(OPENED) if OPENED else []


@pytest.fixture(params=LEVELS or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every level that this machine runs."""
    if OPENED is None:
        pytest.skip("the CPU library is not built")
    library.choose_level(OPENED, request.param)
    yield request.param
    library.choose_level(OPENED, "")


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of the CPU library, more than the machine may have."""
    if OPENED is None:
        pytest.skip("the CPU library is not built")
    library.configure(request.param)
    yield request.param
    library.configure()


@pytest.fixture
def gpu() -> str:
    """The device of the kernels for CUDA: a GPU, or where there is none the CPU, in Triton's interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    triton = pytest.importorskip("triton")
    from torchinfer.kernels.cuda import interpreter

    assert triton.knobs.runtime.interpret, "tests/conftest.py sets TRITON_INTERPRET before triton is imported"
    interpreter.repair()
    return "cpu"
