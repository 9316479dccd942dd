// Rows of a KV cache in each of its dtypes, as floats.
#pragma once

#include "vector.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

struct Int8 {
    int8_t value;
};
struct Fp8 {
    uint8_t code;
};

// Calls body with a null pointer of the type that a cache's dtype stands for.
template <class Body>
inline void with_cache_dtype(int32_t dtype, const Body& body) {
    if (dtype == kInt8Cache) {
        body(static_cast<Int8*>(nullptr));
    } else if (dtype == kFp8Cache) {
        body(static_cast<Fp8*>(nullptr));
    } else {
        with_dtype(dtype, body);
    }
}

inline F load(const Int8* p) {
    return to_float(shift_right<24>(shift_left<24>(load_bytes_as_int(reinterpret_cast<const uint8_t*>(p)))));
}

// The bits of e4m3fn as a float32 are the number times 2^-120, subnormals too.
inline const float* fp8_values() {
    alignas(64) static const struct Table {
        float of[256];
        constexpr Table() : of() {
            for (int code = 0; code < 256; ++code) {
                const int exponent = code >> 3 & 15, mantissa = code & 7;
                float value = exponent > 0 ? 8.0f + mantissa : 1.0f * mantissa;
                for (int e = exponent > 0 ? exponent : 1; e < 10; ++e) value *= 0.5f;
                for (int e = 10; e < exponent; ++e) value *= 2.0f;
                if ((code & 127) == 127) value = __builtin_nanf("");
                of[code] = code & 128 ? -value : value;
            }
        }
    } table;
    return table.of;
}
inline F load(const Fp8* p) {
    const float* const values = fp8_values();
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = values[p[i].code];
    return load(lanes);
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
