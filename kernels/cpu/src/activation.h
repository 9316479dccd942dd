// Gated activations of feed-forward layers: computed in float32, rounded once.
#pragma once

#include "isa.h"
#include "pool.h"
#include "vector_math.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kActivationItemValues = 4096;

template <int kKind>
inline F activate(F x) {
    if constexpr (kKind == kSilu) {
        return div(x, add(set(1.0f), exp(sub(zero_float(), x))));
    } else if constexpr (kKind == kGelu) {
        // x * (1 + erf(x / sqrt 2)) / 2, and erf is odd: x / 2 + |x| * erf(|x| / sqrt 2) / 2.
        const F magnitude = max(x, sub(zero_float(), x));
        const F half = mul(x, set(0.5f));
        return fma(mul(magnitude, set(0.5f)), erf_of_magnitude(mul(magnitude, set(0.70710678f))), half);
    } else {
        const F cube = mul(mul(x, x), x);
        const F inner = mul(fma(cube, set(0.044715f), x), set(0.79788456f));
        return mul(mul(x, set(0.5f)), add(set(1.0f), tanh(inner)));
    }
}

template <class T, int kKind>
inline void activate_part(const GatedActivation& task, int64_t row, int64_t first, int64_t end) {
    const T* const x = static_cast<const T*>(task.x) + row * task.stride;
    T* const y = static_cast<T*>(task.y) + row * task.y_stride;
    for (int64_t i = first; i < end; i += 16) {
        const F gate = load_some(x + i, end - i), up = load_some(x + task.columns + i, end - i);
        store_some(y + i, mul(activate<kKind>(gate), up), end - i);
    }
}

template <class T>
inline void activate_part(const GatedActivation& task, int64_t row, int64_t first, int64_t end) {
    if (task.kind == kSilu) {
        activate_part<T, kSilu>(task, row, first, end);
    } else if (task.kind == kGelu) {
        activate_part<T, kGelu>(task, row, first, end);
    } else {
        activate_part<T, kGeluTanh>(task, row, first, end);
    }
}

void gated_activation(Pool& threads, const GatedActivation& task) {
    const int64_t parts = (task.columns + kActivationItemValues - 1) / kActivationItemValues;
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel_for(threads, task.rows * parts, [&](int64_t item, int) {
            const int64_t first = item % parts * kActivationItemValues, end = first + kActivationItemValues;
            activate_part<T>(task, item / parts, first, end < task.columns ? end : task.columns);
        });
    });
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
