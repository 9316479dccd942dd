"""Ragged paged attention as a torch op: what a model on torch_xla calls, where the cache is in the kernel's pages.

    torchinfer::ragged_paged_attention    new keys and values, pages -> output, pages

The op returns the pages, in the same memory where they are donated; `attend_and_write` copies them onto themselves,
which XLA leaves out. With `num_cores` 0 the op is XLA's own formulation, for devices without the kernel.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor

from torchinfer.kernels.reference.quantize_rows import quantize_rows
from torchinfer.kernels.tpu.attention_chunk import KernelConfig
from torchinfer.kernels.tpu.exported import Shapes, export_for_tpu, shapes_of
from torchinfer.kernels.tpu.page_layout import PAGE_SIZE, PageLayout
from torchinfer.kernels.tpu.page_packing import pack_pages, unpack_pages
from torchinfer.kernels.tpu.ragged_attention import make_config, ragged_paged_attention

if TYPE_CHECKING:
    from torchinfer.batch import Batch, KVCache

DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def attend_and_write(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, K, D]
    value: Tensor,  # [T, K, D]
    kv_cache: KVCache,  # with `pages`; written in place
    batch: Batch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:  # [T, H, D]
    """See the door."""
    pages, format_of = kv_cache.data, kv_cache.pages
    assert format_of is not None
    tables = (batch.query_start, batch.kv_length, batch.page_table)
    result: Tensor
    result, written = torch.ops.torchinfer.ragged_paged_attention(
        query, key, value, pages, *tables, format_of.dtype, scale, window, soft_cap, format_of.num_cores
    )
    pages.copy_(written)
    return result


@torch.library.custom_op("torchinfer::ragged_paged_attention", mutates_args=(), device_types="xla")
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    query_start: Tensor,
    kv_length: Tensor,
    page_table: Tensor,
    dtype: str,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    num_cores: int,
) -> tuple[Tensor, Tensor]:
    import torch_xla.core.xla_builder as xla_builder

    layout = PageLayout(key.shape[1], key.shape[2], dtype)
    config = make_config(layout, query.shape[1], window=window, soft_cap=soft_cap, num_cores=max(num_cores, 1))
    numbers, scales = [key, value], []
    if dtype == "bfloat16":
        numbers = [each.to(torch.bfloat16) for each in numbers]
    else:
        numbers, scales = map(list, zip(*(quantize_rows(each, DTYPES[dtype]) for each in (key, value)), strict=True))
    arguments = (query, *numbers, *scales, pages, query_start, kv_length, page_table)
    if num_cores:
        function = _kernel(config, scale, shapes_of(arguments))
    else:
        function = _formulation(config, scale)
    result, written = xla_builder.call_jax(function, arguments)
    return result.to(query.dtype), written


@_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(pages)


# Nothing is forgotten: torch_xla knows a function by its id.
@functools.cache
def _kernel(config: KernelConfig, scale: float, shapes: Shapes) -> Any:
    return export_for_tpu(functools.partial(_with_optional_scales, ragged_paged_attention, config, scale), shapes)


@functools.cache
def _formulation(config: KernelConfig, scale: float) -> Any:
    return functools.partial(_with_optional_scales, attend_with_xla, config, scale)


def _with_optional_scales(function: Any, config: KernelConfig, scale: float, *arguments: Array) -> Any:
    scales = arguments[3:-4] or (None, None)
    return function(*arguments[:3], *scales, *arguments[-4:], config=config, scale=scale)


def attend_with_xla(
    query: Array,
    key: Array,
    value: Array,
    key_scale: Array | None,
    value_scale: Array | None,
    pages: Array,
    query_start: Array,
    kv_length: Array,
    page_table: Array,
    *,
    config: KernelConfig,
    scale: float,
) -> tuple[Array, Array]:
    """What `ragged_paged_attention` computes, in jax's own operations: each token gathers all of its row's pages."""
    data, scales = unpack_pages(pages, config.layout)
    token = jnp.arange(query.shape[0])
    row = jnp.minimum(jnp.searchsorted(query_start[1:], token, side="right"), kv_length.shape[0] - 1)
    is_live = (kv_length[row] > 0) & (token < query_start[row + 1])
    position = jnp.where(is_live, kv_length[row] - (query_start[row + 1] - token), 0)
    page = jnp.where(is_live, page_table[row, position // PAGE_SIZE], pages.shape[0])
    at = (slice(None), page, position % PAGE_SIZE)
    data = data.at[at].set(jnp.stack((key, value)), mode="drop")
    context = data[:, page_table[row]].astype(jnp.float32)  # [2, T, pages, 128, K, D]
    if scales is not None:
        scales = scales.at[at].set(jnp.stack((key_scale, value_scale)), mode="drop")
        context = context * scales[:, page_table[row]][..., None]
    context = context.reshape(2, len(token), -1, *context.shape[-2:])
    other = jnp.arange(context.shape[2])
    first = -1 if config.window is None else position - config.window
    mask = (other <= position[:, None]) & (other > jnp.broadcast_to(first, token.shape)[:, None])
    keys, values = jnp.where(mask[:, :, None, None], context, 0)
    grouped = query.astype(jnp.float32).reshape(len(token), config.layout.num_kv_heads, -1, query.shape[2])
    scores = jnp.einsum("tkgd,tlkd->tkgl", grouped, keys) * scale
    if config.soft_cap is not None:
        scores = config.soft_cap * jnp.tanh(scores / config.soft_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), -1)
    result = jnp.einsum("tkgl,tlkd->tkgd", weights, values).reshape(query.shape)
    return jnp.where(is_live[:, None, None], result, 0), pack_pages(data, scales, config.layout)
