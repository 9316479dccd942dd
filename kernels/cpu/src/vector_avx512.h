// AVX-512, with or without its instructions for products of int8 and bfloat16. See vector.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int kTileRows = 6;  // with 4 vectors of outputs: 24 sums, 4 weights and an input in 32 registers
constexpr int kByteVectors = 4, kFloatVectors = 4;

struct F {
    __m512 v;
};
struct I {
    __m512i v;
};
struct Bytes {
    __m512i v;
};

inline F zero_float() { return {_mm512_setzero_ps()}; }
inline F set(float value) { return {_mm512_set1_ps(value)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load(const Bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline F load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
#if TORCHINFER_WITH_bf16
// Subnormals become zero, which they are for the products of bf16 anyway.
inline void store(Bf16* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#else
inline void store(Bf16* p, F a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}
#endif
inline void store(Half* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
// y where a > b, else zero.
inline F where_above(F a, F b, F y) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }

inline I zero_int() { return {_mm512_setzero_si512()}; }
inline I set(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I mul(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
template <int kBits>
inline I shift_left(I a) {
    return {_mm512_slli_epi32(a.v, kBits)};
}
inline I load_bytes_as_int(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// Nearest, even where two are as near.
inline I round_to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
template <int kBits>
inline I shift_right(I a) {
    return {_mm512_srai_epi32(a.v, kBits)};
}
// Each number is within int8.
inline void store_as_bytes(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// Of the numbers without sign, compared as bits: NaN is above infinity.
inline I bits_of_magnitude(F a) { return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))}; }
inline I bits_of(F a) { return {_mm512_castps_si512(a.v)}; }
inline I min(I a, I b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline I max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_load_si512(p)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }

#if TORCHINFER_WITH_vnni

struct Quad {
    __m512i v;
};
inline Quad load_quad(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return {_mm512_set1_epi32(word)};
}
inline I dot(I sum, Bytes weights, Quad input) { return {_mm512_dpbusd_epi32(sum.v, weights.v, input.v)}; }

#else

struct Quad {
    __m512i even, odd;  // as int16
};
inline Quad load_quad(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    const __m512i all = _mm512_set1_epi32(word);
    return {_mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8), _mm512_srai_epi16(all, 8)};
}
inline I dot(I sum, Bytes weights, Quad input) {
    const __m512i even = _mm512_and_si512(weights.v, _mm512_set1_epi16(255));
    const __m512i odd = _mm512_srli_epi16(weights.v, 8);
    const __m512i products = _mm512_add_epi32(_mm512_madd_epi16(even, input.even), _mm512_madd_epi16(odd, input.odd));
    return {_mm512_add_epi32(sum.v, products)};
}

#endif

#if TORCHINFER_WITH_bf16

constexpr int kPairVectors = 4;
constexpr bool kHasBf16Products = true;

struct Pairs {
    __m512bh v;
};
using PairInput = Pairs;
inline Pairs load_pairs(const Bf16* p) { return {(__m512bh)_mm512_load_si512(p)}; }
inline PairInput load_pair_input(const Bf16* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return {(__m512bh)_mm512_set1_epi32(word)};
}
inline F dot(F sum, Pairs weights, PairInput input) { return {_mm512_dpbf16_ps(sum.v, weights.v, input.v)}; }

// e4m3fn without sign -> the upper and lower bytes of the same number in bfloat16. Looking up both is exact, subnormals
// and NaN too; shifting bits would leave subnormals, which vdpbf16ps takes for zero.
struct Fp8Tables {
    __m512i upper[2], lower[2];
};
inline Fp8Tables load_fp8_tables() {
    alignas(64) static const struct Bytes256 {
        uint8_t upper[128], lower[128];
        constexpr Bytes256() : upper(), lower() {
            for (int code = 0; code < 128; ++code) {
                int exponent = code >> 3, mantissa = code & 7, bits = 0;
                if (code == 127) {
                    bits = 0x7fc0;
                } else if (exponent > 0) {
                    bits = (exponent + 120) << 7 | mantissa << 4;
                } else if (mantissa > 0) {
                    int shift = 0;
                    while ((mantissa << shift & 8) == 0) ++shift;
                    bits = (121 - shift) << 7 | (mantissa << shift & 7) << 4;
                }
                upper[code] = static_cast<uint8_t>(bits >> 8);
                lower[code] = static_cast<uint8_t>(bits & 255);
            }
        }
    } tables;
    return {{_mm512_load_si512(tables.upper), _mm512_load_si512(tables.upper + 64)},
            {_mm512_load_si512(tables.lower), _mm512_load_si512(tables.lower + 64)}};
}
// 64 codes in the order of the packed layout -> two vectors.
inline void load_fp8_pairs(const uint8_t* p, const Fp8Tables& tables, Pairs* pairs) {
    const __m512i codes = _mm512_load_si512(p);
    const __m512i upper = _mm512_permutex2var_epi8(tables.upper[0], codes, tables.upper[1]);
    const __m512i lower = _mm512_permutex2var_epi8(tables.lower[0], codes, tables.lower[1]);
    // The sign bit of each code: upper | (codes & 0x80).
    const __m512i signed_upper = _mm512_ternarylogic_epi32(upper, codes, _mm512_set1_epi8(-128), 0xf8);
    pairs[0].v = (__m512bh)_mm512_unpacklo_epi8(lower, signed_upper);
    pairs[1].v = (__m512bh)_mm512_unpackhi_epi8(lower, signed_upper);
}

#else

constexpr int kPairVectors = 2;
constexpr bool kHasBf16Products = false;

struct Pairs {
    __m512 even, odd;
};
struct PairInput {
    __m512 even, odd;
};

inline Pairs load_pairs(const Bf16* p) {
    const __m512i words = _mm512_load_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
}
inline PairInput load_pair_input(const float* p) { return {_mm512_set1_ps(p[0]), _mm512_set1_ps(p[1])}; }
inline F dot(F sum, Pairs weights, PairInput input) {
    return {_mm512_fmadd_ps(weights.odd, input.odd, _mm512_fmadd_ps(weights.even, input.even, sum.v))};
}

struct Fp8Tables {};
inline Fp8Tables load_fp8_tables() { return {}; }
// The bits of e4m3fn as a float32 are the number times 2^-120, subnormals too.
inline __m512 fp8_to_float(__m512i code) {
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(127));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(128)), 24);
    const __m512 number =
        _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20)), _mm512_set1_ps(0x1p120f));
    const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(127));
    const __m512i bits = _mm512_or_si512(_mm512_castps_si512(number), sign);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, is_nan, _mm512_set1_epi32(0x7fc00000)));
}
inline void load_fp8_pairs(const uint8_t* p, const Fp8Tables&, Pairs* pairs) {
    const __m512i codes = _mm512_load_si512(p);
    // Of each 16 bytes the first 8 are of the first vector.
    const __m512i sorted = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), codes);
    const __m256i halves[2] = {_mm512_castsi512_si256(sorted), _mm512_extracti64x4_epi64(sorted, 1)};
    for (int i = 0; i < 2; ++i) {
        const __m512i words = _mm512_cvtepu16_epi32(halves[i]);
        pairs[i] = {fp8_to_float(_mm512_and_si512(words, _mm512_set1_epi32(255))),
                    fp8_to_float(_mm512_srli_epi32(words, 8))};
    }
}

#endif

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
