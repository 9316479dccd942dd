"""Numbers of 4 bits to numbers of the rows' dtype, in registers.

Behind the bits of 128 in bfloat16, or of 1024 in float16, four bits are whole numbers. A word of 32 bits becomes two
numbers by a shift and two instructions of PTX, which the compiler would not find: both halves stay in one register.
"""

from __future__ import annotations

import triton
import triton.language as tl

# d = (a & 0x000F000F) | exponents, and d = a * 1 + b in both halves
BFLOAT16_BITS: tl.constexpr = tl.constexpr("lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;")
FLOAT16_BITS: tl.constexpr = tl.constexpr("lop3.b32 $0, $1, 0x000F000F, 0x64006400, 0xEA;")
BFLOAT16_SUM: tl.constexpr = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
FLOAT16_SUM: tl.constexpr = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")


@triton.jit
def nibbles(packed: tl.tensor, part: tl.constexpr, zero: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """[O, K] of DTYPE: numbers less their zeros, int16 [O, 1] or [1, 1].

    packed: bytes [O, K], or words int32 [O, K / 2] that hold two numbers at place `part` of their halves
    """
    if packed.dtype == tl.int32:
        numbers = of_words(packed.to(tl.uint32, bitcast=True) >> (4 * part), zero, DTYPE)
    else:
        numbers = of_bits((packed.to(tl.int16) >> (4 * part)) & 15, zero, DTYPE)
    return numbers


@triton.jit
def of_bits(bits: tl.tensor, zero: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """int16 of 0 to 15."""
    if DTYPE == tl.bfloat16:
        numbers = (bits | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128).to(tl.bfloat16)
    elif DTYPE == tl.float16:
        numbers = (bits | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)
    else:
        numbers = (bits - zero).to(DTYPE)
    return numbers


@triton.jit
def of_words(words: tl.tensor, zero: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The lowest numbers of both halves of uint32 [O, W]: [O, 2 * W]. 128 (or 1024) and the zero are subtracted as one
    number, whose bits are those of minus 128 with the zero behind them."""
    if DTYPE == tl.bfloat16:
        words = tl.inline_asm_elementwise(BFLOAT16_BITS, "=r,r", [words], tl.uint32, is_pure=True, pack=1)
        one, shift = tl.full((1, 1), 0x3F803F80, tl.uint32), zero.to(tl.uint32) * 0x10001 + 0xC300C300
        words = tl.inline_asm_elementwise(
            BFLOAT16_SUM, "=r,r,r,r", [words, one, shift], tl.uint32, is_pure=True, pack=1
        )
    elif DTYPE == tl.float16:
        words = tl.inline_asm_elementwise(FLOAT16_BITS, "=r,r", [words], tl.uint32, is_pure=True, pack=1)
        one, shift = tl.full((1, 1), 0x3C003C00, tl.uint32), zero.to(tl.uint32) * 0x10001 + 0xE400E400
        words = tl.inline_asm_elementwise(FLOAT16_SUM, "=r,r,r,r", [words, one, shift], tl.uint32, is_pure=True, pack=1)
    else:
        words &= 0x000F000F
    pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    halves = tl.reshape(pairs, (words.shape[0], 2 * words.shape[1]))
    return (halves - zero).to(DTYPE) if DTYPE == tl.float32 else halves.to(DTYPE, bitcast=True)
