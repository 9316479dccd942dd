// Keys and values into their slots: kernels/reference/write_kv_pages.py, bit for bit.
#pragma once

#include "cache_rows.h"
#include "inputs.h"
#include "isa.h"
#include "pool.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kWriteItemValues = 16384;
constexpr float kLeastScale = 1.17549435e-38f;  // the smallest normal number

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
    const F divisor = set(*scale);
    for (int64_t d = 0; d < size; d += 16) {
        const F scaled = div(load_some(x + d, size - d), divisor);
        int8_t bytes[16];
        store_as_bytes(bytes, round_to_int(max(min(scaled, set(127.0f)), set(-128.0f))));
        __builtin_memcpy(target + d, bytes, static_cast<size_t>(size - d < 16 ? size - d : 16));
    }
}
// A number of e4m3fn, times 2^-120, has its bits 20 places further up in a float32.
inline uint8_t fp8_code(float value) {
    const uint32_t sign = as_bits(value) >> 24 & 128;
    if (value != value) return static_cast<uint8_t>(sign | 127);
    const float cut = value > 448.0f ? 448.0f : value < -448.0f ? -448.0f : value;
    const float magnitude = as_float(as_bits(rounded_to_fp8(cut)) & 0x7fffffff);
    return static_cast<uint8_t>(sign | as_bits(magnitude * 0x1p-120f) >> 20);
}
template <class T>
inline void put_row(const T* x, Fp8* target, int64_t size, float* scale) {
    *scale = cache_scale(x, size, 448.0f);
    const F divisor = set(*scale);
    for (int64_t d = 0; d < size; d += 16) {
        float lanes[16];
        store(lanes, div(load_some(x + d, size - d), divisor));
        for (int64_t i = 0; i < 16 && d + i < size; ++i) target[d + i].code = fp8_code(lanes[i]);
    }
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
    if (task.tokens * task.head_size * task.kv_heads * 2 < kWriteItemValues) {
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
