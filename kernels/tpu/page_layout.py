"""The physical layout of the cache's pages that the ragged attention kernel reads and writes.

A page is a blob of rows of 128 words of 32 bits, so that one copy fetches it whole, scales included. It holds 128
tokens, whose scales are the 128 lanes of a row: one scale meets one column of scores without any shuffle.

    rows of a page   [groups, K, tiles, 8]   words of the keys and values
                     [2 * K]                 scales, float32: of all keys, of all values; padded to a multiple of 8

A word holds a lane of 4 tokens (8 bits) or 2 (bfloat16), so that 8 rows are a group of 32 or 16 tokens, which the
matrix unit takes after a bitcast. The groups are outermost: what a new token touches is contiguous. A head of up to 64
numbers has one tile, with the key in lanes 0 to 63 and the value in the rest; zeros in the query hide the value. All
others have tiles of 128 lanes for the key, then for the value, padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

LANES = 128
SUBLANES = 8
PAGE_SIZE = 128
HALF = 64  # the largest head of which a tile holds key and value
FORMATS = {"bfloat16": 2, "int8": 4, "float8_e4m3fn": 4}  # dtype -> tokens in a word


@dataclass(frozen=True)
class PageLayout:
    """Where a page has what, for one dtype and shape of heads."""

    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of FORMATS

    @property
    def tokens_per_word(self) -> int:
        """Tokens whose numbers share a word."""
        return FORMATS[self.dtype]

    @property
    def group_tokens(self) -> int:
        """Tokens in 8 rows of words."""
        return SUBLANES * self.tokens_per_word

    @property
    def num_groups(self) -> int:
        """Groups of tokens in a page."""
        return PAGE_SIZE // self.group_tokens

    @property
    def key_tiles(self) -> int:
        """Tiles of 128 lanes that a query meets."""
        return -(-self.head_dim // LANES)

    @property
    def value_tile(self) -> int:
        """The first tile of a value."""
        return 0 if self.head_dim <= HALF else self.key_tiles

    @property
    def num_tiles(self) -> int:
        """Tiles of a head, keys and values."""
        return self.value_tile + self.key_tiles

    @property
    def value_lane(self) -> int:
        """The first lane of a value in its tiles."""
        return HALF if self.head_dim <= HALF else 0

    @property
    def group_rows(self) -> int:
        """Rows of a group of tokens."""
        return self.num_kv_heads * self.num_tiles * SUBLANES

    @property
    def data_rows(self) -> int:
        """Rows before the scales."""
        return self.num_groups * self.group_rows

    @property
    def scale_rows(self) -> int:
        """Rows of scales, padding included; 0 where there are none."""
        return 0 if self.dtype == "bfloat16" else round_up(2 * self.num_kv_heads, SUBLANES)

    @property
    def num_rows(self) -> int:
        """Rows of a page."""
        return self.data_rows + self.scale_rows

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.num_rows * LANES * 4

    def shape(self, num_pages: int) -> tuple[int, int, int]:
        """Shape of a cache of so many pages, int32."""
        return num_pages, self.num_rows, LANES


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less."""
    return -(-value // multiple) * multiple


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
    """The token of each slot of a group; slot 4 r + b (or 2 r + b) is part b of row r's words.

    e4m3 comes out of its words as the even slots, then the odd ones, so that these hold tokens 0 to 15 and 16 to 31.
    """
    order = jnp.arange(layout.group_tokens)
    if layout.dtype == "float8_e4m3fn":
        return order.reshape(2, -1).T.flatten()
    return order


def slot_of(token: Array | int, layout: PageLayout) -> Array | int:
    """The slot of a token of a group: the inverse of `token_order`."""
    if layout.dtype == "float8_e4m3fn":
        half = layout.group_tokens // 2
        return 2 * (token % half) + token // half
    return token
