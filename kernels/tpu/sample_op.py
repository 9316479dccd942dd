"""Tokens drawn from logits by the kernel, as a torch op: what a model on torch_xla calls, on each chip for itself."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchinfer.kernels.tpu.exported import Shapes, export_for_tpu, shapes_of
from torchinfer.kernels.tpu.sample_kernel import sample_tokens

if TYPE_CHECKING:
    from torchinfer.batch import SamplingTensors


def sample(logits: Tensor, params: SamplingTensors, any_filter: bool) -> Tensor:
    """See the door. Filters that nobody has are skipped on the device."""
    named = (params.temperature, params.top_k, params.top_p, params.min_p, params.uniform)
    ids: Tensor = torch.ops.torchinfer.sample_tokens(logits, *named)
    return ids


@torch.library.custom_op("torchinfer::sample_tokens", mutates_args=(), device_types="xla")
def _op(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    import torch_xla.core.xla_builder as xla_builder

    arguments = logits, torch.stack((temperature, top_k.float(), top_p, min_p, uniform), 1)
    ids: Tensor = xla_builder.call_jax(_kernel(shapes_of(arguments)), arguments)
    return ids


@_op.register_fake
def _(logits: Tensor, *params: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)


@functools.cache  # torch_xla knows a function by its id
def _kernel(shapes: Shapes) -> Any:
    return export_for_tpu(sample_tokens, shapes)
