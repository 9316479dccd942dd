// Plain loops over sixteen lanes, for every machine. See vector.h.
#pragma once

#include "types.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int kTileRows = 3;
constexpr int kByteVectors = 1, kFloatVectors = 1, kPairVectors = 1;
constexpr bool kHasBf16Products = false;

struct F {
    float v[16];
};
struct I {
    int32_t v[16];
};
struct Bytes {
    uint8_t v[64];
};

#define FOR_LANES(type, ...)       \
    type result;                   \
    for (int i = 0; i < 16; ++i) { \
        result.v[i] = __VA_ARGS__; \
    }                              \
    return result

inline float scalar(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}
inline uint32_t scalar_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return scalar(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    return scalar(scalar_bits(scalar(magnitude << 13) * 0x1p112f) | sign);
}
inline uint16_t float_to_half(float value) {
    const uint32_t bits = scalar_bits(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x47800000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {  // below the normal numbers: added to 0.5, the sum's last bit is 2^-24
        return sign | static_cast<uint16_t>(scalar_bits(scalar(magnitude) + 0.5f) - 0x3f000000);
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
}

inline F zero_float() { FOR_LANES(F, 0.0f); }
inline F set(float value) { FOR_LANES(F, value); }
inline F load(const float* p) { FOR_LANES(F, p[i]); }
inline F load(const Bf16* p) { FOR_LANES(F, scalar(static_cast<uint32_t>(p[i].bits) << 16)); }
inline F load(const Half* p) { FOR_LANES(F, half_to_float(p[i].bits)); }
inline void store(float* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline void store(Bf16* p, F a) {
    for (int i = 0; i < 16; ++i) {
        const uint32_t bits = scalar_bits(a.v[i]);
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        p[i].bits = static_cast<uint16_t>((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
inline void store(Half* p, F a) {
    for (int i = 0; i < 16; ++i) p[i].bits = float_to_half(a.v[i]);
}
inline F add(F a, F b) { FOR_LANES(F, a.v[i] + b.v[i]); }
inline F sub(F a, F b) { FOR_LANES(F, a.v[i] - b.v[i]); }
inline F mul(F a, F b) { FOR_LANES(F, a.v[i] * b.v[i]); }
inline F div(F a, F b) { FOR_LANES(F, a.v[i] / b.v[i]); }
inline F min(F a, F b) { FOR_LANES(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F max(F a, F b) { FOR_LANES(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
// y where a > b, else zero.
inline F where_above(F a, F b, F y) { FOR_LANES(F, a.v[i] > b.v[i] ? y.v[i] : 0.0f); }
inline F fma(F a, F b, F c) { FOR_LANES(F, a.v[i] * b.v[i] + c.v[i]); }  // rounded twice: there is no instruction
inline F to_float(I a) { FOR_LANES(F, static_cast<float>(a.v[i])); }

inline I zero_int() { FOR_LANES(I, 0); }
inline I set(int32_t value) { FOR_LANES(I, value); }
inline I sub(I a, I b) { FOR_LANES(I, a.v[i] - b.v[i]); }
inline I add(I a, I b) { FOR_LANES(I, a.v[i] + b.v[i]); }
inline I mul(I a, I b) { FOR_LANES(I, a.v[i] * b.v[i]); }
inline I min(I a, I b) { FOR_LANES(I, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline I max(I a, I b) { FOR_LANES(I, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
template <int kBits>
inline I shift_left(I a) {
    FOR_LANES(I, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits));
}
inline I load_bytes_as_int(const uint8_t* p) { FOR_LANES(I, p[i]); }
// Nearest, even where two are as near. What no int32 holds becomes the smallest one, as on x86.
inline I round_to_int(F a) {
    FOR_LANES(I, a.v[i] > -0x1p31f && a.v[i] < 0x1p31f ? static_cast<int32_t>(__builtin_rintf(a.v[i])) : INT32_MIN);
}
inline void store(int32_t* p, I a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
template <int kBits>
inline I shift_right(I a) {
    FOR_LANES(I, a.v[i] >> kBits);
}
// Each number is within int8.
inline void store_as_bytes(int8_t* p, I a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline I bits_of(F a) { FOR_LANES(I, static_cast<int32_t>(scalar_bits(a.v[i]))); }
// Of the numbers without sign, compared as bits: NaN is above infinity.
inline I bits_of_magnitude(F a) { FOR_LANES(I, static_cast<int32_t>(scalar_bits(a.v[i]) & 0x7fffffff)); }

inline Bytes load_bytes(const uint8_t* p) {
    Bytes result;
    for (int i = 0; i < 64; ++i) result.v[i] = p[i];
    return result;
}
inline Bytes low_nibbles(Bytes a) {
    for (int i = 0; i < 64; ++i) a.v[i] &= 15;
    return a;
}
inline Bytes high_nibbles(Bytes a) {
    for (int i = 0; i < 64; ++i) a.v[i] >>= 4;
    return a;
}

struct Quad {
    int32_t v[4];
};
inline Quad load_quad(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline I dot(I sum, const Bytes& weights, Quad input) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 4; ++j) sum.v[i] += weights.v[4 * i + j] * input.v[j];
    }
    return sum;
}

struct Pairs {
    F even, odd;
};
struct PairInput {
    F even, odd;
};
inline Pairs load_pairs(const Bf16* p) {
    Pairs pairs;
    for (int i = 0; i < 16; ++i) {
        pairs.even.v[i] = scalar(static_cast<uint32_t>(p[2 * i].bits) << 16);
        pairs.odd.v[i] = scalar(static_cast<uint32_t>(p[2 * i + 1].bits) << 16);
    }
    return pairs;
}
inline PairInput load_pair_input(const float* p) { return {set(p[0]), set(p[1])}; }
inline F dot(F sum, const Pairs& weights, const PairInput& input) {
    return fma(weights.odd, input.odd, fma(weights.even, input.even, sum));
}

struct Fp8Tables {};
inline Fp8Tables load_fp8_tables() { return {}; }
// The bits of e4m3fn as a float32 are the number times 2^-120, subnormals too.
inline float fp8_to_float(uint8_t code) {
    const uint32_t magnitude = code & 127, sign = static_cast<uint32_t>(code & 128) << 24;
    if (magnitude == 127) return scalar(0x7fc00000);
    return scalar(scalar_bits(scalar(magnitude << 20) * 0x1p120f) | sign);
}
// 64 codes in the order of the packed layout -> two vectors: of each 16 bytes the first 8 are of the first one.
inline void load_fp8_pairs(const uint8_t* p, const Fp8Tables&, Pairs* pairs) {
    for (int i = 0; i < 16; ++i) {
        for (int vector = 0; vector < 2; ++vector) {
            const uint8_t* const codes = p + i / 4 * 16 + vector * 8 + i % 4 * 2;
            pairs[vector].even.v[i] = fp8_to_float(codes[0]);
            pairs[vector].odd.v[i] = fp8_to_float(codes[1]);
        }
    }
}

#undef FOR_LANES

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
