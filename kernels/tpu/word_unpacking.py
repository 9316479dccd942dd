"""From the words of a matrix to its numbers, in a kernel and outside of one: see `word_layout`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.attention_chunk import e4m3_to_bfloat16
from torchinfer.kernels.tpu.page_layout import SUBLANES
from torchinfer.kernels.tpu.word_layout import INTEGERS, NUMBERS_IN_WORD, inputs_at

NIBBLE_UNIT = 1 / 16  # a nibble in the high half of a byte is 16 times itself
_HIGH_NIBBLES = -0x0F0F0F10  # 0xF0F0F0F0


def unpack_words(words: Array, name: str) -> Array:
    """In a kernel: words [8 n, O] -> [inputs, O], int8, times 16 if they are int4; or bfloat16, e4m3 times 2**-120."""
    if name == "int8":
        return pltpu.bitcast(words, jnp.int8)
    if name == "bfloat16":
        return pltpu.bitcast(words, jnp.bfloat16)
    parts: list[Array] = []
    for row in range(0, words.shape[0], SUBLANES):
        tile = words[row : row + SUBLANES]
        if name == "int4":
            nibbles = (tile << 4) & _HIGH_NIBBLES, tile & _HIGH_NIBBLES
            parts += [pltpu.bitcast(each, jnp.int8) for each in nibbles]
        else:
            parts += e4m3_to_bfloat16(tile)
    return jnp.concatenate(parts)


def numbers_of(words: Array, name: str) -> Array:
    """Outside of kernels: words [..., W, O] -> float32 [..., inputs, O], what the numbers are."""
    numbers = NUMBERS_IN_WORD[name]
    width = 32 // numbers
    tiles = words.reshape(*words.shape[:-2], -1, SUBLANES, words.shape[-1])
    out = jnp.zeros((*tiles.shape[:-2], SUBLANES * numbers, words.shape[-1]), jnp.float32)
    for position in range(numbers):
        first, step = inputs_at(position, name)
        bits = (tiles << (32 - width * (position + 1))) >> (32 - width)
        if name in INTEGERS:
            found = bits.astype(jnp.float32)
        elif name == "bfloat16":
            found = jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
        else:
            found = jax.lax.bitcast_convert_type(bits.astype(jnp.int8), jnp.float8_e4m3fn).astype(jnp.float32)
        out = out.at[..., first : first + SUBLANES * step : step, :].set(found)
    return out.reshape(*words.shape[:-2], -1, words.shape[-1])
