// Bf16Attention of attention_formats.h.
#pragma once

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

struct Bf16Op {
    using Sum = F;
    using Weight = __m512bh;
    using Word = uint32_t;
    using Number = float;
    static F zero() { return zero_float(); }
    static __m512bh weight(const uint32_t* p) { return (__m512bh)_mm512_load_si512(p); }
    static __m512bh input(const uint32_t* p) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p)); }
    static F add_product(F sum, __m512bh weight, __m512bh input) { return {_mm512_dpbf16_ps(sum.v, weight, input)}; }
};

// Numbers d .. d + 31 of a row in bf16; zeros behind its end.
inline __m512i load_32(const Bf16* p, int64_t count) {
    if (count >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint32_t{1} << count) - 1), p);
}
inline __m512i load_32(const Fp8* p, int64_t count) {
    const __mmask32 mask = static_cast<__mmask32>(count >= 32 ? ~uint32_t{0} : (uint32_t{1} << count) - 1);
    const __m512i codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                                                   _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask, p)));
    const Fp8Tables tables = load_fp8_tables();
    const __m512i upper = _mm512_permutex2var_epi8(tables.upper[0], codes, tables.upper[1]);
    const __m512i lower = _mm512_permutex2var_epi8(tables.lower[0], codes, tables.lower[1]);
    return _mm512_unpacklo_epi8(lower, _mm512_ternarylogic_epi32(upper, codes, _mm512_set1_epi8(-128), 0xf8));
}

template <class Cache>
struct Bf16Attention : PlainFactors {
    using ScoreOp = Bf16Op;
    using ValueOp = Bf16Op;
    using Word = uint32_t;
    using Number = float;
    static constexpr int kPlanes = 1, kNumbersOfWord = 2;

    static void put_query(const Bf16* query, int64_t size, uint32_t* words, int64_t, float*) {
        for (int64_t d = 0; d < size; d += 32) _mm512_storeu_si512(words + d / 2, load_32(query + d, size - d));
    }
    static __m512i load_row(const TileRows& tile, int64_t key, int64_t d) {
        if (!tile.has(key)) return _mm512_setzero_si512();
        return load_32(reinterpret_cast<const Cache*>(tile.row(key)) + d, tile.size - d);
    }
    static void put_keys(const TileRows& tile, int64_t vectors, uint32_t* keys, RunPrefetch& ahead) {
        for (int64_t key = 0; key < vectors * 16; key += 16) {
            for (int64_t d = 0; d < tile.size; d += 32) {
                ahead.burst();
                __m512i rows[16];
                for (int i = 0; i < 16; ++i) rows[i] = load_row(tile, key + i, d);
                transpose(rows);
                for (int i = 0; i < 16; ++i) _mm512_store_si512(keys + (d / 2 + i) * kTile + key, rows[i]);
            }
        }
    }
    static void put_values(const TileRows& tile, int64_t vectors, uint32_t* values, int64_t padded_size,
                           RunPrefetch& ahead) {
        const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                               6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
        for (int64_t key = 0; key < vectors * 16; key += 2) {
            ahead.burst();
            uint32_t* const target = values + key / 2 * padded_size;
            for (int64_t d = 0; d < tile.size; d += 32) {
                const __m512i even = load_row(tile, key, d), odd = load_row(tile, key + 1, d);
                _mm512_store_si512(target + d, _mm512_permutex2var_epi16(even, first, odd));
                _mm512_store_si512(target + d + 16, _mm512_permutex2var_epi16(even, second, odd));
            }
        }
    }
    static F score(const float* products, const float*, int64_t vector) { return load(products + vector * 16); }
    static F put_probabilities(const F* p, const float* factor, int64_t vectors, uint32_t* words) {
        F total = zero_float();
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) {
            const __m512 scaled = factor == nullptr ? p[v].v : _mm512_mul_ps(p[v].v, _mm512_loadu_ps(factor + v * 16));
            const __m256i half = (__m256i)_mm512_cvtneps_pbh(scaled);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + v * 8), half);
            const F rounded = {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
            total = add(total, factor == nullptr ? rounded : p[v]);
        }
        return total;
    }
    static F weighted(const float* products, int64_t, int64_t d, F) { return load(products + d); }
};

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
