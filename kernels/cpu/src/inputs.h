// Rows of inputs as the kernels of linear.h take them: split into planes whose products with the weights are exact or
// nearly so, and laid out in the order in which a tile reads them.
//
//   integers   q = round(x / s) in base 128: one plane where inputs are rounded to int8, two (15 bits) for bf16 and
//              float16, three (21 bits) for float32. Products and sums are exact, so the only error is that of q
//   bf16       one plane for bf16, two for float16, three for float32: x = high + middle + low. Inputs that are rounded
//              to fp8 are one plane; in groups they are multiplied by their scale first, and are then as others
//   floats     one plane, where the machine has no products of bf16
//
// In a tile of R rows times planes: [step][R][inputs of a step].
#pragma once

#include "packed.h"
#include "vector.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr float kSmallestScale = 1e-20f;  // as in kernels/reference/quantized_matmul.py

// Where one row's planes go.
struct RowTarget {
    uint8_t* start;  // of the tile's first step
    int64_t lane;    // of the row's first plane
    int64_t lanes;   // R
};

// Writes 16 inputs of a plane, from input k on, a multiple of 16.
template <int kStep, class T>
inline void put_plane(const RowTarget& target, int64_t lane, int64_t k, const T* values) {
    constexpr int64_t kBytes = kStep * static_cast<int64_t>(sizeof(T));
    uint8_t* place = target.start + (k / kStep * target.lanes + target.lane + lane) * kBytes;
    for (int step = 0; step < 16 / kStep; ++step) {
        __builtin_memcpy(place, values + step * kStep, kBytes);
        place += target.lanes * kBytes;
    }
}
// The end of a row, which has fewer than 16 inputs but whole steps.
template <int kStep, class T>
inline void put_plane_end(const RowTarget& target, int64_t lane, int64_t k, int64_t end, const T* values) {
    constexpr int64_t kBytes = kStep * static_cast<int64_t>(sizeof(T));
    uint8_t* place = target.start + (k / kStep * target.lanes + target.lane + lane) * kBytes;
    for (int step = 0; k + step * kStep < end; ++step) {
        __builtin_memcpy(place, values + step * kStep, kBytes);
        place += target.lanes * kBytes;
    }
}
template <int kStep, class T>
inline void put(const RowTarget& target, int64_t lane, int64_t k, int64_t end, const T* values) {
    if (end - k >= 16) {
        put_plane<kStep>(target, lane, k, values);
    } else {
        put_plane_end<kStep>(target, lane, k, end, values);
    }
}

template <class T>
inline float largest_magnitude(const T* x, int64_t count) {
    I most = zero_int();
    for (int64_t k = 0; k < count; k += 16) most = max(most, bits_of_magnitude(load_some(x + k, count - k)));
    return as_float(static_cast<uint32_t>(largest(most)));
}

// The number by which `count` inputs of a row are divided: given, or so that its largest one becomes `limit`. NaN and infinity stay.
template <class T>
inline float row_scale(const PackedWeight& weight, const T* x, int64_t count, float limit) {
    if (weight.input_scale != nullptr) return *weight.input_scale;
    const float scale = largest_magnitude(x, count) / limit;
    return scale < kSmallestScale ? kSmallestScale : scale;
}

// Splits q into planes in base 128, the highest first.
template <int kPlanes>
inline void split(I q, I (&planes)[kPlanes]) {
    for (int plane = kPlanes - 1; plane > 0; --plane) {
        const I upper = shift_right<7>(add(q, set(64)));
        planes[plane] = sub(q, shift_left<7>(upper));
        q = upper;
    }
    planes[0] = q;
}

// sums: [planes][groups]. Returns the row's scale.
template <int kStep, int kPlanes, class T>
inline float integer_row(const PackedWeight& weight, const T* x, const RowTarget& target, int32_t* sums) {
    constexpr float kLimit = kPlanes == 1 ? 127.0f : kPlanes == 2 ? 127.0f * 128 : 127.0f * 128 * 128;
    const int64_t end = padded_inputs(weight), groups = num_groups(weight), group = groups > 1 ? weight.group : end;
    const float scale = row_scale(weight, x, weight.inputs, kLimit);
    const F divisor = set(scale), limit = set(kLimit), lowest = set(-kLimit);
    for (int64_t g = 0; g < groups; ++g) {
        I totals[kPlanes];
        for (I& total : totals) total = zero_int();
        for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
            const int64_t count = weight.inputs - k;
            const F value = count > 0 ? load_some(x + k, count) : zero_float();
            I planes[kPlanes];
            split<kPlanes>(round_to_int(max(min(div(value, divisor), limit), lowest)), planes);
            for (int plane = 0; plane < kPlanes; ++plane) {
                int8_t bytes[16];
                store_as_bytes(bytes, planes[plane]);
                put<kStep>(target, plane, k, end, bytes);
                totals[plane] = add(totals[plane], planes[plane]);
            }
        }
        for (int plane = 0; plane < kPlanes; ++plane) sums[plane * groups + g] = sum(totals[plane]);
    }
    return scale;
}

// To the nearest number of e4m3fn; |value| is at most 448, or NaN, which stays. Adding 1.5 * 2^14 rounds to multiples of 2^-9, which is the
// distance of its numbers below 2^-6; above, a number's last 20 bits are rounded off.
inline float rounded_to_fp8(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    const float small = as_float(as_bits(value + 24576.0f - 24576.0f) | (bits & 0x80000000));
    const float normal = as_float((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000);
    const float number = magnitude < 0x3c800000 ? small : normal;
    return magnitude > 0x7f800000 ? value : number;
}

inline F quantize_to_fp8(F value, float scale) {
    // min and max give the second where one is NaN.
    const F cut = max(set(-448.0f), min(set(448.0f), div(value, set(scale))));
    float lanes[16];
    store(lanes, cut);
    for (float& lane : lanes) lane = rounded_to_fp8(lane);
    return load(lanes);
}

// Products of bf16: each plane is what bf16 leaves of the one before. Returns the row's scale.
template <int kStep, int kPlanes, class T>
inline float float_row(const PackedWeight& weight, const T* x, const RowTarget& target) {
    const int64_t end = padded_inputs(weight);
    const bool is_rounded = weight.activations == kRoundedToFp8, is_in_groups = is_rounded_in_groups(weight);
    const int64_t group = is_in_groups ? weight.group : end;
    float scale = 1.0f;
    for (int64_t k = 0; k < end; k += 16) {
        const int64_t count = weight.inputs - k;
        if (is_rounded && k % group == 0) scale = row_scale(weight, x + k, count < group ? count : group, 448.0f);
        F value = count > 0 ? load_some(x + k, count) : zero_float();
        if (is_rounded) value = quantize_to_fp8(value, scale);
        if (is_in_groups) value = mul(value, set(scale));
        for (int plane = 0; plane < kPlanes; ++plane) {
            if constexpr (kHasBf16Products && kStep == 2) {
                Bf16 lanes[16];
                store(lanes, value);
                put<kStep>(target, plane, k, end, lanes);
                value = sub(value, load(lanes));
            } else {
                float lanes[16];
                store(lanes, value);
                put<kStep>(target, plane, k, end, lanes);
            }
        }
    }
    return is_in_groups ? 1.0f : scale;
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
