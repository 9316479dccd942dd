"""Between keys and values in the reference's layout and the pages of page_layout.py, in jax's own operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from torchinfer.kernels.tpu.page_layout import HALF, LANES, PAGE_SIZE, SUBLANES, PageLayout


def to_bits(numbers: Array) -> Array:
    """Numbers of 8 or 16 bits as int32 that hold their bits, the rest zeros."""
    width = jnp.uint8 if numbers.dtype.itemsize == 1 else jnp.uint16
    return jax.lax.bitcast_convert_type(numbers, width).astype(jnp.int32)


def to_tiles(key: Array, value: Array, layout: PageLayout) -> Array:
    """Numbers [..., K, D] of keys and values -> [..., K, tiles, 128]."""

    def pad(numbers: Array, width: int) -> Array:
        return jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, width - layout.head_dim)])

    width = HALF if layout.value_lane else layout.key_tiles * LANES
    both = jnp.concatenate((pad(key, width), pad(value, width)), -1)
    return both.reshape(*key.shape[:-1], layout.num_tiles, LANES)


def pack_pages(data: Array, scale: Array | None, layout: PageLayout) -> Array:
    """A cache in the layout of the reference -> pages, int32 [P, rows, 128].

    data: [2, P, 128, K, D] of the layout's dtype; scale: [2, P, 128, K] float32, or None for bfloat16.
    """
    num_pages = data.shape[1]
    bits = to_bits(to_tiles(data[0], data[1], layout))  # [P, 128, K, tiles, 128]
    tokens = bits.reshape(num_pages, layout.num_groups, layout.group_tokens, -1, LANES)[:, :, token_order(layout)]
    words = tokens.reshape(num_pages, layout.num_groups, SUBLANES, layout.tokens_per_word, -1, LANES)
    width = 32 // layout.tokens_per_word
    packed = sum(words[:, :, :, part] << (part * width) for part in range(layout.tokens_per_word))
    rows = packed.transpose(0, 1, 3, 2, 4).reshape(num_pages, layout.data_rows, LANES)
    if scale is None:
        return rows
    scales = jax.lax.bitcast_convert_type(scale, jnp.int32).transpose(1, 0, 3, 2).reshape(num_pages, -1, LANES)
    padding = jnp.zeros((num_pages, layout.scale_rows - scales.shape[1], LANES), jnp.int32)
    return jnp.concatenate((rows, scales, padding), 1)


def unpack_pages(pages: Array, layout: PageLayout) -> tuple[Array, Array | None]:
    """What `pack_pages` packed: data [2, P, 128, K, D] and scale [2, P, 128, K]."""
    num_pages, heads = pages.shape[0], layout.num_kv_heads
    rows = pages[:, : layout.data_rows].reshape(num_pages, layout.num_groups, -1, SUBLANES, LANES)
    width = 32 // layout.tokens_per_word
    parts = [(rows >> (part * width)) & (2**width - 1) for part in range(layout.tokens_per_word)]
    slots = jnp.stack(parts, 4)  # [P, groups, K * tiles, 8, part, 128]
    slots = slots.reshape(num_pages, layout.num_groups, -1, layout.group_tokens, LANES)
    tokens = slots[:, :, :, jnp.argsort(token_order(layout))].transpose(0, 1, 3, 2, 4)
    bits = tokens.astype(jnp.uint8 if width == 8 else jnp.uint16).reshape(num_pages, PAGE_SIZE, heads, -1)
    numbers = jax.lax.bitcast_convert_type(bits, jnp.dtype(layout.dtype))
    at = HALF if layout.value_lane else layout.key_tiles * LANES
    data = jnp.stack([numbers[..., start : start + layout.head_dim] for start in (0, at)])
    if not layout.scale_rows:
        return data, None
    scales = pages[:, layout.data_rows : layout.data_rows + 2 * heads].reshape(num_pages, 2, heads, LANES)
    return data, jax.lax.bitcast_convert_type(scales, jnp.float32).transpose(1, 0, 3, 2)


def token_order(layout: PageLayout) -> Array:
    """The token of each slot of a group; slot 4 r + b (or 2 r + b) is part b of row r's words."""
    return jnp.array([token_of_slot(slot, layout) for slot in range(layout.group_tokens)])


def token_of_slot(slot: int, layout: PageLayout) -> int:
    """e4m3 comes out of its words as the even slots, then the odd ones, so that these hold tokens 0 to 15 and 16 to 31;
    all else in order. From a row of words to the next it is as many tokens for each part."""
    if layout.dtype == "float8_e4m3fn":
        return slot // 2 + slot % 2 * (layout.group_tokens // 2)
    return slot
