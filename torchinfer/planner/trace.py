"""A step of a model as StableHLO, traced by torch_xla with placeholders: no weight and no cache takes memory. Run as a
process, so that torch_xla starts on the CPU, with as many chips, whatever the caller has: FOLDER, with request.json in
it. It is the program that the engine's runner compiles, for one chip or for all that divide the model.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch_xla
import torch_xla.core.xla_model as xla_model
from torch import Tensor, nn

from torchinfer import kernels, spmd
from torchinfer.batch import KVCache
from torchinfer.device import resolve_device
from torchinfer.kv_cache.tensors import kernel_pages, make_layer
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import is_prepared
from torchinfer.parallel import DividedModel, divide, local_config, tensors_of
from torchinfer.planner.source import ModelSource, read_source
from torchinfer.spmd import REPLICATED, STACKED
from torchinfer.spmd_matrices import prepare_chips
from torchinfer.spmd_step import SpmdStep
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
    """A program with the outputs each cache tensor, written in place, hidden [T, H], and logits [R, V] by rows."""

    text: str
    donated: tuple[int, ...]  # the arguments that are caches


def main() -> None:
    """Trace what FOLDER/request.json asks for; write FOLDER/module.mlir and FOLDER/traced.json."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    source = read_source(request["model"], request["dtype"], request["quantization"], request["expert_parallel"])
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
    """Trace the forward pass that the engine compiles for a bucket, on all of `num_chips` chips."""
    resolve_device("xla", num_chips)
    kernels.load_ports("xla")
    config = local_config(source.config, num_chips)
    pages = kernel_pages(config, cache_dtype, num_cores)

    def place(share: tuple[int, ...], dtype: torch.dtype, dim: int = STACKED) -> Tensor:
        return (
            spmd.local_placeholder(share, dtype) if num_chips == 1 else spmd.placeholder(share, dtype, dim, num_chips)
        )

    caches = [make_layer(config, num_pages, page_size, cache_dtype, pages, place) for _ in range(config.num_layers)]
    tensors = [tensor for cache in caches for tensor in cache.tensors]
    ints, last_ids = (place((size,), torch.int32, REPLICATED) for size in (shape.num_forward, shape.num_requests))
    if num_chips == 1:
        results = _on_one_chip(_model(source, num_cores), ints, last_ids, caches, shape, page_size)
    else:
        step = SpmdStep(_divided(source, num_chips, num_cores), page_size, pages)
        after, hidden, logits = step.forward(ints, last_ids, [*tensors, *step.counters.values()], shape)
        results = [*after, hidden, logits]
    text = with_places(xla_model.get_stablehlo(results))
    types = ["x".join([*map(str, tensor.shape), MLIR_TYPES[tensor.dtype]]) for tensor in tensors]
    return TracedStep(text, cache_arguments(text, types))


def _on_one_chip(
    model: Decoder, ints: Tensor, last_ids: Tensor, caches: list[KVCache], shape: StepShape, page_size: int
) -> list[Tensor]:
    step = unpack(ints, shape, page_size, None).fed(last_ids)
    hidden = model(step.batch, caches)
    logits = model.logits(hidden[step.sample_index])
    # Caches first, as the engine has them: arguments then come in the order of the layers. XLA pairs what is donated
    # with results of the same type in their order, and copies a cache that is paired with another layer's.
    return [*(tensor for cache in caches for tensor in cache.tensors), hidden, logits]


def _model(source: ModelSource, num_cores: int | None) -> Decoder:
    """With placeholders in place of parameters and matrices; constants, such as frequencies, are moved."""
    model = source.build(source.config).eval()
    _give_dtype(model, source.dtype)
    model.prepare(num_cores)
    _fill(model)
    return model


def _divided(source: ModelSource, num_chips: int, num_cores: int | None) -> DividedModel:
    """With placeholders in place of all tensors."""
    model = divide(source.build(source.config), num_chips)
    _give_dtype(model.local, source.dtype)
    if num_cores is not None:
        for name, share in tensors_of(model.local).items():
            whole = spmd.whole_shape(share.shape, model.divisions[name].place, num_chips)
            model.tensors[name] = torch.empty(whole, dtype=share.dtype, device="meta")
        prepare_chips(model, num_cores)
    for name, share in tensors_of(model.local).items():
        place = model.divisions[name].place
        model.tensors[name] = spmd.placeholder(tuple(share.shape), share.dtype, place, num_chips)
    return model


def cache_arguments(text: str, caches: Sequence[str]) -> tuple[int, ...]:
    """The arguments of a program that have the type of a cache tensor, such as 2x65x16x8xf32; no others do."""
    header = next(line for line in text.splitlines() if "func.func @main(" in line)
    arguments = re.findall(r"%arg\d+: tensor<([^>]*)>", header)
    found = tuple(index for index, argument in enumerate(arguments) if argument in caches)
    assert len(found) == len(caches), f"{len(found)} arguments look like {len(caches)} caches"
    return found


def _give_dtype(model: Decoder, dtype: torch.dtype) -> None:
    """To all parameters, which have no memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.data.to(dtype), requires_grad=False))


def _fill(model: Decoder) -> None:
    """Placeholders in place of parameters and quantized matrices; constants, such as frequencies, are moved."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = spmd.local_placeholder(tuple(parameter.shape), parameter.dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            is_constant = not buffer.is_meta
            value = (
                buffer.to(torch_xla.device())
                if is_constant
                else spmd.local_placeholder(tuple(buffer.shape), buffer.dtype)
            )
            setattr(module, name, value)
        for name in getattr(module, "MATRICES", ()):
            matrix = getattr(module, name)
            if is_prepared(matrix):
                fields = {
                    field: spmd.local_placeholder(tuple(each.shape), each.dtype)
                    for field, each in matrix.tensors.items()
                }
                setattr(module, name, replace(matrix, **fields))


def with_places(text: str) -> str:
    """A program whose arguments say where they are, as what takes them first in its body does."""
    places = dict(re.findall(r'@Sharding\((%arg\d+)\) \{.*?mhlo\.sharding = ("[^"]*")', text))
    lines = text.splitlines(keepends=True)
    at = next(index for index, line in enumerate(lines) if "func.func @main(" in line)
    lines[at] = re.sub(
        r"(%arg\d+): tensor<[^>]*>",
        lambda found: f"{found[0]} {{mhlo.sharding = {places[found[1]]}}}" if found[1] in places else found[0],
        lines[at],
    )
    return "".join(lines)


if __name__ == "__main__":
    main()
