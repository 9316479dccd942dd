"""Matrices of 4 bits in the order in which the CUDA kernel multiplies them: the numbers that they had before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer import kernels
from torchinfer.kernels.cuda.gated_activation import gated_activation as cuda_gated_activation
from torchinfer.kernels.cuda.grouped_gated_matmul import grouped_gated_matmul
from torchinfer.kernels.cuda.grouped_matmul import grouped_matmul
from torchinfer.kernels.cuda.linear import linear
from torchinfer.kernels.cuda.linear_of_gated import linear_of_gated
from torchinfer.kernels.cuda.linear_of_norm import linear_of_norm
from torchinfer.kernels.cuda.matrix import RUN, Matrix
from torchinfer.kernels.cuda.packed_weight import packed, prepare
from torchinfer.kernels.cuda.rms_norm import rms_norm
from torchinfer.kernels.reference.dequantize import dequantize, unpack_nibbles
from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.kernels.reference.quantize_rows import quantize_rows
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import assert_close, moved, random_matrix, rows_beside_nan

SCHEMES_OF_4_BITS = ["int4", "int4_g64", "int4_g32", "int4_w4a8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(x: Tensor, weight: QuantizedWeight) -> Tensor:
    if weight.activations == "none":
        return x.double() @ dequantize(weight).double().T
    numbers, scale = quantize_rows(x, torch.int8, weight.input_scale)
    return numbers.double() * scale.double()[..., None] @ dequantize(weight).double().T


def ready(weight: QuantizedWeight, device: str) -> Matrix:
    prepared = prepare(moved(weight, device))
    assert prepared is not None and prepared.is_packed
    return prepared


@pytest.mark.parametrize("parts", [2, 4])
def test_each_place_of_a_unit_holds_the_inputs_of_one_product(parts: int) -> None:
    values = torch.randint(0, 256, (5, 3 * RUN * parts // 2)).to(torch.uint8)
    numbers, turned = unpack_nibbles(values).view(5, 3, parts, RUN), packed(values, parts)
    words = turned.view(torch.int32).view(5, 3, -1) if parts == 4 else turned.view(5, 3, -1)
    for part in range(parts):
        found = words >> 4 * part
        pairs = torch.stack((found & 15, found >> 16 & 15), -1).flatten(2) if parts == 4 else found & 15
        assert torch.equal(pairs, numbers[:, :, part].to(pairs.dtype))


# Steps of 64 and 128 inputs, split and not; a last step of half of one; many rows.
@pytest.mark.parametrize("shape", [(1, 128, 64), (5, 2048, 33), (33, 384, 70), (130, 256, 34)], ids=str)
@pytest.mark.parametrize("name", SCHEMES_OF_4_BITS)
def test_equals_float64(gpu: str, name: str, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    weight = random_matrix(name, outputs, inputs)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(3)).bfloat16()
    for dtype in DTYPES if rows in (1, 130) else DTYPES[1:2]:
        x = rows_beside_nan(rows, inputs, dtype)
        actual = linear(x.to(gpu), ready(weight, gpu), bias.to(gpu).to(dtype)).cpu()
        assert actual.dtype == dtype
        assert_close(actual, exact(x, weight) + bias.double())


@pytest.mark.parametrize(("inputs", "group"), [(192, 192), (1216, 1216), (192, 64)])
def test_inputs_that_are_no_whole_steps_and_zeros_of_groups(gpu: str, inputs: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (40, inputs // 2), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 16, (40, inputs // group), generator=generator).to(torch.uint8)
    weight = QuantizedWeight(values, torch.rand(40, inputs // group, generator=generator) / 500, 1, group, zero=zero)
    x = rows_beside_nan(3, inputs)
    assert_close(linear(x.to(gpu), ready(weight, gpu), None).cpu(), exact(x, weight))


@pytest.mark.parametrize("name", SCHEMES_OF_4_BITS)
def test_experts(gpu: str, name: str) -> None:
    sizes, x = [3, 0, 17, 1], rows_beside_nan(23, 256)
    matrices = [random_matrix(name, 74, 256, seed) for seed in range(4)]
    stacked = {f: torch.stack([getattr(m, f) for m in matrices]) for f in ("values", "scale")}
    prepared, group_sizes = ready(replace(matrices[0], **stacked), gpu), torch.tensor(sizes, dtype=torch.int32).to(gpu)
    expected, start = torch.zeros(23, 74, dtype=torch.float64), 0
    for matrix, size in zip(matrices, sizes, strict=True):
        expected[start : start + size], start = exact(x[start : start + size], matrix), start + size
    assert prepared.shape == (4, 74, 256) and prepared.numel() == 4 * 74 * 256
    assert_close(grouped_matmul(x.to(gpu), prepared, group_sizes).cpu(), expected)
    gated = grouped_gated_matmul(x.to(gpu), prepared, group_sizes, "silu").cpu()
    assert_close(gated, gated_activation(expected, "silu"))


@pytest.mark.parametrize("name", SCHEMES_OF_4_BITS)
def test_a_row_has_the_same_bits_alone_and_with_others(gpu: str, name: str) -> None:
    x, prepared = rows_beside_nan(13, 512).to(gpu), ready(random_matrix(name, 70, 512), gpu)
    together = linear(x, prepared, None)
    for row in (0, 7, 12):
        assert torch.equal(linear(x[row : row + 1], prepared, None)[0], together[row])


def test_no_copy_of_the_inputs_is_made(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = __import__("torchinfer.kernels.cuda.matmul", fromlist=["matmul_kernel"]).matmul_kernel
    seen: list[Tensor] = []
    monkeypatch.setattr(type(kernel), "__getitem__", lambda _, grid: lambda *a, **named: seen.append(named.get("x")))
    x = rows_beside_nan(3, 256)
    linear(x, ready(random_matrix("int4", 70, 256), "cpu"), None)
    assert seen[0].data_ptr() == x.data_ptr() and seen[0].stride() == x.stride()


def test_in_the_memory_of_the_matrix_if_it_may_be_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchinfer.kernels.cuda.packed_weight.BLOCK_BYTES", 1000)  # a few rows at a time
    weight = random_matrix("int4", 70, 256)
    kept, copy = weight.values.clone(), prepare(weight)
    assert copy is not None and torch.equal(weight.values, kept)
    turned = prepare(weight, may_overwrite=True)
    assert turned is not None and turned.values.data_ptr() == weight.values.data_ptr()
    assert torch.equal(turned.values, copy.values) and not torch.equal(turned.values, kept)
    assert turned.num_bytes == sum(t.numel() * t.element_size() for t in (weight.values, weight.scale))


def test_what_has_no_tiles_or_no_whole_units_stays_as_it_is() -> None:
    weight = random_matrix("int4_g64", 8, 192)
    assert prepare(torch.ones(4, 64)) is None and prepare(random_matrix("int8", 8, 128)) is None
    assert prepare(replace(weight, group_index=torch.zeros(1, 192, dtype=torch.int32))) is None
    assert prepare(replace(weight, column_block=48)) is None
    whole = replace(weight, scale=weight.scale[:, :1], column_block=192)
    assert prepare(whole) is not None and prepare(replace(whole, values=weight.values[:, :84])) is None  # 168 inputs
    parts = replace(random_matrix("int4_w4a8", 8, 128), input_scale=torch.ones(2), part_rows=(4, 4))
    assert prepare(parts) is None


def test_norms_and_gated_activations_are_rounded_on_the_way_to_it(gpu: str) -> None:
    prepared = ready(random_matrix("int4_w4a8", 70, 256), gpu)
    x, factor = torch.randn(5, 256).bfloat16().to(gpu), torch.rand(256).bfloat16().to(gpu)
    expected = linear(rms_norm(x, factor, 1e-6, 0.0), prepared, None)
    assert_close(linear_of_norm(x, factor, 1e-6, 0.0, prepared), expected, torch.bfloat16)
    pairs = torch.randn(5, 512).bfloat16().to(gpu)
    expected = linear(cuda_gated_activation(pairs, "silu"), prepared, None)
    assert torch.equal(linear_of_gated(pairs, "silu", prepared), expected)


def test_no_rows_and_rows_that_do_not_fit(gpu: str) -> None:
    prepared = ready(random_matrix("int4", 70, 256), gpu)
    assert linear(torch.empty(0, 256, device=gpu), prepared, None).shape == (0, 70)
    with pytest.raises(ValueError, match=r"x \[N, 256\].*\[3, 128\]"):
        linear(torch.ones(3, 128, device=gpu), prepared, None)
    with pytest.raises(ValueError, match="float64"):
        linear(torch.ones(3, 256, device=gpu, dtype=torch.float64), prepared, None)


def test_models_are_packed_when_they_are_prepared(gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchinfer.loader import Checkpoint, load_model
    from torchinfer.models.config import ModelConfig
    from torchinfer.testing import PagedDriver, save_random_checkpoint, tiny_config

    save_random_checkpoint(tiny_config("llama-dynamic"), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    config = ModelConfig.from_dict(checkpoint.config)
    model = load_model(checkpoint, config, torch.float32, torch.device(gpu), quantization="int4_g32")
    monkeypatch.setattr(kernels, "_folders", {gpu: "reference"})
    monkeypatch.setattr(kernels, "_loaded", {})
    expected, count = PagedDriver(model).step({"a": [2, 3, 4, 5]})["a"], model.num_parameters()
    monkeypatch.setattr(kernels, "_folders", {gpu: "cuda"})
    monkeypatch.setattr(kernels, "_loaded", {})
    model.prepare()
    held = [m for m in model._matrices() if isinstance(m, Matrix)]
    assert len(held) >= 4 * config.num_layers and model.num_parameters() == count
    assert_close(PagedDriver(model).step({"a": [2, 3, 4, 5]})["a"], expected, torch.bfloat16)
