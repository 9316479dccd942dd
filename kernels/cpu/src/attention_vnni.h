// Int8Attention of attention_formats.h.
#pragma once

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

struct KeyByteOp {  // unsigned keys times signed queries
    using Sum = I;
    using Weight = __m512i;
    using Word = uint32_t;
    using Number = int32_t;
    static I zero() { return zero_int(); }
    static __m512i weight(const uint32_t* p) { return _mm512_load_si512(p); }
    static __m512i input(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static I add_product(I sum, __m512i weight, __m512i input) { return {_mm512_dpbusd_epi32(sum.v, weight, input)}; }
};

struct ValueByteOp : KeyByteOp {  // signed values times unsigned probabilities
    static I add_product(I sum, __m512i weight, __m512i input) { return {_mm512_dpbusd_epi32(sum.v, input, weight)}; }
};

template <class Query>
struct Int8Attention {
    using ScoreOp = KeyByteOp;
    using ValueOp = ValueByteOp;
    using Word = uint32_t;
    using Number = int32_t;
    static constexpr int kPlanes = 2, kNumbersOfWord = 4;
    static constexpr bool kHasRowScale = true;
    static constexpr float kMostOfQuery = 127 * 128, kMostOfProbability = 65535;

    // facts: scale of the row; bits of what the keys' sign bit, turned, adds to a product: 128 times the sum
    static void put_query(const Query* query, int64_t size, uint32_t* words, int64_t row_words, float* facts) {
        I most = zero_int();
        for (int64_t d = 0; d < size; d += 16) most = max(most, bits_of_magnitude(load_some(query + d, size - d)));
        const float largest_number = as_float(static_cast<uint32_t>(largest(most)));
        const float scale = largest_number / kMostOfQuery;
        const F factor = set(scale < 1e-30f ? 0.0f : 1.0f / scale);
        I total = zero_int();
        int8_t* const bytes = reinterpret_cast<int8_t*>(words);
        for (int64_t d = 0; d < row_words * 4; d += 16) {
            const F value = d < size ? load_some(query + d, size - d) : zero_float();
            const I q = round_to_int(mul(value, factor)), upper = shift_right<7>(add(q, set(64)));
            const I lower = sub(q, shift_left<7>(upper));
            store_as_bytes(bytes + d, upper);
            store_as_bytes(bytes + row_words * 4 + d, lower);
            total = add(total, q);
        }
        facts[0] = scale;
        facts[1] = as_float(static_cast<uint32_t>(sum(total)) * 128);
    }
    static __m512i load_row(const TileRows& tile, int64_t key, int64_t d) {
        if (!tile.has(key)) return _mm512_setzero_si512();
        const uint8_t* const p = tile.row(key) + d;
        const int64_t count = tile.size - d;
        return count >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, p);
    }
    static void put_keys(const TileRows& tile, int64_t vectors, uint32_t* keys, RunPrefetch& ahead) {
        const __m512i sign = _mm512_set1_epi8(-128);
        for (int64_t key = 0; key < vectors * 16; key += 16) {
            for (int64_t d = 0; d < tile.size; d += 64) {
                ahead.burst();
                __m512i rows[16];
                for (int i = 0; i < 16; ++i) rows[i] = load_row(tile, key + i, d);
                transpose(rows);
                for (int i = 0; i < 16; ++i) {
                    _mm512_store_si512(keys + (d / 4 + i) * kTile + key, _mm512_xor_si512(rows[i], sign));
                }
            }
        }
    }
    static void put_values(const TileRows& tile, int64_t vectors, uint32_t* values, int64_t padded_size,
                           RunPrefetch& ahead) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int64_t key = 0; key < vectors * 16; key += 4) {
            ahead.burst();
            uint32_t* const target = values + key / 4 * padded_size;
            for (int64_t d = 0; d < tile.size; d += 64) {
                __m512i r[4];
                for (int i = 0; i < 4; ++i) r[i] = _mm512_permutexvar_epi32(order, load_row(tile, key + i, d));
                const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
                const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), e = _mm512_unpackhi_epi8(r[2], r[3]);
                _mm512_store_si512(target + d, _mm512_unpacklo_epi16(a, c));
                _mm512_store_si512(target + d + 16, _mm512_unpackhi_epi16(a, c));
                _mm512_store_si512(target + d + 32, _mm512_unpacklo_epi16(b, e));
                _mm512_store_si512(target + d + 48, _mm512_unpackhi_epi16(b, e));
            }
        }
    }
    // A product's planes put together; the whole fits 32 bits for head sizes up to 1024.
    template <int kBits>
    static I both_planes(const int32_t* products, int64_t apart) {
        const I upper = {_mm512_loadu_si512(products)}, lower = {_mm512_loadu_si512(products + apart)};
        return add(shift_left<kBits>(upper), lower);
    }
    static F score(const int32_t* products, const float* facts, int64_t vector) {
        const I offset = set(static_cast<int32_t>(as_bits(facts[1])));
        return mul(to_float(sub(both_planes<7>(products + vector * 16, kTile), offset)), set(facts[0]));
    }
    // The largest scale's factor is kMostOfProbability. Returns what this multiplies the row's numbers with.
    static float put_factors(const float* scale, int64_t vectors, int64_t first, int64_t end, float* factor) {
        I most = zero_int();  // compared as bits: NaN is above infinity, minus infinity the lowest
        for (int64_t v = 0; v < vectors; ++v) {
            const F seen = keep_range(load(scale + v * 16), first - v * 16, end - v * 16);
            most = max(most, {_mm512_castps_si512(seen.v)});
        }
        const float largest_number = as_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(most.v)));
        const F all = set(largest_number < 1e-30f ? 0.0f : kMostOfProbability / largest_number);
        for (int64_t v = 0; v < vectors; ++v) store(factor + v * 16, mul(load(scale + v * 16), all));
        return largest_number / kMostOfProbability;
    }
    static F put_probabilities(const F* p, const float* factor, int64_t vectors, uint32_t* words) {
        F total = zero_float();
        uint8_t* const bytes = reinterpret_cast<uint8_t*>(words);
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) {
            total = add(total, p[v]);
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(p[v].v, _mm512_loadu_ps(factor + v * 16)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + v * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + kTile + v * 16), _mm512_cvtepi32_epi8(q));
        }
        return total;
    }
    static F weighted(const int32_t* products, int64_t padded_size, int64_t d, F row_scale) {
        return mul(to_float(both_planes<8>(products + d, padded_size)), row_scale);
    }
};

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
