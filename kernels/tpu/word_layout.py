"""How a matrix lies in memory for the TPU's kernels: words of 32 bits that hold neighbouring inputs of one output.

    words   int32 [E, inputs / numbers in a word, O]      8 rows of words are a tile of 8 * numbers inputs
    scale   float32 [E, G, O]

A tile of 8 x 128 words becomes whole tiles of int8 or bfloat16 by a bitcast, or after shifts and masks, in the order in
which the matrix unit takes its inputs. XLA's own layout of 8 bits would have to be shuffled in the kernel first.

    int8, bfloat16   byte j, or half j, of row r: input 4 r + j, or 2 r + j
    float8_e4m3fn    of each 8 rows, bytes 0 and 2 first (input 2 r + j / 2), then bytes 1 and 3 (16 + 2 r + j / 2)
    int4             of each 8 rows, the low nibbles of bytes first (input 4 r + j), then the high ones (32 + 4 r + j)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from torch import Tensor

from torchinfer.kernels.tpu.attention_chunk import e4m3_to_bfloat16
from torchinfer.kernels.tpu.page_layout import SUBLANES

NUMBERS_IN_WORD = {"int8": 4, "int4": 8, "float8_e4m3fn": 4, "bfloat16": 2}
INTEGERS = ("int8", "int4")
INPUT_MULTIPLE = 64  # inputs are a multiple of it: tiles of all formats
NIBBLE_UNIT = 1 / 16  # a nibble in the high half of a byte is 16 times itself
_HIGH_NIBBLES = -0x0F0F0F10  # 0xF0F0F0F0


def pack_words(values: Tensor, name: str, num_inputs: int) -> Tensor:
    """[..., O, I], signed: int8 (for int4 -8 to 7), e4m3 or bfloat16 -> words int32 [..., num_inputs / numbers, O],
    zeros behind the inputs that there are."""
    numbers = NUMBERS_IN_WORD[name]
    bits = values.view(torch.int16 if name == "bfloat16" else torch.int8).to(torch.int32)
    bits = torch.nn.functional.pad(bits, (0, num_inputs - bits.shape[-1])).transpose(-1, -2)
    tiles = bits.unflatten(-2, (-1, SUBLANES * numbers))  # [..., tiles, inputs of a tile, O]
    width = 32 // numbers
    words = torch.zeros_like(tiles[..., :SUBLANES, :])
    for position in range(numbers):
        first, step = _inputs_at(position, name)
        part = tiles[..., first : first + SUBLANES * step : step, :]
        words = words | ((part & (2**width - 1)) << (position * width))
    return words.flatten(-3, -2)


def _inputs_at(position: int, name: str) -> tuple[int, int]:
    """The first input of a tile that is at a position of words, counted from the low bits, and the step to the next."""
    if name == "int4":
        byte, is_high = divmod(position, 2)
        return byte + is_high * 4 * SUBLANES, 4
    if name == "float8_e4m3fn":
        return position // 2 + (position % 2) * 2 * SUBLANES, 2
    return position, NUMBERS_IN_WORD[name]


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
        first, step = _inputs_at(position, name)
        bits = (tiles << (32 - width * (position + 1))) >> (32 - width)
        if name in INTEGERS:
            found = bits.astype(jnp.float32)
        elif name == "bfloat16":
            found = jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
        else:
            found = jax.lax.bitcast_convert_type(bits.astype(jnp.int8), jnp.float8_e4m3fn).astype(jnp.float32)
        out = out.at[..., first : first + SUBLANES * step : step, :].set(found)
    return out.reshape(*words.shape[:-2], -1, words.shape[-1])
