// The levels of instruction sets, and the kernels of each.
#pragma once

#include <cstdint>

namespace torchinfer {

class Pool;
struct PackedWeight;

struct RmsNorm {
    const void* x;  // [rows, columns]; a row begins `stride` values after the one before
    const void* weight;
    void* y;  // [rows, columns], contiguous
    int64_t rows, columns, stride;
    float epsilon, offset;
    int32_t dtype;
};

// y = x times the transposed matrix, plus bias. With group_sizes each run of rows has its own matrix.
struct Linear {
    const PackedWeight* weight;
    const void* x;  // [rows, inputs]; a row begins `stride` values after the one before
    void* y;        // [rows, outputs], contiguous
    const void* bias;            // [outputs], or null
    const int32_t* group_sizes;  // [experts], their sum is `rows`; null: there is one matrix
    int64_t rows, stride;
    int32_t dtype;  // of x, y and bias
};

// One for each level; a new kernel is a new field here and a line in level.cpp.
struct Kernels {
    void (*rms_norm)(Pool&, const RmsNorm&);
    int32_t (*linear)(Pool&, const Linear&);  // returns a Status
    float (*measure_read)(Pool&, const void* memory, int64_t bytes, int32_t streams, int64_t ahead);
    int64_t (*measure_products)(Pool&, int32_t format, int64_t repeats);
};

// The kernels of the best level that this machine runs, or of the one that was chosen.
const Kernels& kernels();
const char* level_name();
// False if the machine or the library lacks the level; nullptr or "": the best one.
bool choose_level(const char* name);
// Names of the levels that this machine runs, the best first, separated by spaces.
const char* level_names();

}  // namespace torchinfer
