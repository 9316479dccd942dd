"""What the TPU's attention kernel takes and does, for whoever plans caches and steps. No TPU is needed to ask."""

from __future__ import annotations

import importlib

import torch

from torchinfer.attention_bundles import AttentionBlocks
from torchinfer.batch import KernelPages
from torchinfer.device import dtype_name


def kernel_pages(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_cores: int
) -> KernelPages | str:
    """The pages of the TPU's attention kernel for a layer's heads, or why it cannot take them."""
    layout = importlib.import_module("torchinfer.kernels.tpu.page_layout")
    name = dtype_name(dtype)
    problem: str | None = layout.head_problem(num_heads, num_kv_heads, name)
    if problem is not None:
        return problem
    return KernelPages(name, layout.PageLayout(num_kv_heads, head_dim, name).num_rows, layout.PAGE_SIZE, num_cores)


def attention_blocks(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, num_cores: int) -> AttentionBlocks:
    """What the TPU's attention kernel over pages of a dtype does at once. Imports jax."""
    pages = importlib.import_module("torchinfer.kernels.tpu.page_layout")
    layout = pages.PageLayout(num_kv_heads, head_dim, dtype)
    attention = importlib.import_module("torchinfer.kernels.tpu.ragged_attention")
    config = attention.make_config(layout, num_heads, num_cores=num_cores)
    return AttentionBlocks(
        fetch_pages=config.fetch_pages,
        decode_chunk=config.decode_chunk,
        prefill_chunk=config.prefill_chunk,
        prefill_tokens=config.prefill_tokens,
        num_tiles=config.num_tiles,
        copies_at_once=importlib.import_module("torchinfer.kernels.tpu.ragged_attention_kernel").COPIES_AT_ONCE,
        num_kv_heads=num_kv_heads,
        group_tokens=layout.group_tokens,
        has_scales=layout.scale_rows > 0,
        page_tokens=pages.PAGE_SIZE,
    )
