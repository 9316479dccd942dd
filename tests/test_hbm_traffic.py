"""Bytes between the chip and its memory, read from HLO: by hand, and of a program that the TPU's compiler made."""

from __future__ import annotations

import pytest

from torchinfer import aot
from torchinfer.hbm_traffic import hbm_bytes

HLO = """HloModule graph, is_scheduled=true

%bitcast_fusion (p: bf16[1000,128]) -> bf16[1000,128] {
  %p = bf16[1000,128]{1,0:T(8,128)} parameter(0)
  ROOT %b = bf16[1000,128]{1,0:T(8,128)} bitcast(%p)
}

%rows (p0: bf16[1000,128], p1: s32[4]) -> bf16[4,128] {
  %p0 = bf16[1000,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[4]{0:T(128)S(1)} parameter(1)
  %v = bf16[1000,128]{1,0:T(8,128)} fusion(%p0), kind=kLoop, calls=%bitcast_fusion
  ROOT %g = bf16[4,128]{1,0:T(8,128)S(1)} gather(%v, %p1), offset_dims={1}
}

%update (p0: f32[64,128], p1: f32[2,128], p2: s32[]) -> f32[64,128] {
  %p0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p1 = f32[2,128]{1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)S(6)} parameter(2)
  ROOT %d = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%product (p0: bf16[4,128], p1: s8[128,128]) -> f32[4,128] {
  %p0 = bf16[4,128]{1,0:T(8,128)S(1)} parameter(0)
  %p1 = s8[128,128]{1,0:T(8,128)(4,1)} parameter(1)
  %c = bf16[128,128]{1,0:T(8,128)} convert(%p1)
  ROOT %dot = f32[4,128]{1,0:T(8,128)} convolution(%p0, %c), dim_labels=bf_oi->bf
}

%body (state: (s32[], s8[128,128])) -> (s32[], s8[128,128]) {
  %state = (s32[]{:T(128)}, s8[128,128]{1,0:T(8,128)(4,1)}) parameter(0)
  %m = s8[128,128]{1,0:T(8,128)(4,1)} get-tuple-element(%state), index=1
  %n = s8[128,128]{1,0:T(8,128)(4,1)S(1)} copy(%m)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %t = (s32[]{:T(128)}, s8[128,128]{1,0:T(8,128)(4,1)}) tuple(%i, %m)
}

%condition (state: (s32[], s8[128,128])) -> pred[] {
  %state = (s32[]{:T(128)}, s8[128,128]{1,0:T(8,128)(4,1)}) parameter(0)
  ROOT %true = pred[]{:T(512)} constant(true)
}

ENTRY %main (a: bf16[1000,128], b: s32[4], c: s8[128,128]) -> f32[4,128] {
  %a = bf16[1000,128]{1,0:T(8,128)} parameter(0)
  %b = s32[4]{0:T(128)S(1)} parameter(1)
  %c = s8[128,128]{1,0:T(8,128)(4,1)} parameter(2)
INSTRUCTION
}
"""
LAYOUT = "{1,0:T(8,128)}"
ON_CHIP = "{1,0:T(8,128)S(1)}"
MATRIX = 128 * 128
KERNEL = (
    'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"a(b)","cost_estimate":'
    '{"flops":"1","bytes_accessed":"777"}}}'
)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        # Rows of a table, and not the table; what stays on the chip is free.
        (f"%x = bf16[4,128]{ON_CHIP} fusion(%a, %b), kind=kCustom, calls=%rows", 4 * 128 * 2),
        # Written in place: the rows that are new, read and written.
        (f"%x = f32[64,128]{LAYOUT} fusion(%y, %z, %b), kind=kLoop, calls=%update", 2 * 2 * 128 * 4),
        (f"%x = f32[4,128]{LAYOUT} fusion(%b, %c), kind=kOutput, calls=%product", MATRIX + 4 * 128 * 4),
        # A fetch ahead counts what it fetches, once, and its end nothing.
        (
            "%s = ((s8[128,128]{1,0:T(8,128)(4,1)}), s8[32,128]{1,0:T(8,128)(4,1)S(1)}, s32[]{:S(2)}) "
            "slice-start(%c), slice={[0:32], [0:128]}\n"
            "  %x = s8[32,128]{1,0:T(8,128)(4,1)S(1)} slice-done(%s)",
            32 * 128,
        ),
        (
            "%x = (s8[128,128]{1,0:T(8,128)(4,1)S(1)}, s8[128,128]{1,0:T(8,128)(4,1)}, u32[]{:S(2)}) copy-start(%c)",
            MATRIX,
        ),
        (f"%x = s8[128,128]{LAYOUT} copy(%c)", 2 * MATRIX),
        (f"%x = bf16[8,128]{ON_CHIP} dynamic-slice(%a, %b), dynamic_slice_sizes={{8,128}}", 8 * 128 * 2),
        # A kernel counts what it states and has in HBM (16 bytes are not), once unless it is written in place.
        (f"%x = s8[128,128]{LAYOUT} custom-call(%b, %c), {KERNEL}", 777 - 16),
        (f"%x = s8[2,2]{LAYOUT} custom-call(%b), {KERNEL}", 4),
        (f"%x = s8[2,2]{LAYOUT} custom-call(%b), output_to_operand_aliasing={{0}}, {KERNEL}", 777 - 16),
        # Three rounds of a loop.
        (
            "%x = (s32[]{:T(128)}, s8[128,128]{1,0:T(8,128)(4,1)}) while(%t), condition=%condition, body=%body, "
            'backend_config={"known_trip_count":{"n":"3"}}',
            3 * MATRIX,
        ),
    ],
)
def test_an_operation_counts_what_it_has_in_hbm(instruction, expected):
    more = f"%y = f32[64,128]{LAYOUT} parameter(3)\n  %z = f32[2,128]{LAYOUT} parameter(4)\n  "
    text = HLO.replace("INSTRUCTION", more + instruction)
    assert hbm_bytes(text) == expected


PRODUCTS = """
module @graph {
  func.func @main(%arg0: tensor<64x4096xbf16>, %arg1: tensor<4096x4096xi8>, %arg2: tensor<4096x4096xi8>)
      -> tensor<64x4096xbf16> {
    %0 = stablehlo.convert %arg1 : (tensor<4096x4096xi8>) -> tensor<4096x4096xbf16>
    %1 = stablehlo.dot_general %arg0, %0, contracting_dims = [1] x [0]
        : (tensor<64x4096xbf16>, tensor<4096x4096xbf16>) -> tensor<64x4096xbf16>
    %2 = stablehlo.convert %arg2 : (tensor<4096x4096xi8>) -> tensor<4096x4096xbf16>
    %3 = stablehlo.dot_general %1, %2, contracting_dims = [1] x [0]
        : (tensor<64x4096xbf16>, tensor<4096x4096xbf16>) -> tensor<64x4096xbf16>
    return %3 : tensor<64x4096xbf16>
  }
}
"""


@pytest.mark.libtpu
def test_matrices_that_are_fetched_ahead_count_once():
    compiled = aot.compile_hlo(PRODUCTS, "v5e:1x1")
    least = 2 * 4096 * 4096 + 2 * 64 * 4096 * 2
    assert least <= hbm_bytes(compiled.hlo) < 1.05 * least < compiled.bytes_accessed
