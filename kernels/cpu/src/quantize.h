// Rows of a matrix into fewer bits: kernels/reference/quantize_matrix.py, bit for bit.
#pragma once

#include "divided_rows.h"
#include "isa.h"
#include "packed.h"
#include "pool.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kQuantizeItemValues = 65536;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One where all is zero, or so small that its scale is; NaN and infinity stay.
inline float divisor_of(float scale) { return scale < kLeastScale ? 1.0f : scale; }

// Rows by columns that share a scale, which is returned. `values` is where the first row begins.
template <class T, class Value>
inline float quantize_block(const Quantize& task, const T* x, Value* values, int64_t rows, int64_t columns) {
    constexpr float kLimit = std::is_same_v<Value, Int8> ? 127.0f : 448.0f;
    uint32_t most = 0;  // magnitudes are in the order of their bits
    for (int64_t row = 0; row < rows; ++row) {
        const uint32_t bits = as_bits(largest_magnitude(x + row * task.stride, columns));
        most = bits > most ? bits : most;
    }
    const float scale = divisor_of(as_float(most) / kLimit);
    for (int64_t row = 0; row < rows; ++row) {
        put_divided(x + row * task.stride, values + row * task.columns, columns, scale);
    }
    return scale;
}

struct Nibbles {  // two numbers, the first in the low half
    uint8_t pair;
};

inline F nibbles(F quotient) { return to_float(round_to_int(max(min(quotient, set(7.0f)), set(-8.0f)))); }

// Of the scales that cut off more and more of the largest numbers, the one with the least squared error.
template <class T>
inline float best_scale(const T* x, int64_t columns) {
    constexpr int kScales = 6;
    const float largest = largest_magnitude(x, columns) / 7.5f;
    float scales[kScales], factors[kScales];
    F errors[kScales];
    for (int i = 0; i < kScales; ++i) {
        scales[i] = divisor_of(largest * static_cast<float>(1 - 0.06 * i));
        factors[i] = 1 / scales[i];
        errors[i] = zero_float();
    }
    const auto try_all = [&](F value) {
        for (int i = 0; i < kScales; ++i) {
            const F difference = sub(mul(nibbles(mul(value, set(factors[i]))), set(scales[i])), value);
            errors[i] = add(errors[i], mul(difference, difference));
        }
    };
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) try_all(load(x + k));
    if (k < columns) try_all(load_part(x + k, columns - k));
    float best = scales[0], least_error = __builtin_inff();
    for (int i = 0; i < kScales; ++i) {
        const float error = sum(errors[i]);
        if (error < least_error) best = scales[i], least_error = error;
    }
    return best;
}

// A group of one row.
template <class T>
inline float quantize_block(const Quantize&, const T* x, Nibbles* values, int64_t, int64_t columns) {
    const float scale = best_scale(x, columns);
    for (int64_t k = 0; k < columns; k += 16) {
        const F quotient = div(load_some(x + k, columns - k), set(scale));
        int8_t numbers[16];
        store_as_bytes(numbers, round_to_int(add(nibbles(quotient), set(8.0f))));
        for (int64_t i = 0; i < 16 && k + i < columns; i += 2) {
            values[(k + i) / 2].pair = static_cast<uint8_t>(numbers[i] | numbers[i + 1] << 4);
        }
    }
    return scale;
}

template <class T, class Value>
void quantize_rows(Pool& threads, const Quantize& task) {
    constexpr int64_t kNumbers = std::is_same_v<Value, Nibbles> ? 2 : 1;  // in a value
    const int64_t groups = task.num_groups(), blocks = (task.rows + task.row_block - 1) / task.row_block;
    const int64_t at_once = 1 + kQuantizeItemValues / (task.row_block * task.columns + 1);
    parallel_ranges(threads, blocks, at_once, [&](int64_t block, int64_t end) {
        for (; block < end; ++block) {
            const int64_t row = block * task.row_block, rows = least(task.rows - row, task.row_block);
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t column = group * task.column_block;
                const T* const x = static_cast<const T*>(task.x) + row * task.stride + column;
                Value* const values = static_cast<Value*>(task.values) + (row * task.columns + column) / kNumbers;
                const int64_t columns = least(task.columns - column, task.column_block);
                task.scale[block * groups + group] = quantize_block(task, x, values, rows, columns);
            }
        }
    });
}

void quantize(Pool& threads, const Quantize& task) {
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (task.format == kFormatInt8) {
            quantize_rows<T, Int8>(threads, task);
        } else if (task.format == kFormatInt4) {
            quantize_rows<T, Nibbles>(threads, task);
        } else {
            quantize_rows<T, Fp8>(threads, task);
        }
    });
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
