// Keys and values into their slots: kernels/reference/write_kv_pages.py, bit for bit.
#pragma once

#include "cache_rows.h"
#include "divided_rows.h"
#include "isa.h"
#include "pool.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

template <class T>
inline void put_row(const T* x, T* target, int64_t size, float*) {
    __builtin_memcpy(target, x, static_cast<size_t>(size) * sizeof(T));
}
template <class T, class Cache>
inline void put_row(const T* x, Cache* target, int64_t size, float*) {
    for (int64_t d = 0; d < size; d += 16) store_some(target + d, load_some(x + d, size - d), size - d);
}

// The row's scale; NaN and infinity stay.
template <class T>
inline float cache_scale(const T* x, int64_t size, float limit) {
    const float scale = largest_magnitude(x, size) / limit;
    return scale < kLeastScale ? kLeastScale : scale;
}
template <class T>
inline void put_row(const T* x, Int8* target, int64_t size, float* scale) {
    *scale = cache_scale(x, size, 127.0f);
    put_divided(x, target, size, *scale);
}
template <class T>
inline void put_row(const T* x, Fp8* target, int64_t size, float* scale) {
    *scale = cache_scale(x, size, 448.0f);
    put_divided(x, target, size, *scale);
}

template <class T, class Cache>
void write_rows(Pool& threads, const WriteKv& task) {
    // Of one KV head, of the keys or the values: tokens that share a slot are written in their order.
    const auto write_head = [&](int64_t index, int) {
        const int64_t head = index / 2, which = index % 2;
        const T* const rows = static_cast<const T*>(which == 0 ? task.key : task.value) + head * task.head_size;
        const int64_t stride = which == 0 ? task.key_stride : task.value_stride;
        for (int64_t token = 0; token < task.tokens; ++token) {
            const int64_t row = (which * task.slots + task.slot[token]) * task.kv_heads + head;
            put_row(rows + token * stride, static_cast<Cache*>(task.cache) + row * task.head_size, task.head_size,
                    task.scale == nullptr ? nullptr : task.scale + row);
        }
    };
    if (task.tokens * task.head_size * task.kv_heads * 2 < kItemValues) {
        for (int64_t index = 0; index < 2 * task.kv_heads; ++index) write_head(index, 0);
    } else {
        parallel_for(threads, 2 * task.kv_heads, write_head);
    }
}

void write_kv(Pool& threads, const WriteKv& task) {
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_cache_dtype(task.cache_dtype, [&](auto* cache) {
            write_rows<T, std::remove_pointer_t<decltype(cache)>>(threads, task);
        });
    });
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
