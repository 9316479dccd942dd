// What all files of the library share: numbers that are not built in, and error codes.
#pragma once

#include <cstdint>
#include <type_traits>

namespace torchinfer {

struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// As kernels/cpu/library.py passes them.
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum CacheDtype : int32_t { kInt8Cache = 3, kFp8Cache = 4 };  // or a Dtype; these have scales
enum Status : int32_t { kOk = 0, kMisaligned = 1, kBadArgument = 2, kNoMemory = 3 };

// Bytes of a number of a Dtype.
constexpr int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Calls body with a null pointer of the type that a dtype stands for.
template <class Body>
inline void with_dtype(int32_t dtype, const Body& body) {
    if (dtype == kFloat32) {
        body(static_cast<float*>(nullptr));
    } else if (dtype == kBfloat16) {
        body(static_cast<Bf16*>(nullptr));
    } else {
        body(static_cast<Half*>(nullptr));
    }
}

}  // namespace torchinfer
