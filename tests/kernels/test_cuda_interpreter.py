"""Triton's interpreter refuses what its compiler for a card refuses, and rounds as a card does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

SIZE = 16


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(a: tl.tensor, b: tl.tensor, result: tl.tensor, SIZE: tl.constexpr, INPUTS: tl.constexpr) -> None:
    row, inputs = tl.arange(0, SIZE), tl.arange(0, INPUTS)
    left = tl.load(a + row[:, None] * INPUTS + inputs[None, :])
    right = tl.load(b + inputs[:, None] * SIZE + row[None, :])
    tl.store(result + row[:, None] * SIZE + row[None, :], tl.dot(left, right).to(result.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def nothing_kernel(result: tl.tensor) -> None:
    pass


def multiply(a: Tensor, b: Tensor) -> Tensor:
    result = torch.empty(SIZE, SIZE, device=a.device)
    product_kernel[(1,)](a, b, result, SIZE=SIZE, INPUTS=a.shape[1])
    return result


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.int8, 32)], ids=str)
def test_a_product_with_fewer_inputs_than_the_matrix_unit_takes_is_refused(
    gpu: str, dtype: torch.dtype, least: int
) -> None:
    a = torch.ones(SIZE, least, dtype=dtype, device=gpu)
    assert torch.equal(multiply(a, a.T.contiguous()), torch.full((SIZE, SIZE), float(least), device=gpu))
    narrow = a[:, : least // 2].contiguous()
    with pytest.raises(Exception, match=f"K >= {least}"):
        multiply(narrow, narrow.T.contiguous())


def test_a_grid_that_a_card_does_not_have_is_refused(gpu: str) -> None:
    result = torch.zeros(1, device=gpu)
    nothing_kernel[(3, 2)](result)
    with pytest.raises((AssertionError, RuntimeError), match=r"no grid|invalid argument"):
        nothing_kernel[(1, 65536)](result)
