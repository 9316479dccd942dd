// How attention multiplies a tile of 64 keys or values with query rows. Both are the same product: weights, laid out in
// steps of 32-bit words for each lane, times inputs that are the same for all lanes.
//
//   FloatAttention  every cache and query, on every level: a word is a float
//   Bf16Attention   bf16 queries over bf16 and fp8 caches where there are products of bf16: a word is two numbers.
//                   Probabilities are rounded to bf16, and their sum is that of the rounded ones
//   Int8Attention   bf16 and float16 queries over int8 caches where AVX-512 has products of int8: a word is four numbers.
//                   Queries are split into two bytes (15 bits of their largest number), so are the probabilities times
//                   the scales of the values (16 bits of the tile's largest scale). Sums are exact
//
//   keys    [words of a key][64]            values  [64 / numbers of a word][padded head size]
//
// Each sum has one accumulator and one order, whatever the number of rows, so that a row's bits depend on itself only.
#pragma once

#include "cache_rows.h"
#include "vector_math.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kTile = 64;
constexpr int kProductRows = 4;

// The rows of a tile: those from `first` to `end` are there, the others count as zeros.
struct TileRows {
    const uint8_t* start;  // of the head's row in slot 0
    const int64_t* slot;   // [64]
    int64_t slot_bytes, first, end, size;  // size: numbers of a row

    bool has(int64_t key) const { return key >= first && key < end; }
    const uint8_t* row(int64_t key) const { return start + slot[key] * slot_bytes; }
};

// Factors of probabilities that are those of the values, not in relation to the largest.
struct PlainFactors {
    static constexpr bool kHasRowScale = false;
    static float put_factors(const float* scale, int64_t vectors, int64_t, int64_t, float* factor) {
        for (int64_t v = 0; v < vectors; ++v) store(factor + v * 16, load(scale + v * 16));
        return 1.0f;
    }
};

// Memory that a tile reads in one piece.
struct Run {
    const uint8_t* start;
    int64_t bytes;
};

// Brings the runs of the next tile into the cache, a few lines between two pieces of work: the machine has places for a
// few dozen only, and who asks for more waits.
struct RunPrefetch {
    const Run *run, *end;
    int64_t byte, at_once, steps;  // lines of a burst, steps of products between two

    void burst() {
        for (int64_t line = 0; line < at_once && run < end; ++line) {
            __builtin_prefetch(run->start + byte, 0, 2);
            byte += 64;
            if (byte >= run->bytes) ++run, byte = 0;
        }
    }
};

template <class Op, int kRows, int kVectors>
inline void multiply_block(const typename Op::Word* weights, int64_t step_words, const typename Op::Word* inputs,
                           int64_t row_words, int64_t steps, typename Op::Number* output, int64_t row_numbers,
                           RunPrefetch& ahead) {
    typename Op::Sum sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[row][v] = Op::zero();
    }
    for (int64_t step = 0; step < steps;) {
        ahead.burst();
        const int64_t end = step + ahead.steps < steps ? step + ahead.steps : steps;
        for (; step < end; ++step) {
            typename Op::Weight weight[kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) weight[v] = Op::weight(weights + step * step_words + v * 16);
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
                const auto input = Op::input(inputs + row * row_words + step);
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) sums[row][v] = Op::add_product(sums[row][v], weight[v], input);
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store(output + row * row_numbers + v * 16, sums[row][v]);
    }
}

template <class Op, int kVectors>
inline void multiply_rows(const typename Op::Word* weights, int64_t step_words, const typename Op::Word* inputs,
                          int64_t row_words, int64_t steps, typename Op::Number* output, int64_t row_numbers,
                          int64_t rows, RunPrefetch& ahead) {
    int64_t row = 0;
    for (; row + kProductRows <= rows; row += kProductRows) {
        multiply_block<Op, kProductRows, kVectors>(weights, step_words, inputs + row * row_words, row_words, steps,
                                                   output + row * row_numbers, row_numbers, ahead);
    }
    inputs += row * row_words, output += row * row_numbers;
    const auto rest = [&](auto count) {
        multiply_block<Op, decltype(count)::value, kVectors>(weights, step_words, inputs, row_words, steps, output,
                                                             row_numbers, ahead);
    };
    if (rows - row == 1) rest(std::integral_constant<int, 1>());
    if (rows - row == 2) rest(std::integral_constant<int, 2>());
    if (rows - row == 3) rest(std::integral_constant<int, 3>());
}

