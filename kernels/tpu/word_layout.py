"""How a matrix lies in memory for the TPU's kernels: words of 32 bits that hold neighbouring inputs of one output.

    words   int32 [E, inputs / numbers in a word, O]      8 rows of words are a tile of 8 * numbers inputs
    scale   float32 [E, G, O]

O is padded to a multiple of 128: XLA would keep fewer columns with the rows innermost, to save memory, and copy all of
them for the kernel in each step.

A tile of 8 x 128 words becomes whole tiles of int8 or bfloat16 by a bitcast, or after shifts and masks, in the order in
which the matrix unit takes its inputs. XLA's own layout of 8 bits would have to be shuffled in the kernel first.

    int8, bfloat16   byte j, or half j, of row r: input 4 r + j, or 2 r + j
    float8_e4m3fn    of each 8 rows, bytes 0 and 2 first (input 2 r + j / 2), then bytes 1 and 3 (16 + 2 r + j / 2)
    int4             of each 8 rows, the low nibbles of bytes first (input 4 r + j), then the high ones (32 + 4 r + j)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.tpu.page_layout import LANES, SUBLANES, round_up

NUMBERS_IN_WORD = {"int8": 4, "int4": 8, "float8_e4m3fn": 4, "bfloat16": 2}
INTEGERS = ("int8", "int4")
INPUT_MULTIPLE = 64  # inputs are a multiple of it: tiles of all formats


def pack_words(values: Tensor, name: str, num_inputs: int) -> Tensor:
    """[..., O, I], signed: int8 (for int4 -8 to 7), e4m3 or bfloat16 -> words int32 [..., num_inputs / numbers, O
    padded], zeros behind the inputs and outputs that there are."""
    numbers = NUMBERS_IN_WORD[name]
    missing = (0, num_inputs - values.shape[-1], 0, round_up(values.shape[-2], LANES) - values.shape[-2])
    bits = functional.pad(_bits(values), missing).transpose(-1, -2)
    tiles = bits.reshape(*bits.shape[:-2], -1, SUBLANES * numbers, bits.shape[-1])  # [..., tiles, inputs of a tile, O]
    width = 32 // numbers
    words = torch.zeros((), dtype=torch.int32, device=values.device)
    for position in range(numbers):
        first, step = inputs_at(position, name)
        part = tiles[..., first : first + SUBLANES * step : step, :].to(torch.int32)
        words = words | ((part & (2**width - 1)) << (position * width))
    return words.flatten(-3, -2).contiguous()  # on the CPU it has the order of `values`


def _bits(values: Tensor) -> Tensor:
    """Integers with the bits of the numbers."""
    if values.dtype == torch.int8:
        return values
    if values.device.type == "xla":  # torch_xla has no view as another dtype but on the host
        from torchinfer.kernels.tpu.matmul_op import bits_of

        return bits_of(values)
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int8)


def inputs_at(position: int, name: str) -> tuple[int, int]:
    """The first input of a tile that is at a position of words, counted from the low bits, and the step to the next."""
    if name == "int4":
        byte, is_high = divmod(position, 2)
        return byte + is_high * 4 * SUBLANES, 4
    if name == "float8_e4m3fn":
        return position // 2 + (position % 2) * 2 * SUBLANES, 2
    return position, NUMBERS_IN_WORD[name]
