// Root mean square normalization: kernels/reference/rms_norm.py says what is rounded where.
#pragma once

#include "isa.h"
#include "pool.h"
#include "vector.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

template <class T>
inline void rms_norm_row(const T* x, const T* weight, T* y, const RmsNorm& task) {
    const int64_t columns = task.columns;
    const float squares = sum_over(columns, [&](int64_t i, F sum) {
        const F value = load_some(x + i, columns - i);
        return fma(value, value, sum);
    });
    const float mean = squares / static_cast<float>(columns);
    const F factor = set(1.0f / __builtin_sqrtf(mean + task.epsilon));
    for (int64_t i = 0; i < columns; i += 16) {
        const F value = mul(load_some(x + i, columns - i), factor);
        const F gain = load_some(weight + i, columns - i);
        const F result =
            task.offset != 0.0f ? mul(value, add(gain, set(task.offset))) : mul(rounded(value, x), gain);
        store_some(y + i, result, columns - i);
    }
}

void rms_norm(Pool& threads, const RmsNorm& task) {
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel_rows(threads, task.rows, task.columns, [&](int64_t row) {
            rms_norm_row(static_cast<const T*>(task.x) + row * task.stride, static_cast<const T*>(task.weight),
                         static_cast<T*>(task.y) + row * task.columns, task);
        });
    });
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
