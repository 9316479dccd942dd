"""A step of a model as StableHLO, traced by torch_xla with placeholders: no weight and no cache takes memory. Run as a
process, so that torch_xla starts on the CPU whatever the caller has: FOLDER, with request.json in it.

On several chips it is the one program that SpmdRunner runs on all of them, with the place of each argument.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_xla
import torch_xla.core.xla_builder as xla_builder
import torch_xla.core.xla_model as xla_model
from torch import Tensor, nn

from torchinfer import kernels, spmd
from torchinfer.batch import KVCache
from torchinfer.kv_cache.tensors import SCALED
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import divide, local_config, tensors_of
from torchinfer.planner.source import ModelSource, read_source
from torchinfer.spmd import REPLICATED, STACKED
from torchinfer.spmd_step import SpmdStep
from torchinfer.step_input import StepShape, unpack

MLIR_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "f8E4M3FN",
    torch.int8: "i8",
}


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A program with the outputs logits [R, V], hidden [T, H], and each cache tensor, written in place."""

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
) -> TracedStep:
    """Trace the forward pass that the XLA runner compiles for a bucket, on `num_chips` chips.

    For several chips once in a process, before anything else of torch_xla.
    """
    kernels.load_ports("xla")
    if num_chips > 1:
        spmd.start(num_chips)
    config = local_config(source.config, num_chips)
    caches = [tensor for _ in config.windows for tensor in _cache(config, num_pages, page_size, cache_dtype, num_chips)]
    ints = _placeholder((shape.num_forward,), torch.int32, REPLICATED, num_chips)
    last_ids = _placeholder((shape.num_requests,), torch.int32, REPLICATED, num_chips)
    if num_chips > 1:
        logits, hidden, written = _divided(source, num_chips, page_size).forward(ints, last_ids, caches, shape)
    else:
        model, written = _filled(source), caches
        step = unpack(ints, shape, page_size, None).fed(last_ids)
        size = len(caches) // config.num_layers
        hidden = model(step.batch, [KVCache(*caches[at : at + size]) for at in range(0, len(caches), size)])
        logits = model.logits(hidden[step.sample_index])
    types = ["x".join([*map(str, tensor.shape), MLIR_TYPES[tensor.dtype]]) for tensor in caches]
    text: str = xla_model.get_stablehlo([logits, hidden, *written])
    return TracedStep(_with_places(text), cache_arguments(text, types))


def _with_places(text: str) -> str:
    """A program whose arguments say where they are, as what takes them first in its body does."""
    places = dict(re.findall(r'@Sharding\((%arg\d+)\) \{.*?mhlo\.sharding = ("[^"]*")', text))
    lines = text.splitlines(keepends=True)
    at = next(index for index, line in enumerate(lines) if "func.func @main(" in line)
    for argument, place in places.items():
        lines[at] = re.sub(rf"({argument}: tensor<[^>]*>)", rf"\1 {{mhlo.sharding = {place}}}", lines[at])
    return "".join(lines)


def cache_arguments(text: str, caches: Sequence[str]) -> tuple[int, ...]:
    """The arguments of a program that have the type of a cache tensor, such as 2x65x16x8xf32; no others do."""
    header = next(line for line in text.splitlines() if "func.func @main(" in line)
    arguments = re.findall(r"%arg\d+: tensor<([^>]*)>", header)
    found = tuple(index for index, argument in enumerate(arguments) if argument in caches)
    assert len(found) == len(caches), f"{len(found)} arguments look like {len(caches)} caches"
    return found


def _placeholder(share: tuple[int, ...], dtype: torch.dtype, place: int, num_chips: int) -> Tensor:
    if num_chips > 1:
        return spmd.placeholder(share, dtype, place, num_chips)
    tensor: Tensor = xla_builder.create_placeholder_tensor(share, dtype)
    return tensor


def _filled(source: ModelSource) -> Decoder:
    """Placeholders in place of parameters and quantized matrices; constants, such as frequencies, are moved."""
    model = source.build(source.config).eval()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = _placeholder(tuple(parameter.shape), source.dtype, REPLICATED, 1)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            is_constant = not buffer.is_meta
            filled = _placeholder(tuple(buffer.shape), buffer.dtype, REPLICATED, 1)
            setattr(module, name, buffer.to(torch_xla.device()) if is_constant else filled)
    return model


def _divided(source: ModelSource, num_chips: int, page_size: int) -> SpmdStep:
    model = divide(source.build(source.config), num_chips)
    for name, share in tensors_of(model.local).items():
        dtype = source.dtype if isinstance(share, nn.Parameter) else share.dtype
        model.tensors[name] = _placeholder(tuple(share.shape), dtype, model.divisions[name].place, num_chips)
    return SpmdStep(model, page_size)


def _cache(config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, num_chips: int) -> list[Tensor]:
    shape = (2, num_pages, page_size, config.num_kv_heads)
    tensors = [_placeholder((*shape, config.head_dim), dtype, STACKED, num_chips)]
    return [*tensors, _placeholder(shape, torch.float32, STACKED, num_chips)] if dtype in SCALED else tensors


if __name__ == "__main__":
    main()
