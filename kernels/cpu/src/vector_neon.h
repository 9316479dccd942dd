// NEON with the products of int8 (dotprod), or of matrices of int8 (i8mm): sixteen lanes are four registers. See vector.h.
#pragma once

#include <arm_neon.h>

#include "types.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int kTileRows = 4;  // with 1 vector of outputs: 16 sums, 4 weights and an input in 32 registers
constexpr int kByteVectors = 1, kFloatVectors = 1, kPairVectors = 1;
constexpr bool kHasBf16Products = false;

struct F {
    float32x4_t v[4];
};
struct I {
    int32x4_t v[4];
};
struct Bytes {
    uint8x16_t v[4];
};

#define FOR_ALL(type, ...)         \
    type result;                   \
    for (int i = 0; i < 4; ++i) {  \
        result.v[i] = __VA_ARGS__; \
    }                              \
    return result

inline F set(float value) { FOR_ALL(F, vdupq_n_f32(value)); }
inline F zero_float() { return set(0.0f); }
inline F load(const float* p) { FOR_ALL(F, vld1q_f32(p + 4 * i)); }
inline F load(const Bf16* p) {
    FOR_ALL(F, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p + 4 * i)), 16)));
}
inline F load(const Half* p) {
    FOR_ALL(F, vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(p + 4 * i))));
}
inline void store(float* p, F a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline void store(Bf16* p, F a) {
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        const uint32x4_t chosen = vbslq_u32(vceqq_f32(a.v[i], a.v[i]), rounded, quiet);
        vst1_u16(reinterpret_cast<uint16_t*>(p + 4 * i), vshrn_n_u32(chosen, 16));
    }
}
inline void store(Half* p, F a) {
    for (int i = 0; i < 4; ++i) vst1_f16(reinterpret_cast<float16_t*>(p + 4 * i), vcvt_f16_f32(a.v[i]));
}
inline F add(F a, F b) { FOR_ALL(F, vaddq_f32(a.v[i], b.v[i])); }
inline F sub(F a, F b) { FOR_ALL(F, vsubq_f32(a.v[i], b.v[i])); }
inline F mul(F a, F b) { FOR_ALL(F, vmulq_f32(a.v[i], b.v[i])); }
inline F div(F a, F b) { FOR_ALL(F, vdivq_f32(a.v[i], b.v[i])); }
// The second where one is NaN, as everywhere: vminq and vmaxq would give NaN.
inline F min(F a, F b) { FOR_ALL(F, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline F max(F a, F b) { FOR_ALL(F, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
// y where a > b, else zero.
inline F where_above(F a, F b, F y) {
    FOR_ALL(F, vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(a.v[i], b.v[i]), vreinterpretq_u32_f32(y.v[i]))));
}
inline F fma(F a, F b, F c) { FOR_ALL(F, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
inline F to_float(I a) { FOR_ALL(F, vcvtq_f32_s32(a.v[i])); }

inline I set(int32_t value) { FOR_ALL(I, vdupq_n_s32(value)); }
inline I zero_int() { return set(0); }
inline I sub(I a, I b) { FOR_ALL(I, vsubq_s32(a.v[i], b.v[i])); }
inline I add(I a, I b) { FOR_ALL(I, vaddq_s32(a.v[i], b.v[i])); }
inline I mul(I a, I b) { FOR_ALL(I, vmulq_s32(a.v[i], b.v[i])); }
inline I min(I a, I b) { FOR_ALL(I, vminq_s32(a.v[i], b.v[i])); }
inline I max(I a, I b) { FOR_ALL(I, vmaxq_s32(a.v[i], b.v[i])); }
template <int kBits>
inline I shift_left(I a) {
    FOR_ALL(I, vshlq_n_s32(a.v[i], kBits));
}
inline I load_bytes_as_int(const uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
             vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
// Nearest, even where two are as near.
inline I round_to_int(F a) { FOR_ALL(I, vcvtnq_s32_f32(a.v[i])); }
inline void store(int32_t* p, I a) {
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]);
}
template <int kBits>
inline I shift_right(I a) {
    FOR_ALL(I, vshrq_n_s32(a.v[i], kBits));
}
// Each number is within int8.
inline void store_as_bytes(int8_t* p, I a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
inline I bits_of(F a) { FOR_ALL(I, vreinterpretq_s32_f32(a.v[i])); }
// Of the numbers without sign, compared as bits: NaN is above infinity.
inline I bits_of_magnitude(F a) {
    FOR_ALL(I, vandq_s32(vreinterpretq_s32_f32(a.v[i]), vdupq_n_s32(0x7fffffff)));
}

inline Bytes load_bytes(const uint8_t* p) { FOR_ALL(Bytes, vld1q_u8(p + 16 * i)); }
inline Bytes low_nibbles(Bytes a) { FOR_ALL(Bytes, vandq_u8(a.v[i], vdupq_n_u8(15))); }
inline Bytes high_nibbles(Bytes a) { FOR_ALL(Bytes, vshrq_n_u8(a.v[i], 4)); }

#if TORCHINFER_WITH_i8mm

// Eight inputs of each output: of two outputs a register.
struct Eights {
    uint8x16_t v[8];
};
// From each output's inputs 0 to 3, and from 4 to 7.
inline Eights eights(Bytes first, Bytes second) {
    Eights result;
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t a = vreinterpretq_u32_u8(first.v[i]), b = vreinterpretq_u32_u8(second.v[i]);
        result.v[2 * i] = vreinterpretq_u8_u32(vzip1q_u32(a, b));
        result.v[2 * i + 1] = vreinterpretq_u8_u32(vzip2q_u32(a, b));
    }
    return result;
}
struct EightOfTwo {
    int8x16_t v;  // eight inputs of a lane, eight of the next one
};
inline EightOfTwo load_eight_of_two(const int8_t* p) { return {vld1q_s8(p)}; }
// Of two lanes: [8] of [2 outputs][2 lanes].
struct SumOfTwo {
    int32x4_t v[8];
};
inline SumOfTwo zero_of_two() {
    SumOfTwo result;
    for (int i = 0; i < 8; ++i) result.v[i] = vdupq_n_s32(0);
    return result;
}
inline SumOfTwo dot(SumOfTwo sum, const Eights& weights, EightOfTwo input) {
    for (int i = 0; i < 8; ++i) sum.v[i] = vusmmlaq_s32(sum.v[i], weights.v[i], input.v);
    return sum;
}
inline I pick_lane(const SumOfTwo& sum, int lane) {
    FOR_ALL(I, lane == 0 ? vuzp1q_s32(sum.v[2 * i], sum.v[2 * i + 1]) : vuzp2q_s32(sum.v[2 * i], sum.v[2 * i + 1]));
}

#else

struct Quad {
    int8x16_t v;
    int32x4_t offset;  // 128 times the sum of the four, for weights whose sign bit was turned
};
inline Quad load_quad(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return {vreinterpretq_s8_s32(vdupq_n_s32(word)), vdupq_n_s32(128 * (p[0] + p[1] + p[2] + p[3]))};
}
// vdotq takes two signed operands, and weights go up to 255: 128 is taken off and comes back with the offset.
inline I dot(I sum, Bytes weights, Quad input) {
    for (int i = 0; i < 4; ++i) {
        const int8x16_t moved = vreinterpretq_s8_u8(veorq_u8(weights.v[i], vdupq_n_u8(128)));
        sum.v[i] = vdotq_s32(vaddq_s32(sum.v[i], input.offset), moved, input.v);
    }
    return sum;
}

#endif

struct Pairs {
    float32x4_t even[4], odd[4];
};
struct PairInput {
    float even, odd;
};
inline Pairs load_pairs(const Bf16* p) {
    Pairs pairs;
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p + 8 * i)));
        pairs.even[i] = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
        pairs.odd[i] = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)));
    }
    return pairs;
}
inline PairInput load_pair_input(const float* p) { return {p[0], p[1]}; }
inline F dot(F sum, Pairs weights, PairInput input) {
    FOR_ALL(F, vfmaq_n_f32(vfmaq_n_f32(sum.v[i], weights.even[i], input.even), weights.odd[i], input.odd));
}

