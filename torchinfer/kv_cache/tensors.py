"""The cache's memory: bytes per page, pages that fit, allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from torchinfer.errors import ConfigError, DeviceError
from torchinfer.models.config import ModelConfig

MIB = 2**20


def page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers: keys and values."""
    return 2 * model.num_layers * page_size * model.num_kv_heads * model.head_dim * dtype.itemsize


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
    model: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One cache a layer: [2, num_pages, page_size, num_kv_heads, head_dim], zeros.

    Raises:
        DeviceError: when the device has not enough memory, with the arithmetic.
    """
    shape = (2, num_pages, page_size, model.num_kv_heads, model.head_dim)
    try:
        # Written now: memory that is only promised would run out in the middle of traffic.
        return [torch.empty(shape, dtype=dtype, device=device).zero_() for _ in range(model.num_layers)]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        total = num_pages * page_bytes(model, page_size, dtype)
        raise DeviceError(
            f"no memory for a KV cache of {num_pages} pages, {total / MIB:.0f} MiB, on {device}: "
            f"lower kv_cache_memory, max_num_requests or max_model_len"
        ) from error
