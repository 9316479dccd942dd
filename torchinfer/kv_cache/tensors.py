"""The cache's memory: its dtype, bytes per page, pages that fit, allocation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from torchinfer import kernels, spmd
from torchinfer.batch import KernelPages, KVCache
from torchinfer.device import has_dtype
from torchinfer.errors import ConfigError, DeviceError
from torchinfer.kernels import tpu_attention
from torchinfer.loader import memory
from torchinfer.models.config import ModelConfig
from torchinfer.spmd import STACKED

logger = logging.getLogger(__name__)

MIB = 2**20
WORDS = 128  # of 32 bits in a row of the kernel's pages
DEFAULT_PAGE_SIZE = 16  # tokens
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


def kernel_pages(model: ModelConfig, dtype: torch.dtype, num_cores: int | None) -> KernelPages | None:
    """The pages of the TPU's attention kernel, for as many cores; None where there is no such kernel, or where it
    cannot take the model's heads or the dtype, which one line of the log says."""
    if num_cores is None:
        return None
    found = tpu_attention.kernel_pages(model.num_heads, model.num_kv_heads, model.head_dim, dtype, num_cores)
    if isinstance(found, str):
        logger.info("attention gathers pages, since the TPU's kernel cannot take them: %s", found)
        return None
    return found


def resolve_page_size(page_size: int | None, pages: KernelPages | None) -> int:
    """Tokens of a page: those of the kernel's, else what was asked for.

    Raises:
        ConfigError: when the kernel has other pages than what was asked for.
    """
    if pages is None:
        return page_size or DEFAULT_PAGE_SIZE
    if page_size not in (None, pages.num_tokens):
        raise ConfigError(
            f"page_size={page_size}: the TPU's attention kernel takes pages of {pages.num_tokens} tokens; use "
            f"{pages.num_tokens}, or leave it out"
        )
    return pages.num_tokens


def page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype, pages: KernelPages | None = None) -> int:
    """Bytes of one page over all layers: keys and values, their scales, and what pads them in the kernel's pages."""
    if pages is not None:
        return model.num_layers * pages.num_rows * WORDS * torch.int32.itemsize
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


def make_layer(
    model: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    pages: KernelPages | None,
    make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
) -> KVCache:
    """One layer's cache, of tensors that `make` makes of a shape and a dtype."""
    if pages is not None:
        kernels.load_page_attention()
        return KVCache(make((num_pages, pages.num_rows, WORDS), torch.int32), None, pages)
    shape = (2, num_pages, page_size, model.num_kv_heads)
    data = make((*shape, model.head_dim), dtype)
    return KVCache(data, make(shape, torch.float32) if dtype in SCALED else None)


def allocate(
    model: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    pages: KernelPages | None = None,
    num_chips: int = 1,
) -> list[KVCache]:
    """One cache a layer, zeros. On several chips `model` is one chip's; a tensor has those of all, STACKED.

    Raises:
        DeviceError: when the device has not enough memory, with the arithmetic.
    """

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if num_chips > 1:
            return spmd.zeros(shape, dtype, STACKED, num_chips)
        # Written now: memory that is only promised would run out in the middle of traffic.
        return _empty(shape, dtype, device).zero_()

    try:
        return [make_layer(model, num_pages, page_size, dtype, pages, zeros) for _ in range(model.num_layers)]
    except (DeviceError, torch.OutOfMemoryError, RuntimeError) as error:
        total = num_pages * page_bytes(model, page_size, dtype, pages)
        raise DeviceError(
            f"no memory for a KV cache of {num_pages} pages, {total / MIB:.0f} MiB, on {device}: "
            f"lower kv_cache_memory, max_num_requests or max_model_len"
        ) from error


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU in large pages: attention reads pages of the cache all over it, each in other small ones."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return memory.allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
