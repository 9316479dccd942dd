"""The cache's memory: its dtype, bytes per page, pages that fit, allocation."""

from __future__ import annotations

import math

import torch

from torchinfer import spmd
from torchinfer.batch import KVCache
from torchinfer.device import has_dtype
from torchinfer.errors import ConfigError, DeviceError
from torchinfer.loader import memory
from torchinfer.models.config import ModelConfig
from torchinfer.spmd import STACKED

MIB = 2**20
DTYPES = {  # of what EngineConfig.kv_cache_dtype names, auto aside
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
SCALED = (torch.int8, torch.float8_e4m3fn)  # with a scale for each token and KV head


def resolve_cache_dtype(name: str, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that `kv_cache_dtype` names; auto is the model's.

    Raises:
        ConfigError: when the device cannot convert to it and back.
    """
    dtype = model_dtype if name == "auto" else DTYPES[name]
    if dtype == torch.float8_e4m3fn and not has_dtype(dtype, device):
        raise ConfigError(
            f"kv_cache_dtype={name!r} stores {dtype}, which {device.type} cannot convert to and back here; "
            f"use int8, which takes as many bytes, or auto"
        )
    return dtype


def page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers: keys and values, and their scales."""
    bytes_per_row = model.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype in SCALED else 0)
    return 2 * model.num_layers * page_size * model.num_kv_heads * bytes_per_row


def plan_num_pages(
    budget_bytes: int, bytes_per_page: int, page_size: int, max_model_len: int, max_num_requests: int
) -> int:
    """Pages to allocate (page 0 included): what the budget allows, but not more than all requests can fill.

    Raises:
        ConfigError: when not even one request of `max_model_len` tokens fits, with the arithmetic.
    """
    per_request = -(-max_model_len // page_size)
    fits = budget_bytes // bytes_per_page - 1
    if fits < per_request:
        most = max(fits, 0) * page_size
        raise ConfigError(
            f"the KV cache has {budget_bytes / MIB:.1f} MiB and a page of {page_size} tokens takes "
            f"{bytes_per_page / MIB:.3f} MiB, so {max(fits, 0)} fit beside the one for padding; a request of "
            f"max_model_len={max_model_len} tokens needs {per_request}: "
            f"set max_model_len to at most {most} or kv_cache_memory to at least "
            f"{(per_request + 1) * bytes_per_page} bytes"
        )
    return 1 + min(fits, per_request * max_num_requests)


def allocate(
    model: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device, num_chips: int = 1
) -> list[KVCache]:
    """One cache a layer, zeros. On several chips `model` is one chip's; a tensor has those of all, STACKED.

    Raises:
        DeviceError: when the device has not enough memory, with the arithmetic.
    """
    shape = (2, num_pages, page_size, model.num_kv_heads)

    def layer() -> KVCache:
        if num_chips > 1:
            data = spmd.zeros((*shape, model.head_dim), dtype, STACKED, num_chips)
            return KVCache(data, spmd.zeros(shape, torch.float32, STACKED, num_chips) if dtype in SCALED else None)
        # Written now: memory that is only promised would run out in the middle of traffic.
        data = _empty((*shape, model.head_dim), dtype, device).zero_()
        return KVCache(data, _empty(shape, torch.float32, device).zero_() if dtype in SCALED else None)

    try:
        return [layer() for _ in range(model.num_layers)]
    except (DeviceError, torch.OutOfMemoryError, RuntimeError) as error:
        total = num_pages * page_bytes(model, page_size, dtype)
        raise DeviceError(
            f"no memory for a KV cache of {num_pages} pages, {total / MIB:.0f} MiB, on {device}: "
            f"lower kv_cache_memory, max_num_requests or max_model_len"
        ) from error


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU in large pages: attention reads pages of the cache all over it, each in other small ones."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return memory.allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
