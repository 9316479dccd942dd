// Numbers divided by their scale and rounded to int8 or e4m3fn, nearest, even where two are as near.
#pragma once

#include "cache_rows.h"
#include "inputs.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr float kLeastScale = 1.17549435e-38f;  // the smallest normal number

// The codes of e4m3fn as int8. What is beyond 448 is cut off, NaN stays. Of a number from 2^-6 on the last 20 bits are
// rounded off, and the others are its code but for the exponent's offset; smaller ones are multiples of 2^-9.
inline I fp8_codes(F value) {
    const I magnitude = bits_of_magnitude(value), infinity = set(0x7f800000);
    const I bits = max(min(magnitude, set(0x43e00000)), set(0x3c800000));
    const I is_odd = sub(shift_right<20>(bits), shift_left<1>(shift_right<21>(bits)));
    const I normal = shift_right<20>(add(add(bits, set(0x7ffff)), is_odd));  // 968 for 2^-6, which has code 8
    const F size = max(value, sub(zero_float(), value));
    const I small = round_to_int(min(mul(size, set(512.0f)), set(8.0f)));
    const I is_nan = shift_right<22>(sub(max(magnitude, infinity), infinity));
    const I code = max(sub(add(normal, small), set(968)), sub(shift_left<7>(is_nan), is_nan));
    return add(code, shift_left<7>(shift_right<31>(bits_of(value))));
}

inline void put_16(F scaled, Int8* target) {
    store_as_bytes(&target->value, round_to_int(max(min(scaled, set(127.0f)), set(-128.0f))));
}
inline void put_16(F scaled, Fp8* target) {
    store_as_bytes(reinterpret_cast<int8_t*>(target), fp8_codes(scaled));
}

// Nothing behind `size` numbers is read or written.
template <class T, class Value>
inline void put_divided(const T* x, Value* target, int64_t size, float scale) {
    const F divisor = set(scale);
    int64_t k = 0;
    for (; k + 16 <= size; k += 16) put_16(div(load(x + k), divisor), target + k);
    if (k == size) return;
    Value values[16];
    put_16(div(load_part(x + k, size - k), divisor), values);
    for (int64_t i = 0; k + i < size; ++i) target[k + i] = values[i];
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
