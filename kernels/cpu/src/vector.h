// Sixteen lanes of 32 bits on every level, so that a kernel is written once. One register with AVX-512, two with AVX2,
// four with NEON; plain loops else.
//
//   F              float32 x 16           I              int32 x 16
//   Bytes          64 bytes               Quad           4 bytes of activations for every lane
//   Pairs          2 weights for each of 16 outputs, as bfloat16 or as floats
//   PairInput      2 activations for every lane
//
// min(a, b) and max(a, b) are b where one of both is NaN.
#pragma once

#include "types.h"

#if TORCHINFER_WITH_avx512
#include "vector_avx512.h"
#elif TORCHINFER_WITH_avx2
#include "vector_avx2.h"
#elif TORCHINFER_WITH_neon
#include "vector_neon.h"
#else
#include "vector_portable.h"
#endif

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

inline float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// The first `count` of 16 values; the others are zero. Nothing behind them is read or written.
template <class T>
__attribute__((noinline)) F load_part(const T* source, int64_t count) {
    T values[16] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = source[i];
    return load(values);
}
template <class T>
__attribute__((noinline)) void store_part(T* target, F value, int64_t count) {
    T values[16];
    store(values, value);
    for (int64_t i = 0; i < count; ++i) target[i] = values[i];
}
template <class T>
__attribute__((always_inline)) inline F load_some(const T* source, int64_t count) {
    return count >= 16 ? load(source) : load_part(source, count);
}
template <class T>
__attribute__((always_inline)) inline void store_some(T* target, F value, int64_t count) {
    if (count >= 16) {
        store(target, value);
    } else {
        store_part(target, value, count);
    }
}

inline int32_t sum(I value) {
    int32_t lanes[16], total = 0;
    store(lanes, value);
    for (int i = 0; i < 16; ++i) total += lanes[i];
    return total;
}
inline int32_t largest(I value) {
    int32_t lanes[16], most = INT32_MIN;
    store(lanes, value);
    for (int i = 0; i < 16; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

// Always in the same order, so that a sum does not depend on the level's registers.
inline float sum(F value) {
    float lanes[16];
    store(lanes, value);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

// Sums over `count` values, 16 at a time: step(i, sum) is the sum with values i to i + 15. Four at once, as an addition
// takes four cycles.
template <class Step>
inline float sum_over(int64_t count, const Step& step) {
    F sums[4] = {zero_float(), zero_float(), zero_float(), zero_float()};
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) sums[part] = step(i + part * 16, sums[part]);
    }
    for (; i < count; i += 16) sums[0] = step(i, sums[0]);
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// As if stored as T and read again.
template <class T>
inline F rounded(F value, const T*) {
    T values[16];
    store(values, value);
    return load(values);
}
template <>
inline F rounded<float>(F value, const float*) {
    return value;
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
