"""Products with packed matrices as a torch op: what a model on torch_xla calls.

    torchinfer::streamed_matmul    inputs, a matrix's words and scales, group sizes -> product in the inputs' dtype

With `num_cores` 0 the op is XLA's own formulation, for devices without the kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.kernels.reference.quantize_rows import quantize_rows, round_groups
from torchinfer.kernels.reference.quantized_matmul import DTYPES
from torchinfer.kernels.tpu.exported import Shapes, dtype_name, export_for_tpu, shapes_of
from torchinfer.kernels.tpu.matmul_plan import MatmulConfig, can_gate, make_config
from torchinfer.kernels.tpu.packed_weight import PackedWeight
from torchinfer.kernels.tpu.streamed_matmul import streamed_matmul
from torchinfer.kernels.tpu.word_layout import INTEGERS, NUMBERS_IN_WORD


def matmul(
    x: Tensor,  # [N, I]
    weight: PackedWeight,  # [O, I] or [E, O, I]
    group_sizes: Tensor | None = None,  # [E] int32
    activation: str | None = None,
) -> Tensor:  # [N, O], or [N, O / 2]
    """x times the transposed matrix, or its rows times those of their experts; then activation(first half) * second."""
    numbers, input_scale = x, None
    if weight.input_group:  # what they stand for: the kernel has no scales of rows within a sum
        numbers = round_groups(x, DTYPES[weight.activations], weight.input_group).to(x.dtype)
    elif weight.activations != "none":
        numbers, input_scale = quantize_rows(x, DTYPES[weight.activations], weight.input_scale)
        input_scale = input_scale.expand(x.shape[0])
        if weight.activations == "fp8":  # torch_xla has e4m3 in no products, and what it stands for is exact
            numbers = numbers.to(torch.bfloat16)
    result: Tensor = torch.ops.torchinfer.streamed_matmul(
        numbers,
        weight.words,
        weight.scale,
        [group_sizes, input_scale, weight.shift],
        weight.name,
        weight.shape[-2],
        activation,
        dtype_name(x.dtype if weight.shift is None else torch.float32),
        weight.num_cores,
    )
    return result.to(x.dtype)


def bits_of(values: Tensor) -> Tensor:
    """On XLA: numbers of 16 or 8 bits as integers with the same bits."""
    import torch_xla.core.xla_builder as xla_builder

    name = f"int{8 * values.dtype.itemsize}"
    result: Tensor = xla_builder.call_jax(jax.lax.bitcast_convert_type, (values, jnp.dtype(name)))
    return result


def gated_matmul(x: Tensor, weight: PackedWeight, activation: str, group_sizes: Tensor | None = None) -> Tensor:
    """`matmul` with an activation: in one pass where the kernel takes the matrix so."""
    if is_fused(weight):
        return matmul(x, weight, group_sizes, activation)
    return gated_activation(matmul(x, weight, group_sizes), activation)


def is_fused(weight: PackedWeight) -> bool:
    """Whether `activation` is for the matrix."""
    return weight.shift is None and can_gate(
        weight.words.shape[1] * NUMBERS_IN_WORD[weight.name], weight.shape[-2], weight.name
    )


@torch.library.custom_op("torchinfer::streamed_matmul", mutates_args=(), device_types="xla")
def _op(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    optional: list[Tensor | None],  # group_sizes, input_scale, shift
    name: str,
    num_outputs: int,
    activation: str | None,
    result_dtype: str,
    num_cores: int,
) -> Tensor:
    import torch_xla.core.xla_builder as xla_builder

    shape = (words.shape[0], words.shape[1] * NUMBERS_IN_WORD[name], num_outputs)
    # What the matrix unit takes as it is needs one plane; all else keeps its bits in two.
    planes = 1 if x.dtype == (torch.int8 if name in INTEGERS else torch.bfloat16) else 2
    sizes = (scale.shape[1], x.shape[0], planes, activation)
    config = make_config(name, shape, *sizes, result_dtype=result_dtype, num_cores=max(num_cores, 1))
    has = tuple(each is not None for each in optional)
    arguments = (x, words, scale, *[each for each in optional if each is not None])
    if num_cores:
        function = _kernel(config, has, shapes_of(arguments))
    else:
        function = _formulation(config, has)
    result: Tensor = xla_builder.call_jax(function, arguments)
    return result


@_op.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    optional: list[Tensor | None],  # group_sizes, input_scale, shift
    name: str,
    num_outputs: int,
    activation: str | None,
    result_dtype: str,
    num_cores: int,
) -> Tensor:
    columns = num_outputs // (1 if activation is None else 2)
    return torch.empty((x.shape[0], columns), dtype=getattr(torch, result_dtype), device=x.device)


# Nothing is forgotten: torch_xla knows a function by its id.
@functools.cache
def _kernel(config: MatmulConfig, has: tuple[bool, ...], shapes: Shapes) -> Any:
    return export_for_tpu(functools.partial(_with_optional, config, has, True), shapes)


@functools.cache
def _formulation(config: MatmulConfig, has: tuple[bool, ...]) -> Any:
    return functools.partial(_with_optional, config, has, False)


def _with_optional(config: MatmulConfig, has: tuple[bool, ...], has_kernel: bool, *arguments: Any) -> Any:
    rest = iter(arguments[3:])
    optional = [next(rest) if is_there else None for is_there in has]
    return streamed_matmul(*arguments[:3], *optional, config=config, has_kernel=has_kernel)
