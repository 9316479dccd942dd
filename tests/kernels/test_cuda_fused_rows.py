"""Norms and gated activations that are rounded to 8 bits where they are computed: the results of two steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer.kernels.cuda import matmul
from torchinfer.kernels.cuda.gated_activation import gated_activation
from torchinfer.kernels.cuda.linear_of_gated import linear_of_gated
from torchinfer.kernels.cuda.linear_of_norm import linear_of_norm
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul
from torchinfer.kernels.cuda.rms_norm import rms_norm
from torchinfer.kernels.reference.linear_of_gated import linear_of_gated as gated_reference
from torchinfer.kernels.reference.linear_of_norm import linear_of_norm as norm_reference
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import assert_close

SHAPES = [(1, 128, 64), (5, 250, 33), (7, 1100, 12)]  # rows, inputs (whole groups of them with 4 bits), outputs
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = ["int8_w8a8", "fp8_w8a8", "fp8_block_w8a8", "int4_w4a8"]


def make_weight(name: str, rows: int, columns: int, device: str) -> QuantizedWeight:
    weight = torch.randn(rows, columns) / columns**0.5
    return SCHEMES[name].weight({k: v.to(device) for k, v in SCHEMES[name].pack(weight).items()}, columns, ())


def inside(x: Tensor, device: str) -> Tensor:
    """The same rows between others that are NaN."""
    around = torch.full((len(x) + 2, x.shape[1] + 3), torch.nan, dtype=x.dtype)
    around[1:-1, 1:-2] = x
    return around.to(device)[1:-1, 1:-2]


@pytest.fixture
def only_fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rounding by itself is not to be had."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("rows were rounded by themselves")

    return lambda: monkeypatch.setattr(matmul, "quantize_rows", refuse)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_normalized_rows(
    gpu: str, name: str, dtype: torch.dtype, shape: tuple[int, int, int], only_fused: Any
) -> None:
    rows, columns, outputs = shape
    columns = -(-columns // 128) * 128 if name == "int4_w4a8" else columns
    weight = make_weight(name, outputs, columns, gpu)
    x, factor = inside(torch.randn(rows, columns).to(dtype), gpu), (1 + torch.randn(columns) / 10).to(dtype).to(gpu)
    one_by_one = [quantized_matmul(rms_norm(x, factor, 1e-6, offset), weight) for offset in (0.0, 1.0)]
    only_fused()
    for offset, expected in zip((0.0, 1.0), one_by_one, strict=True):
        actual = linear_of_norm(x, factor, 1e-6, offset, weight)
        # A last bit of the norm may decide between two numbers of 8 bits; with others or alone it is the same one.
        assert actual.dtype == dtype
        assert_close(actual, expected, torch.bfloat16)
        assert_close(actual[-1:], linear_of_norm(x[-1:], factor, 1e-6, offset, weight))
        assert_close(actual, norm_reference(x, factor, 1e-6, offset, weight), torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_products_of_gated_activations(
    gpu: str, name: str, activation: str, shape: tuple[int, int, int], only_fused: Any
) -> None:
    rows, columns, outputs = shape
    columns = -(-columns // 128) * 128 if name == "int4_w4a8" else columns
    weight = make_weight(name, outputs, columns, gpu)
    inputs = [inside(torch.randn(rows, 2 * columns).to(dtype), gpu) for dtype in DTYPES]
    one_by_one = [quantized_matmul(gated_activation(x, activation), weight) for x in inputs]
    only_fused()
    for x, expected in zip(inputs, one_by_one, strict=True):
        actual = linear_of_gated(x, activation, weight)
        assert actual.dtype == x.dtype and torch.equal(actual, expected)
        assert_close(actual, gated_reference(x, activation, weight), torch.bfloat16)


def test_a_broken_row_does_not_look_sound_and_harms_no_other(gpu: str) -> None:
    weight = make_weight("int8_w8a8", 16, 64, gpu)
    x = torch.randn(3, 64)
    x[1, 5] = torch.nan
    for actual in (
        linear_of_norm(x.to(gpu), torch.ones(64, device=gpu), 1e-6, 0.0, weight),
        linear_of_gated(torch.cat([x, x], 1).to(gpu), "silu", weight),
    ):
        assert actual[1].isnan().all() and actual[::2].isfinite().all()


def test_a_scale_that_is_given_and_plain_inputs_go_one_after_the_other(gpu: str) -> None:
    given = replace(make_weight("int8_w8a8", 16, 64, gpu), input_scale=torch.full((1,), 0.05, device=gpu))
    x, factor = torch.randn(5, 64, device=gpu), torch.ones(64, device=gpu)
    for weight in (given, make_weight("int8", 16, 64, gpu)):
        expected = quantized_matmul(rms_norm(x, factor, 1e-6, 0.0), weight)
        assert torch.equal(linear_of_norm(x, factor, 1e-6, 0.0, weight), expected)
        pairs = torch.cat([x, x], 1)
        expected = quantized_matmul(gated_activation(pairs, "gelu"), weight)
        assert torch.equal(linear_of_gated(pairs, "gelu", weight), expected)