struct Fp8Tables {};
inline Fp8Tables load_fp8_tables() { return {}; }
// The bits of e4m3fn as a float32 are the number times 2^-120, subnormals too.
inline float32x4_t fp8_to_float(uint32x4_t code) {
    const uint32x4_t magnitude = vandq_u32(code, vdupq_n_u32(127));
    const uint32x4_t sign = vshlq_n_u32(vandq_u32(code, vdupq_n_u32(128)), 24);
    const float32x4_t number = vmulq_n_f32(vreinterpretq_f32_u32(vshlq_n_u32(magnitude, 20)), 0x1p120f);
    const uint32x4_t bits = vorrq_u32(vreinterpretq_u32_f32(number), sign);
    const uint32x4_t is_nan = vceqq_u32(magnitude, vdupq_n_u32(127));
    return vreinterpretq_f32_u32(vbslq_u32(is_nan, vdupq_n_u32(0x7fc00000), bits));
}
// 64 codes in the order of the packed layout -> two vectors: of each 16 bytes the first 8 are of the first one.
inline void load_fp8_pairs(const uint8_t* p, const Fp8Tables&, Pairs* pairs) {
    for (int i = 0; i < 4; ++i) {
        const uint16x8_t words = vreinterpretq_u16_u8(vld1q_u8(p + 16 * i));
        const uint32x4_t wide[2] = {vmovl_u16(vget_low_u16(words)), vmovl_u16(vget_high_u16(words))};
        for (int vector = 0; vector < 2; ++vector) {
            pairs[vector].even[i] = fp8_to_float(vandq_u32(wide[vector], vdupq_n_u32(255)));
            pairs[vector].odd[i] = fp8_to_float(vshrq_n_u32(wide[vector], 8));
        }
    }
}

#undef FOR_ALL

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
