"""The matmul kernel as a torch op: XLA:CPU against the references, and its graph compiled for a TPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from torchinfer import aot, kernels
from torchinfer.device import resolve_device
from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.kernels.reference.grouped_gated_matmul import grouped_gated_matmul
from torchinfer.kernels.reference.grouped_matmul import grouped_matmul
from torchinfer.kernels.reference.quantized_matmul import quantized_matmul
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import assert_close
from torchinfer.xla_program import CompiledFunction

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")
pytest.importorskip("jax")


def random_weight(name: str, rows: int, columns: int) -> QuantizedWeight:
    weight = torch.randn(rows, columns) / columns**0.5
    return SCHEMES[name].weight(dict(SCHEMES[name].pack(weight)), columns, ())


def random_experts(name: str, num_experts: int, rows: int, columns: int) -> QuantizedWeight:
    experts = [random_weight(name, rows, columns) for _ in range(num_experts)]
    values = torch.stack([expert.values.view(torch.uint8) for expert in experts]).view(experts[0].values.dtype)
    return replace(experts[0], values=values, scale=torch.stack([expert.scale for expert in experts]))


def on_xla(weight: QuantizedWeight) -> QuantizedWeight:
    device = resolve_device("xla")
    kernels.load_ports("xla")
    moved = {
        name: None if tensor is None else tensor.to(device)
        for name in ("values", "scale", "zero", "input_scale")
        for tensor in [getattr(weight, name)]
    }
    return replace(weight, **moved)


def tolerance(weight: QuantizedWeight, dtype: torch.dtype) -> torch.dtype:
    """Integers meet inputs of 15 bits: errors of up to 2e-4 here in float32."""
    is_rounded = weight.values.dtype in (torch.int8, torch.uint8) and weight.activations == "none"
    return torch.float16 if is_rounded and dtype == torch.float32 else dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("int8", torch.bfloat16),
        ("int4", torch.float32),
        ("fp8_block", torch.float32),
        ("int8_w8a8", torch.float32),
        ("int4_w4a8", torch.bfloat16),
        ("fp8_w8a8", torch.bfloat16),
        ("fp8_block_w8a8", torch.bfloat16),
        ("fp8_block_w8a8", torch.float32),
    ],
)
def test_linear_on_xla_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    weight, x, bias = random_weight(name, 130, 256), torch.randn(5, 256).to(dtype), torch.randn(130).to(dtype)
    if name == "int8_w8a8":
        weight = replace(weight, input_scale=torch.tensor([0.02]))
    if name == "int4":
        weight = replace(weight, zero=torch.randint(0, 16, weight.scale.shape, dtype=torch.uint8))
    prepared = kernels.prepare(on_xla(weight), num_cores=0)
    assert prepared is not None and prepared.shape == (130, 256)
    (actual,) = CompiledFunction(lambda x, bias: [kernels.linear(x, prepared, bias)])(x, bias)
    assert actual.dtype == dtype
    assert_close(actual.cpu(), quantized_matmul(x, weight) + bias, tolerance(weight, dtype))


@pytest.mark.parametrize(("name", "has_bias"), [("int8", False), ("int8", True), ("int4", False), ("int8_w8a8", False)])
def test_gate_up_and_activation_on_xla_equal_the_reference(name: str, has_bias: bool) -> None:
    """With a bias, or zeros of int4, in two steps."""
    weight, x = random_weight(name, 96, 256), torch.randn(5, 256)
    if name == "int4":
        weight = replace(weight, zero=torch.randint(0, 16, weight.scale.shape, dtype=torch.uint8))
    bias = torch.randn(96) if has_bias else None
    prepared = kernels.prepare(on_xla(weight), num_cores=0)
    assert prepared is not None
    actual = kernels.gated_linear(x.to("xla"), prepared, "silu", None if bias is None else bias.to("xla")).cpu()
    product = quantized_matmul(x, weight)
    expected = gated_activation(product if bias is None else product + bias, "silu")
    assert_close(actual, expected, tolerance(weight, x.dtype))


@pytest.mark.parametrize("name", ["int8", "int8_w8a8", "int4_g32", "fp8"])
def test_experts_on_xla_equal_the_reference(name: str) -> None:
    weight, x, sizes = random_experts(name, 3, 96, 64), torch.randn(9, 64), torch.tensor([2, 0, 5], dtype=torch.int32)
    prepared = kernels.prepare(on_xla(weight), num_cores=0)
    assert prepared is not None
    arguments = x.to("xla"), prepared, sizes.to("xla")
    dtype = tolerance(weight, x.dtype)
    assert_close(kernels.grouped_matmul(*arguments).cpu(), grouped_matmul(x, weight, sizes), dtype)
    actual = kernels.grouped_gated_matmul(*arguments, "silu").cpu()
    assert_close(actual, grouped_gated_matmul(x, weight, sizes, "silu"), dtype)


def test_what_the_kernel_does_not_take_stays_as_it_is() -> None:
    assert kernels.prepare(torch.ones(4, 64, dtype=torch.bfloat16), num_cores=1) is None
    assert kernels.prepare(torch.ones(2, 4, 64), num_cores=1) is None  # experts in float32
    odd = replace(random_weight("int4_g64", 8, 192), scale=torch.ones(8, 4), column_block=48)
    assert kernels.prepare(odd, num_cores=1) is None
    weight = random_weight("int4", 8, 256)
    assert kernels.prepare(replace(weight, group_index=torch.zeros(1, 256, dtype=torch.int32)), num_cores=1) is None


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1"])
def test_a_graph_with_the_kernel_compiles_for_a_tpu_and_moves_the_matrices_once(topology: str) -> None:
    import torch_xla.core.xla_builder as xla_builder
    import torch_xla.core.xla_model as xla_model

    resolve_device("xla")
    kernels.load_ports("xla")

    def placeholder(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = xla_builder.create_placeholder_tensor(shape, dtype)
        return tensor

    meta = SCHEMES["int8"].weight(
        {
            "values": torch.empty(4, 1024, 512, dtype=torch.int8, device="meta"),
            "scale": torch.empty(4, 1024, 1, device="meta"),
        },
        512,
        (),
    )
    prepared = kernels.prepare(meta, num_cores=aot.CHIPS[topology[:3]].num_cores)
    assert prepared is not None
    fields = {name: placeholder(*each.shape, dtype=each.dtype) for name, each in prepared.tensors.items()}
    x, sizes = placeholder(16, 512, dtype=torch.bfloat16), placeholder(4, dtype=torch.int32)
    output = kernels.grouped_gated_matmul(x, replace(prepared, **fields), sizes, "silu")
    compiled = aot.compile_hlo(xla_model.get_stablehlo([output]), topology)
    assert compiled.hlo.count("tpu_custom_call") == 1
    assert prepared.num_bytes < compiled.bytes_accessed < 1.15 * prepared.num_bytes
    assert compiled.temporary_bytes < prepared.num_bytes // 4


def test_the_fake_has_the_shape_of_the_result() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torchinfer.kernels.tpu.matmul_op import matmul
    from torchinfer.kernels.tpu.packed_weight import PackedWeight

    with FakeTensorMode():
        words, scale = torch.empty(2, 16, 128, dtype=torch.int32), torch.empty(2, 1, 128)
        weight = PackedWeight((2, 96, 64), "int8", words, scale, None, "none", None, 0)
        x, sizes = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int32)
        found = [matmul(x, weight, sizes, activation) for activation in (None, "silu")]
    assert [(each.shape, each.dtype) for each in found] == [((3, 96), torch.bfloat16), ((3, 48), torch.bfloat16)]