// output [rows][16 * vectors] = inputs [rows][steps] times weights [steps][16 * vectors]
template <class Op>
inline void multiply_tile(const typename Op::Word* weights, int64_t step_words, const typename Op::Word* inputs,
                          int64_t row_words, int64_t steps, typename Op::Number* output, int64_t row_numbers,
                          int64_t rows, int64_t vectors, RunPrefetch& ahead) {
    constexpr int kVectors = kFloatVectors;
    int64_t v = 0;
    for (; v + kVectors <= vectors; v += kVectors) {
        multiply_rows<Op, kVectors>(weights + v * 16, step_words, inputs, row_words, steps, output + v * 16,
                                    row_numbers, rows, ahead);
    }
    for (; v < vectors; ++v) {
        multiply_rows<Op, 1>(weights + v * 16, step_words, inputs, row_words, steps, output + v * 16, row_numbers,
                             rows, ahead);
    }
}

// Sixteen vectors as the columns of the sixteen before, to target, target + stride, ...
inline void store_transposed(float* target, int64_t stride, const F (&rows)[16]);

struct FloatOp {
    using Sum = F;
    using Weight = F;
    using Word = float;
    using Number = float;
    static F zero() { return zero_float(); }
    static F weight(const float* p) { return load(p); }
    static F input(const float* p) { return set(*p); }
    static F add_product(F sum, F weight, F input) { return fma(weight, input, sum); }
};

template <class Query, class Cache>
struct FloatAttention : PlainFactors {
    using ScoreOp = FloatOp;
    using ValueOp = FloatOp;
    using Word = float;
    using Number = float;
    static constexpr int kPlanes = 1, kNumbersOfWord = 1;

    static void put_query(const Query* query, int64_t size, float* words, int64_t, float*) {
        for (int64_t d = 0; d < size; d += 16) store(words + d, load_some(query + d, size - d));
    }
    static void put_keys(const TileRows& tile, int64_t vectors, float* keys, RunPrefetch& ahead) {
        for (int64_t key = 0; key < vectors * 16; key += 16) {
            for (int64_t d = 0; d < tile.size; d += 16) {
                ahead.burst();
                F rows[16];
                for (int i = 0; i < 16; ++i) rows[i] = load_row(tile, key + i, d);
                store_transposed(keys + d * kTile + key, kTile, rows);
            }
        }
    }
    static void put_values(const TileRows& tile, int64_t vectors, float* values, int64_t padded_size,
                           RunPrefetch& ahead) {
        for (int64_t key = 0; key < vectors * 16; ++key) {
            ahead.burst();
            for (int64_t d = 0; d < tile.size; d += 16) store(values + key * padded_size + d, load_row(tile, key, d));
        }
    }
    static F load_row(const TileRows& tile, int64_t key, int64_t d) {
        if (!tile.has(key)) return zero_float();
        return load_some(reinterpret_cast<const Cache*>(tile.row(key)) + d, tile.size - d);
    }
    static F score(const float* products, const float*, int64_t vector) { return load(products + vector * 16); }
    // Writes the probabilities times their factors, returns their sum without them.
    static F put_probabilities(const F* p, const float* factor, int64_t vectors, float* words) {
        F total = zero_float();
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) {
            total = add(total, p[v]);
            store(words + v * 16, factor == nullptr ? p[v] : mul(p[v], load(factor + v * 16)));
        }
        return total;
    }
    static F weighted(const float* products, int64_t, int64_t d, F) { return load(products + d); }
};

#if TORCHINFER_WITH_avx512

inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88), t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88), t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline void store_transposed(float* target, int64_t stride, const F (&rows)[16]) {
    __m512i words[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(rows[i].v);
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(target + i * stride, words[i]);
}

#else

inline void store_transposed(float* target, int64_t stride, const F (&rows)[16]) {
    float lanes[16][16];
    for (int i = 0; i < 16; ++i) store(lanes[i], rows[i]);
    for (int j = 0; j < 16; ++j) {
        for (int i = 0; i < 16; ++i) target[j * stride + i] = lanes[i][j];
    }
}

#endif

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL

#if TORCHINFER_WITH_avx512 && TORCHINFER_WITH_vnni
#include "attention_vnni.h"
#endif
#if TORCHINFER_WITH_bf16
#include "attention_bf16.h"
#endif
