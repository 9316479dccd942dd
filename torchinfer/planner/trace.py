"""A step of a model as StableHLO, traced by torch_xla with placeholders: no weight and no cache takes memory. Run as a
process, so that torch_xla starts on the CPU whatever the caller has: FOLDER, with request.json in it.

One chip's program of a model that several chips divide by tensor parallelism: the model of one chip's sizes, with an
all-reduce behind each row-parallel layer and the embeddings, and logits gathered. The engine's program is for all chips
(spmd_step.py); this is what is left of it on one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch_xla
import torch_xla.core.xla_builder as xla_builder
import torch_xla.core.xla_model as xla_model
from torch import Tensor, nn

from torchinfer import kernels
from torchinfer.kv_cache.tensors import kernel_pages, make_layer
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import connect, local_config
from torchinfer.planner.source import ModelSource, read_source
from torchinfer.step_input import StepShape, unpack

MLIR_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "f8E4M3FN",
    torch.int8: "i8",
    torch.int32: "i32",
}


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A program with the outputs each cache tensor, written in place, hidden [T, H], and logits [R, V]."""

    text: str
    donated: tuple[int, ...]  # the arguments that are caches


def main() -> None:
    """Trace what FOLDER/request.json asks for; write FOLDER/module.mlir and FOLDER/traced.json."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    source = read_source(request["model"], request["dtype"], request["quantization"])
    traced = trace_step(
        source,
        request["num_chips"],
        StepShape(*request["shape"]),
        getattr(torch, request["cache_dtype"]),
        request["num_pages"],
        request["page_size"],
        request["num_cores"],
    )
    (folder / "module.mlir").write_text(traced.text)
    (folder / "traced.json").write_text(json.dumps({"donated": traced.donated}))


@torch.no_grad()
def trace_step(
    source: ModelSource,
    num_chips: int,
    shape: StepShape,
    cache_dtype: torch.dtype,
    num_pages: int,
    page_size: int,
    num_cores: int | None,  # that kernels run on; None: without them
) -> TracedStep:
    """Trace the forward pass that the XLA runner compiles for a bucket, on one of `num_chips` chips.

    For several chips once in a process: torch_xla makes each all-reduce wait for the one before, of other graphs too.
    """
    config = local_config(source.config, num_chips)
    model = source.build(config).eval()
    kernels.load_ports("xla")
    _give_dtype(model, source.dtype)
    model.prepare(num_cores)
    _fill(model)
    gather = _connect(model, num_chips)
    pages = kernel_pages(config, cache_dtype, num_cores)
    caches = [
        make_layer(config, num_pages, page_size, cache_dtype, pages, _placeholder) for _ in range(config.num_layers)
    ]
    ints = _placeholder((shape.num_forward,), torch.int32)
    last_ids = _placeholder((shape.num_requests,), torch.int32)
    step = unpack(ints, shape, page_size, None).fed(last_ids)
    hidden = model(step.batch, caches)
    logits = gather(model.logits(hidden[step.sample_index]))
    tensors = [tensor for cache in caches for tensor in cache.tensors]
    # Caches first, as torch.compile has them: arguments then come in the order of the layers. XLA pairs what is donated
    # with results of the same type in their order, and copies a cache that is paired with another layer's.
    text: str = xla_model.get_stablehlo([*tensors, hidden, logits])
    types = ["x".join([*map(str, tensor.shape), MLIR_TYPES[tensor.dtype]]) for tensor in tensors]
    return TracedStep(text, cache_arguments(text, types))


def cache_arguments(text: str, caches: Sequence[str]) -> tuple[int, ...]:
    """The arguments of a program that have the type of a cache tensor, such as 2x65x16x8xf32; no others do."""
    header = next(line for line in text.splitlines() if "func.func @main(" in line)
    arguments = re.findall(r"%arg\d+: tensor<([^>]*)>", header)
    found = tuple(index for index, argument in enumerate(arguments) if argument in caches)
    assert len(found) == len(caches), f"{len(found)} arguments look like {len(caches)} caches"
    return found


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor: Tensor = xla_builder.create_placeholder_tensor(shape, dtype)
    return tensor


def _give_dtype(model: Decoder, dtype: torch.dtype) -> None:
    """To all parameters, which have no memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.data.to(dtype), requires_grad=False))


def _fill(model: Decoder) -> None:
    """Placeholders in place of parameters and quantized matrices; constants, such as frequencies, are moved."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = _placeholder(tuple(parameter.shape), parameter.dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            is_constant = not buffer.is_meta
            value = buffer.to(torch_xla.device()) if is_constant else _placeholder(tuple(buffer.shape), buffer.dtype)
            setattr(module, name, value)
        for name in getattr(module, "MATRICES", ()):
            matrix = getattr(module, name)
            if not isinstance(matrix, nn.Module | nn.Parameter):  # packed for the TPU's kernel
                fields = {field: _placeholder(tuple(each.shape), each.dtype) for field, each in matrix.tensors.items()}
                setattr(module, name, replace(matrix, **fields))


def _connect(model: Decoder, num_chips: int) -> Callable[[Tensor], Tensor]:
    """Let modules with parts of a sum add them up over all chips; what gathers the logits."""
    if num_chips == 1:
        return lambda logits: logits
    groups = [list(range(num_chips))]

    def reduce(part: Tensor) -> Tensor:
        # Not xla_model.all_reduce: this form gives the sum as a value.
        reduced: Tensor = torch_xla._XLAC._xla_all_reduce("sum", part, 1.0, groups, False)  # type: ignore[attr-defined]
        return reduced

    def gather(logits: Tensor) -> Tensor:
        gathered: Tensor = xla_model.all_gather(logits, dim=1, groups=groups, pin_layout=False)
        return gathered

    model.embedding.first_row = _placeholder((1,), torch.int32)
    connect(model, reduce)
    return gather


if __name__ == "__main__":
    main()
