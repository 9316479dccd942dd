// Rotary position embedding: computed in float32, rounded once.
#pragma once

#include "isa.h"
#include "pool.h"
#include "vector.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {


inline F turned_first(F first, F second, F cosine, F sine) { return sub(mul(first, cosine), mul(second, sine)); }
inline F turned_second(F first, F second, F cosine, F sine) { return fma(first, sine, mul(second, cosine)); }

template <class T>
inline void rotate_halves(const T* x, T* y, const float* cosine, const float* sine, int64_t half) {
    for (int64_t f = 0; f < half; f += 16) {
        const int64_t count = half - f;
        const F first = load_some(x + f, count), second = load_some(x + half + f, count);
        const F c = load_some(cosine + f, count), s = load_some(sine + f, count);
        store_some(y + f, turned_first(first, second, c, s), count);
        store_some(y + half + f, turned_second(first, second, c, s), count);
    }
}

template <class T>
inline void rotate_pairs(const T* x, T* y, const float* cosine, const float* sine, int64_t half) {
    for (int64_t f = 0; f < half; f += 16) {
        const int64_t count = half - f < 16 ? half - f : 16;
        T first[16] = {}, second[16] = {};
        for (int64_t i = 0; i < count; ++i) first[i] = x[2 * (f + i)], second[i] = x[2 * (f + i) + 1];
        const F a = load(first), b = load(second), c = load_some(cosine + f, count), s = load_some(sine + f, count);
        store(first, turned_first(a, b, c, s));
        store(second, turned_second(a, b, c, s));
        for (int64_t i = 0; i < count; ++i) y[2 * (f + i)] = first[i], y[2 * (f + i) + 1] = second[i];
    }
}

// Of one position.
struct Angles {
    const float *cosine, *sine;
    int64_t frequencies;
    bool is_interleaved;
};

template <class T>
inline void rotate_head(const T* x, T* y, int64_t size, const Angles& angles) {
    const int64_t rotated = 2 * angles.frequencies;
    if (angles.is_interleaved) {
        rotate_pairs(x, y, angles.cosine, angles.sine, angles.frequencies);
    } else {
        rotate_halves(x, y, angles.cosine, angles.sine, angles.frequencies);
    }
    const auto bytes = static_cast<size_t>(size - rotated) * sizeof(T);
    if (bytes > 0) __builtin_memcpy(y + rotated, x + rotated, bytes);
}

template <class T>
inline void rotate_token(const Rotary& task, int64_t token) {
    const Angles angles = {task.cosine + token * task.frequencies, task.sine + token * task.frequencies,
                           task.frequencies, task.is_interleaved != 0};
    for (int64_t head = 0; head < task.heads; ++head) {
        const T* const x = static_cast<const T*>(task.x) + token * task.stride + head * task.head_size;
        rotate_head(x, static_cast<T*>(task.y) + (token * task.heads + head) * task.head_size, task.head_size, angles);
    }
}

void rotary(Pool& threads, const Rotary& task) {
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel_rows(threads, task.tokens, task.heads * task.head_size,
                      [&](int64_t token) { rotate_token<T>(task, token); });
    });
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
