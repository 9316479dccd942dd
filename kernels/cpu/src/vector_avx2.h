// AVX2 with FMA and F16C, with or without products of int8: sixteen lanes are two registers. See vector.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int kTileRows = 4;  // with 1 vector of outputs: 8 sums in 16 registers
constexpr int kByteVectors = 1, kFloatVectors = 1, kPairVectors = 1;
constexpr bool kHasBf16Products = false;

struct F {
    __m256 v[2];
};
struct I {
    __m256i v[2];
};
struct Bytes {
    __m256i v[2];
};

#define FOR_BOTH(type, ...)       \
    type result;                  \
    for (int i = 0; i < 2; ++i) { \
        result.v[i] = __VA_ARGS__; \
    }                             \
    return result

inline F zero_float() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline F set(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
inline F load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline __m128i load_8_words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F load(const Bf16* p) {
    FOR_BOTH(F, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_8_words(p + 8 * i)), 16)));
}
inline F load(const Half* p) { FOR_BOTH(F, _mm256_cvtph_ps(load_8_words(p + 8 * i))); }
inline void store(float* p, F a) {
    _mm256_storeu_ps(p, a.v[0]);
    _mm256_storeu_ps(p + 8, a.v[1]);
}
inline __m256i bf16_bits(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
inline void store(Bf16* p, F a) {
    const __m256i packed = _mm256_packus_epi32(bf16_bits(a.v[0]), bf16_bits(a.v[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(Half* p, F a) {
    for (int i = 0; i < 2; ++i) {
        const __m128i words = _mm256_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), words);
    }
}
inline F add(F a, F b) { FOR_BOTH(F, _mm256_add_ps(a.v[i], b.v[i])); }
inline F sub(F a, F b) { FOR_BOTH(F, _mm256_sub_ps(a.v[i], b.v[i])); }
inline F mul(F a, F b) { FOR_BOTH(F, _mm256_mul_ps(a.v[i], b.v[i])); }
inline F div(F a, F b) { FOR_BOTH(F, _mm256_div_ps(a.v[i], b.v[i])); }
inline F min(F a, F b) { FOR_BOTH(F, _mm256_min_ps(a.v[i], b.v[i])); }
inline F max(F a, F b) { FOR_BOTH(F, _mm256_max_ps(a.v[i], b.v[i])); }
// y where a > b, else zero.
inline F where_above(F a, F b, F y) {
    FOR_BOTH(F, _mm256_and_ps(_mm256_cmp_ps(a.v[i], b.v[i], _CMP_GT_OQ), y.v[i]));
}
inline F fma(F a, F b, F c) { FOR_BOTH(F, _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i])); }
inline F to_float(I a) { FOR_BOTH(F, _mm256_cvtepi32_ps(a.v[i])); }

inline I zero_int() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline I set(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
inline I sub(I a, I b) { FOR_BOTH(I, _mm256_sub_epi32(a.v[i], b.v[i])); }
inline I add(I a, I b) { FOR_BOTH(I, _mm256_add_epi32(a.v[i], b.v[i])); }
inline I mul(I a, I b) { FOR_BOTH(I, _mm256_mullo_epi32(a.v[i], b.v[i])); }
inline I min(I a, I b) { FOR_BOTH(I, _mm256_min_epi32(a.v[i], b.v[i])); }
inline I max(I a, I b) { FOR_BOTH(I, _mm256_max_epi32(a.v[i], b.v[i])); }
template <int kBits>
inline I shift_left(I a) {
    FOR_BOTH(I, _mm256_slli_epi32(a.v[i], kBits));
}
inline I load_bytes_as_int(const uint8_t* p) {
    FOR_BOTH(I, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i))));
}
// Nearest, even where two are as near.
inline I round_to_int(F a) { FOR_BOTH(I, _mm256_cvtps_epi32(a.v[i])); }
inline void store(int32_t* p, I a) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * i), a.v[i]);
}
template <int kBits>
inline I shift_right(I a) {
    FOR_BOTH(I, _mm256_srai_epi32(a.v[i], kBits));
}
// Each number is within int8.
inline void store_as_bytes(int8_t* p, I a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.v[0], a.v[1]), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline I bits_of(F a) { FOR_BOTH(I, _mm256_castps_si256(a.v[i])); }
// Of the numbers without sign, compared as bits: NaN is above infinity.
inline I bits_of_magnitude(F a) {
    FOR_BOTH(I, _mm256_and_si256(_mm256_castps_si256(a.v[i]), _mm256_set1_epi32(0x7fffffff)));
}

