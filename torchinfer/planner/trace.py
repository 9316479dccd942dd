"""A step of a model as StableHLO, traced by torch_xla with placeholders: no weight and no cache takes memory.

One chip's program of a model that several chips divide by tensor parallelism: the model of one chip's sizes, with an
all-reduce behind each row-parallel layer and the embeddings, and logits gathered. What chips do with token ids outside
of their rows of the vocabulary is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch_xla
import torch_xla.core.xla_builder as xla_builder
import torch_xla.core.xla_model as xla_model
from torch import Tensor, nn

from torchinfer import kernels
from torchinfer.batch import KVCache
from torchinfer.kv_cache.tensors import SCALED
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.planner.footprint import local_config
from torchinfer.planner.source import ModelSource
from torchinfer.step_input import StepShape, unpack

REDUCED = ("attention.output", "mlp")  # ends of the names of modules whose results are parts of a sum


@dataclass(frozen=True, slots=True)
class TracedStep:
    """`text` has the outputs logits [R, V], hidden [T, H], and each cache tensor, which may be written in place."""

    text: str
    cache_types: tuple[tuple[tuple[int, ...], torch.dtype], ...]


@torch.no_grad()
def trace_step(
    source: ModelSource,
    num_chips: int,
    shape: StepShape,
    cache_dtype: torch.dtype,
    num_pages: int,
    page_size: int,
    num_layers: int | None = None,  # the first ones; None: all
) -> TracedStep:
    """Trace the forward pass that the XLA runner compiles for a bucket, on one of `num_chips` chips."""
    config = _first_layers(local_config(source.config, num_chips), num_layers)
    model = source.build(config).eval()
    kernels.load_ports("xla")
    _fill(model, source.dtype)
    gather = _connect(model, num_chips)
    caches = [_cache(config, num_pages, page_size, cache_dtype) for _ in range(config.num_layers)]
    ints = _placeholder((shape.num_forward,), torch.int32)
    last_ids = _placeholder((shape.num_requests,), torch.int32)
    step = unpack(ints, shape, page_size, None).fed(last_ids)
    hidden = model(step.batch, caches)
    logits = gather(model.logits(hidden[step.sample_index]))
    tensors = [tensor for cache in caches for tensor in cache.tensors]
    text: str = xla_model.get_stablehlo([logits, hidden, *tensors])
    return TracedStep(text, tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors))


def _first_layers(config: ModelConfig, num_layers: int | None) -> ModelConfig:
    if num_layers is None or num_layers >= config.num_layers:
        return config
    moe = config.moe
    if moe is not None:
        moe = replace(moe, layers=tuple(layer for layer in moe.layers if layer < num_layers))
    return replace(config, num_layers=num_layers, windows=config.windows[:num_layers], moe=moe)


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor: Tensor = xla_builder.create_placeholder_tensor(shape, dtype)
    return tensor


def _fill(model: Decoder, dtype: torch.dtype) -> None:
    """Placeholders in place of parameters and quantized matrices; constants, such as frequencies, are moved."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = _placeholder(tuple(parameter.shape), dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            is_constant = not buffer.is_meta
            value = buffer.to(torch_xla.device()) if is_constant else _placeholder(tuple(buffer.shape), buffer.dtype)
            setattr(module, name, value)


def _connect(model: Decoder, num_chips: int) -> Callable[[Tensor], Tensor]:
    """Let modules with parts of a sum add them up over all chips; what gathers the logits."""
    if num_chips == 1:
        return lambda logits: logits
    groups = [list(range(num_chips))]

    def reduce(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        reduced: Tensor = torch_xla._XLAC._xla_all_reduce("sum", output, 1.0, groups, False)
        return reduced

    def gather(logits: Tensor) -> Tensor:
        gathered: Tensor = xla_model.all_gather(logits, dim=1, groups=groups, pin_layout=False)
        return gathered

    for name, module in model.named_modules():
        if name.endswith(REDUCED):
            module.register_forward_hook(reduce)
    model.embedding.register_forward_hook(reduce)
    return gather


def _cache(config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype) -> KVCache:
    shape = (2, num_pages, page_size, config.num_kv_heads)
    data = _placeholder((*shape, config.head_dim), dtype)
    return KVCache(data, _placeholder(shape, torch.float32) if dtype in SCALED else None)
