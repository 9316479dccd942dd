"""fp8 and fbgemm_fp8: blocks against transformers' own dequantization, the rest worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from torchinfer.errors import CheckpointError
from torchinfer.testing import assert_close

FP8 = torch.float8_e4m3fn
BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "modules_to_not_convert": ["lm_head"],
}
TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 2.0, "modules_to_not_convert": ["lm_head"]}


def in_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As DeepSeek and Qwen publish it."""
    rows, columns = weight.shape
    blocks = weight.view(rows // 32, 32, columns // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).view(rows, columns).to(FP8)
    truth: Any = Fp8Dequantize(None)
    return {".weight": values, ".weight_scale_inv": scale}, truth._dequantize_one(values, scale)


def by_output(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As FBGEMM writes it."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).to(FP8)
    return {".weight": values, ".weight_scale": scale}, values.float() * scale


class Whole:
    """One scale for a matrix, as AutoFP8 and transformers write it, and one for its inputs where they are static."""

    def __init__(self, scale: str, input_scale: str | None) -> None:
        self.scale, self.input_scale = scale, input_scale
        self.input_scales: list[float] = []

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().max() / 448
        values = (weight / scale).to(FP8)
        written = {".weight": values, self.scale: scale}
        if self.input_scale is not None:
            self.input_scales.append(0.003 + 0.001 * len(self.input_scales))
            written[self.input_scale] = torch.tensor(self.input_scales[-1])
        return written, values.float() * scale


def rounded(x: Tensor, scale: float | None, bound: float = 1e30) -> Tensor:
    """Inputs as the numbers that they are rounded to, each token by its largest or all with a given scale."""
    rows = []
    for row in x:
        own = min(float(row.abs().max()), bound) / 448 if scale is None else scale
        rows.append((row / own).clamp(-448, 448).to(FP8).float() * own)
    return torch.stack(rows)


def in_groups(x: Tensor, size: int) -> Tensor:
    """Inputs as the numbers that they are rounded to, each group of a token by its largest."""
    return torch.cat([rounded(group, None) for group in x.split(size, 1)], 1)


def test_numbers_of_blocks_equal_those_of_transformers(bed):
    bed.quantize(in_blocks, BLOCKS)
    assert_close(bed.logits_of_whole_inputs(), bed.expected_logits())


@pytest.mark.parametrize("block", [[32, 32], [64, 32], [32, 64]], ids=str)
def test_products_of_blocks_equal_those_of_inputs_rounded_in_groups(bed, block):
    """Also where blocks of outputs do not begin with k and v, and where a group is all inputs of a matrix."""

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = block
        blocks = weight.view(len(weight) // min(rows, len(weight)), -1, weight.shape[1] // columns, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        values = (blocks / scale[:, None, :, None]).to(FP8)
        numbers = values.float() * scale[:, None, :, None]
        return {".weight": values.view(weight.shape), ".weight_scale_inv": scale}, numbers.view(weight.shape)

    bed.quantize(quantize, {**BLOCKS, "weight_block_size": block})
    x = {inputs: torch.randn(5, inputs) * torch.rand(inputs) ** 4 for inputs in (64, 128)}
    for name, product in bed.products(x.__getitem__):
        matrices = [bed.numbers[layer] for layer in bed.matrices(name)]
        inputs = in_groups(x[matrices[0].shape[1]], block[1])
        assert_close(product, torch.cat([inputs @ numbers.T for numbers in matrices], 1))


def test_blocks_taller_than_a_matrix_take_no_more_memory(bed):
    def in_one_row(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.view(len(weight), -1, 32).abs().amax((0, 2))[None] / 448
        values = (weight / scale.repeat_interleave(32, 1)).to(FP8)
        return {".weight": values, ".weight_scale_inv": scale}, values.float() * scale.repeat_interleave(32, 1)

    bed.quantize(in_one_row, {**BLOCKS, "weight_block_size": [10**12, 32]})
    assert_close(bed.logits_of_whole_inputs(), bed.expected_logits())


def test_experts_in_blocks_are_read(make_bed):
    bed = make_bed("qwen3-moe")
    bed.quantize(in_blocks, {**BLOCKS, "scale_fmt": "ue8m0"})
    assert_close(bed.logits_of_whole_inputs(), bed.expected_logits())


def test_scales_of_blocks_may_be_bfloat16(bed):
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found, _ = in_blocks(weight)
        found[".weight_scale_inv"] = found[".weight_scale_inv"].bfloat16()
        truth: Any = Fp8Dequantize(None)
        return found, truth._dequantize_one(found[".weight"], found[".weight_scale_inv"].float())

    bed.quantize(quantize, BLOCKS)
    assert_close(bed.logits_of_whole_inputs(), bed.expected_logits())


@pytest.mark.parametrize(
    ("scale", "input_scale"),
    [
        (".weight_scale", None),
        (".weight_scale", ".input_scale"),
        (".weight_scale_inv", ".activation_scale"),
    ],
)
def test_products_equal_those_of_rounded_inputs(bed, scale, input_scale):
    writer = Whole(scale, input_scale)
    bed.quantize(writer, {**TENSOR, "activation_scheme": "static" if input_scale else "dynamic"})
    scales = dict(zip(bed.numbers, writer.input_scales, strict=False))
    x = {inputs: torch.randn(5, inputs) for inputs in (64, 128)}
    for name, product in bed.products(x.__getitem__):
        layers = [(bed.numbers[layer], scales.get(layer)) for layer in bed.matrices(name)]
        expected = [rounded(x[numbers.shape[1]], own) @ numbers.T for numbers, own in layers]
        assert_close(product, torch.cat(expected, 1))


def test_inputs_beyond_the_bound_of_fbgemm_are_cut_off(bed):
    bed.quantize(by_output, FBGEMM)
    x = {inputs: 2 * torch.randn(5, inputs) for inputs in (64, 128)}
    for name, product in bed.products(x.__getitem__):
        layers = [bed.numbers[layer] for layer in bed.matrices(name)]
        assert_close(product, torch.cat([rounded(x[m.shape[1]], None, 2.0) @ m.T for m in layers], 1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({**BLOCKS, "fmt": "e5m2"}, "fmt='e5m2'"),
        ({**BLOCKS, "fmt": "e4m3fnuz"}, "fmt='e4m3fnuz'"),
        ({**BLOCKS, "activation_scheme": "static"}, "activation_scheme='static'"),
        ({**BLOCKS, "activation_scheme": "none"}, "activation_scheme='none'"),
        ({**BLOCKS, "weight_block_size": [128]}, "weight_block_size=[128]"),
        ({**BLOCKS, "weight_block_size": [128, 0]}, "weight_block_size=[128, 0]"),
        ({**BLOCKS, "expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        ({**BLOCKS, "kv_cache": 1}, "kv_cache=1"),
        ({**BLOCKS, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head'"),
        ({**BLOCKS, "weight_block_size": [64, 64]}, "weight_scale_inv"),
        ({**FBGEMM, "activation_scale_ub": 0}, "activation_scale_ub=0"),
        ({**FBGEMM}, "weight_scale'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(bed, settings, expected):
    bed.quantize(in_blocks, settings)
    bed.folder()
    with pytest.raises(CheckpointError) as caught:
        bed.load()
    assert expected in str(caught.value)


def test_experts_with_the_bound_of_fbgemm_are_refused(make_bed):
    bed = make_bed("qwen3-moe")
    bed.quantize(by_output, FBGEMM)
    bed.folder()
    with pytest.raises(CheckpointError) as caught:
        bed.load()
    assert "activation_scale_ub" in str(caught.value)
