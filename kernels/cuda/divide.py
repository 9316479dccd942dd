"""Division rounded as IEEE 754 has it, and as PyTorch does: to nearest, with subnormal numbers.

Triton's own `div_rn` becomes div.rn.ftz.f32, which takes numbers below 2^-126 for zeros, given or found.
"""

from __future__ import annotations

import triton
import triton.language as tl

DIVISION: tl.constexpr = tl.constexpr("div.rn.f32 $0, $1, $2;")


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, float32 each, broadcast together."""
    return tl.inline_asm_elementwise(DIVISION, "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)
