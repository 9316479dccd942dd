// The levels of instruction sets, and the kernels of each.
#pragma once

#include <cstdint>

namespace torchinfer {

class Pool;

struct RmsNorm {
    const void* x;  // [rows, columns]; a row begins `stride` values after the one before
    const void* weight;
    void* y;  // [rows, columns], contiguous
    int64_t rows, columns, stride;
    float epsilon, offset;
    int32_t dtype;
};

// One for each level; a new kernel is a new field here and a line in level.cpp.
struct Kernels {
    void (*rms_norm)(Pool&, const RmsNorm&);
};

// The kernels of the best level that this machine runs, or of the one that was chosen.
const Kernels& kernels();
const char* level_name();
// False if the machine or the library lacks the level; nullptr or "": the best one.
bool choose_level(const char* name);
// Names of the levels that this machine runs, the best first, separated by spaces.
const char* level_names();

}  // namespace torchinfer
