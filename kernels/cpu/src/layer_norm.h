// Normalization by mean and variance, in float32; rounded once, at the end.
#pragma once

#include "isa.h"
#include "pool.h"
#include "vector.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

template <class T>
inline void layer_norm_row(const T* x, T* y, const LayerNorm& task) {
    const int64_t columns = task.columns, whole = columns / 16 * 16;
    const float count = static_cast<float>(columns);
    const float total = sum_over(columns, [&](int64_t i, F sum) { return add(sum, load_some(x + i, columns - i)); });
    const F mean = set(total / count);
    float means[16];
    store(means, mean);
    const float squares = sum_over(columns, [&](int64_t i, F sum) {
        // Behind the row's end zeros, less zeros.
        const F distance = sub(load_some(x + i, columns - i), i < whole ? mean : load_part(means, columns - i));
        return fma(distance, distance, sum);
    });
    const F factor = set(1.0f / __builtin_sqrtf(squares / count + task.epsilon));
    const T *const weight = static_cast<const T*>(task.weight), *const bias = static_cast<const T*>(task.bias);
    for (int64_t i = 0; i < columns; i += 16) {
        const F value = mul(sub(load_some(x + i, columns - i), mean), factor);
        const F gain = load_some(weight + i, columns - i), offset = load_some(bias + i, columns - i);
        store_some(y + i, fma(value, gain, offset), columns - i);
    }
}

void layer_norm(Pool& threads, const LayerNorm& task) {
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel_rows(threads, task.rows, task.columns, [&](int64_t row) {
            layer_norm_row(static_cast<const T*>(task.x) + row * task.stride,
                           static_cast<T*>(task.y) + row * task.columns, task);
        });
    });
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
