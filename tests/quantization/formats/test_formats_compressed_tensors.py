"""compressed-tensors: written and read back by its own package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from torchinfer.device import resolve_device
from torchinfer.testing import assert_close

INT8 = {"num_bits": 8, "type": "int"}
INT4 = {"num_bits": 4, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}
GROUP = {"strategy": "group", "group_size": 32}
TOKEN = {"strategy": "token", "dynamic": True}
ASYMMETRIC = {"symmetric": False}
ORDER = {"actorder": "group"}
BLOCK = {"strategy": "block", "block_structure": [32, 32]}
WEIGHT_ONLY = {
    "int8 packed": ("pack-quantized", {**INT8, "strategy": "channel"}),
    "int8 packed asymmetric": ("pack-quantized", {**INT8, "strategy": "channel", **ASYMMETRIC}),
    "int8 packed groups asymmetric": ("pack-quantized", {**INT8, **GROUP, **ASYMMETRIC}),
    "int8": ("naive-quantized", {**INT8, "strategy": "channel"}),
    "int8 tensor": ("naive-quantized", {**INT8, "strategy": "tensor"}),
    "int8 groups": ("naive-quantized", {**INT8, **GROUP}),
    "int8 asymmetric": ("naive-quantized", {**INT8, "strategy": "channel", **ASYMMETRIC}),
    "int4": ("pack-quantized", {**INT4, "strategy": "channel"}),
    "int4 groups": ("pack-quantized", {**INT4, **GROUP}),
    "int4 groups asymmetric": ("pack-quantized", {**INT4, **GROUP, **ASYMMETRIC}),
    "int4 groups order": ("pack-quantized", {**INT4, **GROUP, **ORDER}),
    "int4 groups asymmetric order": ("pack-quantized", {**INT4, **GROUP, **ASYMMETRIC, **ORDER}),
    "fp8": ("naive-quantized", {**FP8, "strategy": "channel"}),
    "fp8 blocks": ("float-quantized", {**FP8, **BLOCK}),
    "fp8 blocks that cut parts": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [64, 32]}),
}
STATIC = {"strategy": "tensor", "dynamic": False}
WITH_INPUTS = {
    "int8": ("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, **TOKEN}),
    "int8 tensor": ("int-quantized", {**INT8, "strategy": "tensor"}, {**INT8, **TOKEN}),
    "int4": ("int-quantized", {**INT4, "strategy": "channel"}, {**INT8, **TOKEN}),
    "int4 groups": ("int-quantized", {**INT4, **GROUP}, {**INT8, **TOKEN}),
    "int8 groups": ("int-quantized", {**INT8, **GROUP}, {**INT8, **TOKEN}),
    "int8 static": ("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, **STATIC}),
    "fp8": ("float-quantized", {**FP8, "strategy": "channel"}, {**FP8, **TOKEN}),
    "fp8 blocks": ("float-quantized", {**FP8, **BLOCK}, {**FP8, **GROUP, "dynamic": True}),
    "fp8 blocks, tokens": ("float-quantized", {**FP8, **BLOCK}, {**FP8, **TOKEN}),
    "fp8 static": ("float-quantized", {**FP8, "strategy": "tensor"}, {**FP8, **STATIC}),
}


class Writer:
    """Quantizes with the package, and dequantizes what it wrote."""

    def __init__(self, kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> None:
        self.scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=QuantizationArgs(**inputs) if inputs else None,
        )
        config = QuantizationConfig(
            config_groups={"group_0": self.scheme}, format=kind, ignore=["lm_head"], quantization_status="compressed"
        )
        self.settings = config.model_dump(mode="json")
        self.kind = kind
        self.input_scales: list[float] = []

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        args = self.scheme.weights
        assert args is not None
        compressor = BaseCompressor.get_value_from_registry(self.kind)
        index = torch.randperm(weight.shape[1]).int() // 32 if args.actorder else None
        scale, zero = calculate_qparams(*bounds(weight, args, index), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        state |= {"weight_g_idx": index} if index is not None else {}
        written = compressor.compress(state, self.scheme)
        numbers = compressor.decompress(written, self.scheme)["weight"]
        inputs = self.scheme.input_activations
        if inputs is not None and not inputs.dynamic:
            self.input_scales.append(0.004 + 0.002 * len(self.input_scales))
            written["input_scale"] = torch.tensor([self.input_scales[-1]])
        return {f".{name}": tensor for name, tensor in written.items()}, numbers


def bounds(weight: Tensor, args: QuantizationArgs, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the greatest number that share a scale."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        assert args.block_structure is not None
        rows, columns = args.block_structure
        blocks = [[part.split(columns, 1) for part in weight.split(rows)]][0]
        return tuple(torch.stack([torch.stack([f(b) for b in row]) for row in blocks]) for f in (torch.min, torch.max))
    groups = range(weight.shape[1] // 32)
    own = torch.arange(weight.shape[1]) // 32 if index is None else index
    low = torch.stack([weight[:, own == group].amin(1) for group in groups], 1)
    return low, torch.stack([weight[:, own == group].amax(1) for group in groups], 1)


def rounded(x: Tensor, is_float: bool, scale: float | None) -> Tensor:
    """Inputs as the numbers that they are rounded to, each token by its largest or all with a given scale."""
    limit = 448.0 if is_float else 127.0
    rows = []
    for row in x:
        own = float(row.abs().max()) / limit if scale is None else scale
        numbers = (row / own).clamp(-limit if is_float else -128, limit)
        rows.append((numbers.to(torch.float8_e4m3fn).float() if is_float else numbers.round()) * own)
    return torch.stack(rows)


@pytest.mark.parametrize("case", WEIGHT_ONLY)
def test_logits_equal_those_of_the_packages_own_numbers(bed, case):
    writer = Writer(*WEIGHT_ONLY[case])
    bed.quantize(writer, writer.settings)
    assert_close(bed.logits(), bed.expected_logits())


@pytest.mark.parametrize("case", WITH_INPUTS)
def test_products_equal_those_of_rounded_inputs(bed, case):
    writer = Writer(*WITH_INPUTS[case])
    bed.quantize(writer, writer.settings)
    scales = dict(zip(bed.numbers, writer.input_scales, strict=False))
    x = {inputs: torch.randn(5, inputs) for inputs in (64, 128)}
    for name, product in bed.products(x.__getitem__):
        expected = []
        for layer in bed.matrices(name):
            numbers = bed.numbers[layer]
            inputs = x[numbers.shape[1]]
            if case == "fp8 blocks":
                inputs = torch.cat([rounded(group, True, None) for group in inputs.split(32, 1)], 1)
            elif case != "fp8 blocks, tokens":  # those stay as they are
                inputs = rounded(inputs, case.startswith("fp8"), scales.get(layer))
            expected.append(inputs @ numbers.T)
        assert_close(product, torch.cat(expected, 1))


@pytest.mark.parametrize("case", ["int4 groups asymmetric", "int8 packed", "fp8 blocks"])
def test_experts_are_read(make_bed, case):
    bed = make_bed("qwen3-moe")
    writer = Writer(*WEIGHT_ONLY[case])
    bed.quantize(writer, {**writer.settings, "ignore": ["lm_head", "re:.*mlp.gate$"]})
    assert_close(bed.logits(), bed.expected_logits())


def test_experts_with_static_inputs_are_read(make_bed):
    bed = make_bed("qwen3-moe")
    writer = Writer(*WITH_INPUTS["fp8 static"])
    bed.quantize(writer, {**writer.settings, "ignore": ["lm_head", "re:.*mlp.gate$"]})
    bed.folder()
    experts: Any = bed.load().layers[1].mlp.experts
    x, prefix = torch.randn(6, 64), "model.layers.1.mlp.experts"
    scales = dict(zip(bed.numbers, writer.input_scales, strict=True))
    expected = []
    for expert in range(3):
        own = x[2 * expert : 2 * expert + 2]
        parts = {
            part: rounded(own, True, scales[f"{prefix}.{expert}.{part}_proj"])
            @ bed.numbers[f"{prefix}.{expert}.{part}_proj"].T
            for part in ("gate", "up")
        }
        inner = torch.nn.functional.silu(parts["gate"]) * parts["up"]
        down = f"{prefix}.{expert}.down_proj"
        expected.append(rounded(inner, True, scales[down]) @ bed.numbers[down].T)
    assert_close(experts(x, torch.full((3,), 2, dtype=torch.int32)), torch.cat(expected))


def test_groups_in_order_may_be_written_as_minus_one(bed):
    writer = Writer(*WEIGHT_ONLY["int4 groups"])
    bed.quantize(writer, writer.settings)
    writer.settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    for layer, numbers in bed.numbers.items():
        bed.tensors[f"{layer}.weight_g_idx"] = torch.full((numbers.shape[1],), -1, dtype=torch.int32)
    assert_close(bed.logits(), bed.expected_logits())


def test_zero_points_that_are_not_packed_are_read(bed):
    # As packages before 0.9 wrote them.
    writer = Writer(*WEIGHT_ONLY["int4 groups asymmetric"])
    bed.quantize(writer, writer.settings)
    for layer, numbers in bed.numbers.items():
        packed = bed.tensors[f"{layer}.weight_zero_point"]
        shape = torch.Size((numbers.shape[0], numbers.shape[1] // 32))
        bed.tensors[f"{layer}.weight_zero_point"] = unpack_from_int32(packed, 4, shape, packed_dim=0)
    assert_close(bed.logits(), bed.expected_logits())


def test_layers_may_be_of_several_formats(bed):
    attention, rest = Writer(*WEIGHT_ONLY["int4 groups"]), Writer(*WEIGHT_ONLY["fp8 blocks"])
    group, other = (writer.settings["config_groups"]["group_0"] for writer in (attention, rest))
    groups = {
        "group_0": {**group, "targets": ["re:.*self_attn.*"], "format": attention.kind},
        "group_1": {**other, "format": rest.kind},
    }
    layers = bed.layers()
    bed.quantize(attention, {}, [layer for layer in layers if "self_attn" in layer])
    settings = {**rest.settings, "format": "mixed-precision", "config_groups": groups}
    bed.quantize(rest, settings, [layer for layer in layers if "self_attn" not in layer])
    assert_close(bed.logits(), bed.expected_logits())


@pytest.mark.xla
@pytest.mark.parametrize("case", ["int4 groups asymmetric order", "int8 packed groups asymmetric", "int8"])
def test_tensors_on_xla_equal_those_on_the_cpu(bed, case):
    writer = Writer(*WEIGHT_ONLY[case])
    bed.quantize(writer, writer.settings)
    bed.folder()
    expected = bed.load().state_dict()
    found = bed.load(resolve_device("xla")).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=0, atol=0)
