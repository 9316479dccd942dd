// What the parts of the program that calls the library have in common: see exercise_library.cpp.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "isa.h"
#include "packed.h"

namespace torchinfer {
extern "C" {
const char* torchinfer_cpu_levels();
int32_t torchinfer_cpu_choose_level(const char*);
int32_t torchinfer_cpu_configure(int32_t, int32_t);
int64_t torchinfer_cpu_packed_bytes(const PackedWeight*);
int32_t torchinfer_cpu_pack(const PackedWeight*, const void*, void*);
int32_t torchinfer_cpu_linear(const PackedWeight*, const void*, void*, const void*, const int32_t*, int64_t, int64_t,
                              int32_t);
int32_t torchinfer_cpu_attention(const Attention*);
int32_t torchinfer_cpu_rms_norm(const void*, const void*, void*, int64_t, int64_t, int64_t, float, float, int32_t);
int32_t torchinfer_cpu_layer_norm(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, float,
                                  int32_t);
int32_t torchinfer_cpu_sample(const Sample*);
int32_t torchinfer_cpu_quantize(const Quantize*);
int32_t torchinfer_cpu_write_kv(const WriteKv*);
int32_t torchinfer_cpu_rotary(const void*, void*, const float*, const float*, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int32_t, int32_t);
int32_t torchinfer_cpu_gated_activation(const void*, void*, int64_t, int64_t, int64_t, int32_t, int32_t);
int32_t torchinfer_cpu_attention_layer(const AttentionLayer*);
int32_t torchinfer_cpu_mlp_layer(const MlpLayer*);
}
}  // namespace torchinfer

namespace torchinfer::exercise {

inline void require(bool is_true, const char* what) {
    if (is_true) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

// The same numbers on every machine.
inline float number(uint32_t index) {
    const uint32_t mixed = (index * 2654435761u) ^ (index * 40503u >> 3);
    return static_cast<float>(static_cast<int32_t>(mixed >> 8 & 0xffff) - 32768) / 32768.0f;
}

struct Matrix {
    std::vector<uint8_t> rows;  // of the last expert
    std::vector<float> exact;  // what the rows stand for, [experts][outputs][inputs]
    PackedWeight weight = {};
    std::vector<float> scale;
    uint8_t* packed = nullptr;
    ~Matrix() { std::free(packed); }
};

inline float fp8_value(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent > 0 ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
    return code & 128 ? -size : size;
}

// Writes a number into a row as the format has it; returns what it stands for.
inline float put(Matrix& matrix, int64_t index, float value) {
    const int32_t format = matrix.weight.format;
    if (format == kFormatFloat32) {
        std::memcpy(&matrix.rows[index * 4], &value, 4);
    } else if (format == kFormatBf16) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0xffff0000;
        std::memcpy(&value, &bits, 4);
        const uint16_t upper = static_cast<uint16_t>(bits >> 16);
        std::memcpy(&matrix.rows[index * 2], &upper, 2);
    } else if (format == kFormatInt8) {
        value = std::round(value * 127);
        matrix.rows[index] = static_cast<uint8_t>(static_cast<int8_t>(value));
    } else if (format == kFormatInt4) {
        value = std::round(value * 7);
        matrix.rows[index / 2] |= static_cast<uint8_t>((static_cast<int>(value) + 8) << (index % 2 * 4));
    } else {
        const uint8_t code = static_cast<uint8_t>(static_cast<int>(value * 120) & 0xf7);
        matrix.rows[index] = code;
        value = fp8_value(code);
    }
    return value;
}

// Fills what the caller has sized: outputs, inputs, group, format and num_experts of `weight`.
inline void fill(Matrix& matrix) {
    PackedWeight& weight = matrix.weight;
    const int64_t numbers = weight.outputs * weight.inputs;
    const int64_t bytes = torchinfer_cpu_packed_bytes(&weight);
    matrix.exact.resize(static_cast<size_t>(weight.num_experts * numbers));
    matrix.packed = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(weight.num_experts * bytes)));
    weight.values = matrix.packed;
    if (weight.format > kFormatBf16) {
        const int64_t scales = weight.num_experts * num_blocks(weight) * num_groups(weight) * kBlock;
        matrix.scale.assign(static_cast<size_t>(scales), 0.5f);
        weight.scale = matrix.scale.data();
    }
    for (int64_t expert = 0; expert < weight.num_experts; ++expert) {
        matrix.rows.assign(static_cast<size_t>(numbers * 4), 0);
        for (int64_t i = 0; i < numbers; ++i) {
            const int64_t at = expert * numbers + i;
            matrix.exact[static_cast<size_t>(at)] = put(matrix, i, number(static_cast<uint32_t>(at + weight.format)));
        }
        require(torchinfer_cpu_pack(&weight, matrix.rows.data(), matrix.packed + expert * bytes) == kOk, "pack");
    }
}

// Results of every function on the level in use, in every dtype, to be held against those of another level.
struct Outcome {
    const char* what;
    int32_t dtype;
    std::vector<float> values;
};
std::vector<Outcome> outcomes();
void check_outcomes(const std::vector<Outcome>& actual, const std::vector<Outcome>& expected);

}  // namespace torchinfer::exercise
