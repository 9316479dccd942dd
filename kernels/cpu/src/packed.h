// Matrices as the kernels stream them. A block is 64 outputs, and lies in one piece; in it follow the steps of a few
// inputs each, and a step has the numbers of its 64 outputs, 16 to a vector:
//
//   float32   [K]      [64]                   4 bytes
//   bf16      [K / 2]  [64][2]                2 bytes each
//   int8      [K / 4]  [64][4]                w + 128: vpdpbusd takes one operand without sign, and its correction is
//                                             then one number for each row of inputs, 128 times their sum
//   int4      [K / 8]  [64][4]                the first four inputs in the low halves, the next four in the high ones
//   fp8       [K / 2]  [2][4][2][4][2]        of 32 outputs: [4 of 8][first or second 16][4 of 16][2 inputs], which two
//                                             unpackings of bytes turn into two vectors
//
// K: the inputs, padded with zeros to whole groups, or to whole steps, of int8 to two steps. Outputs are padded to whole
// blocks.
#pragma once

#include "types.h"

namespace torchinfer {

class Pool;

enum Format : int32_t { kFormatFloat32 = 0, kFormatBf16 = 1, kFormatInt8 = 2, kFormatInt4 = 3, kFormatFp8 = 4 };
// Rounded by a scale for each row; to fp8, where the matrix has groups, by one for each group of a row.
enum Activations : int32_t { kAsTheyAre = 0, kRoundedToInt8 = 1, kRoundedToFp8 = 2 };

constexpr int64_t kBlock = 64;
constexpr int64_t kMostInputs = 65536;  // 255 * 128 * more may overflow int32

// The same as PackedStruct in kernels/cpu/packed_weight.py. G: groups of inputs with a scale of their own.
struct PackedWeight {
    const uint8_t* values;    // [experts][blocks][bytes of a block], aligned to 64
    const float* scale;       // [experts][blocks][G][64]; null: 1
    const uint8_t* zero;      // [experts][blocks][G][64]; null: 128 with int8, 8 with int4
    const float* input_scale; // one number for all inputs; null: one a row
    int64_t num_experts, outputs, inputs;
    int64_t group;  // inputs that share a scale, a multiple of 16; at least `inputs`: all
    int32_t format, activations;
};

constexpr int64_t step_inputs(int32_t format) {
    return format == kFormatFloat32 ? 1 : format == kFormatInt8 ? 4 : format == kFormatInt4 ? 8 : 2;
}
constexpr int64_t step_bytes(int32_t format) { return format == kFormatFp8 ? 128 : 256; }

inline int64_t num_blocks(const PackedWeight& weight) { return (weight.outputs + kBlock - 1) / kBlock; }
inline int64_t num_groups(const PackedWeight& weight) {
    return weight.group >= weight.inputs ? 1 : (weight.inputs + weight.group - 1) / weight.group;
}
inline bool is_rounded_in_groups(const PackedWeight& weight) {
    return weight.activations == kRoundedToFp8 && num_groups(weight) > 1;
}
inline int64_t padded_inputs(const PackedWeight& weight) {
    const int64_t groups = num_groups(weight);
    const int64_t multiple = weight.format == kFormatInt8 ? 8 : step_inputs(weight.format);
    return groups > 1 ? groups * weight.group : round_up(weight.inputs, multiple);
}
inline int64_t block_bytes(const PackedWeight& weight) {
    return padded_inputs(weight) / step_inputs(weight.format) * step_bytes(weight.format);
}

// Fills `values` of one expert from rows as torch has them: float32, bf16, int8, e4m3fn [outputs, inputs], or two of
// 4 bits a byte, the first in the low half, [outputs, inputs / 2]. Both may be the same memory where
// `can_pack_in_place`: where blocks and the rows in them take as many bytes.
Status pack_values(Pool& threads, const PackedWeight& weight, const uint8_t* rows, uint8_t* values);
bool can_pack_in_place(const PackedWeight& weight);

}  // namespace torchinfer