inline Bytes load_bytes(const uint8_t* p) {
    FOR_BOTH(Bytes, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
}
inline Bytes low_nibbles(Bytes a) { FOR_BOTH(Bytes, _mm256_and_si256(a.v[i], _mm256_set1_epi8(15))); }
inline Bytes high_nibbles(Bytes a) {
    FOR_BOTH(Bytes, _mm256_and_si256(_mm256_srli_epi16(a.v[i], 4), _mm256_set1_epi8(15)));
}

#if TORCHINFER_WITH_vnni

struct Quad {
    __m256i v;
};
inline Quad load_quad(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return {_mm256_set1_epi32(word)};
}
inline I dot(I sum, Bytes weights, Quad input) { FOR_BOTH(I, _mm256_dpbusd_epi32(sum.v[i], weights.v[i], input.v)); }

#else

struct Quad {
    __m256i even, odd;  // as int16: products of bytes (vpmaddubsw) may not fit into 16 bits
};
inline Quad load_quad(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    const __m256i all = _mm256_set1_epi32(word);
    return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
}
inline I dot(I sum, Bytes weights, Quad input) {
    for (int i = 0; i < 2; ++i) {
        const __m256i even = _mm256_and_si256(weights.v[i], _mm256_set1_epi16(255));
        const __m256i odd = _mm256_srli_epi16(weights.v[i], 8);
        sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(even, input.even));
        sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(odd, input.odd));
    }
    return sum;
}

#endif

struct Pairs {
    __m256 even[2], odd[2];
};
struct PairInput {
    __m256 even, odd;
};
inline Pairs load_pairs(const Bf16* p) {
    Pairs pairs;
    for (int i = 0; i < 2; ++i) {
        const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 16 * i));
        pairs.even[i] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        pairs.odd[i] = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)));
    }
    return pairs;
}
inline PairInput load_pair_input(const float* p) { return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[1])}; }
inline F dot(F sum, Pairs weights, PairInput input) {
    FOR_BOTH(F, _mm256_fmadd_ps(weights.odd[i], input.odd, _mm256_fmadd_ps(weights.even[i], input.even, sum.v[i])));
}

struct Fp8Tables {};
inline Fp8Tables load_fp8_tables() { return {}; }
// The bits of e4m3fn as a float32 are the number times 2^-120, subnormals too.
inline __m256 fp8_to_float(__m256i code) {
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(127));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(128)), 24);
    const __m256 number =
        _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)), _mm256_set1_ps(0x1p120f));
    const __m256i is_nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(127));
    const __m256i bits = _mm256_or_si256(_mm256_castps_si256(number), sign);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), is_nan));
}
// 64 codes in the order of the packed layout -> two vectors: of each 16 bytes the first 8 are of the first one.
inline void load_fp8_pairs(const uint8_t* p, const Fp8Tables&, Pairs* pairs) {
    for (int i = 0; i < 2; ++i) {
        const __m128i left = load_8_words(p + 32 * i), right = load_8_words(p + 32 * i + 16);
        const __m128i words[2] = {_mm_unpacklo_epi64(left, right), _mm_unpackhi_epi64(left, right)};
        for (int vector = 0; vector < 2; ++vector) {
            const __m256i wide = _mm256_cvtepu16_epi32(words[vector]);
            pairs[vector].even[i] = fp8_to_float(_mm256_and_si256(wide, _mm256_set1_epi32(255)));
            pairs[vector].odd[i] = fp8_to_float(_mm256_srli_epi32(wide, 8));
        }
    }
}

#undef FOR_BOTH

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
