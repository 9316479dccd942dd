#include "packed.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace torchinfer {
namespace {

// What stands for zero in the padding of a row.
uint8_t zero_byte(int32_t format) { return format == kFormatInt4 ? 0x88 : 0; }

int64_t row_bytes(const PackedWeight& weight) {
    const int64_t inputs = weight.inputs;
    if (weight.format == kFormatFloat32) return inputs * 4;
    if (weight.format == kFormatBf16) return inputs * 2;
    return weight.format == kFormatInt4 ? inputs / 2 : inputs;
}

// Where the numbers of an output lie in a step.
int64_t place(int32_t format, int64_t output) {
    if (format != kFormatFp8) return output * 4;
    const int64_t lane = output % 16 / 4, vector = output / 16 % 2;
    return output / 32 * 64 + lane * 16 + vector * 8 + output % 4 * 2;
}

// Four numbers of 4 bits, a byte each.
uint32_t spread(uint32_t nibbles) {
    const uint32_t pairs = (nibbles | nibbles << 8) & 0x00ff00ff;
    return (pairs | pairs << 4) & 0x0f0f0f0f;
}

// One step of one output, from the bytes of its row.
template <int32_t kFormat>
void put_step(const uint8_t* source, uint8_t* target) {
    constexpr size_t kBytes = kFormat == kFormatFp8 ? 2 : 4;
    uint32_t word = 0;
    std::memcpy(&word, source, kBytes);
    if (kFormat == kFormatInt8) word ^= 0x80808080;
    if (kFormat == kFormatInt4) word = spread(word & 0xffff) | spread(word >> 16) << 4;
    std::memcpy(target, &word, kBytes);
}

// Of every row a cache line or so, then the next rows: what is read and written stays in the first cache.
template <int32_t kFormat>
void pack_block(const PackedWeight& weight, const uint8_t* rows, int64_t num_outputs, uint8_t* target) {
    constexpr int64_t kStepSize = kFormat == kFormatFp8 ? 2 : 4, kStepBytes = step_bytes(kFormat), kStepsAtOnce = 16;
    const int64_t stride = row_bytes(weight), whole_steps = stride / kStepSize, rest = stride % kStepSize;
    const int64_t padded_steps = padded_inputs(weight) / step_inputs(kFormat);
    uint8_t end[4];
    for (int64_t first = 0; first < padded_steps; first += kStepsAtOnce) {
        const int64_t last = std::min(first + kStepsAtOnce, padded_steps);
        for (int64_t output = 0; output < kBlock; ++output) {
            const uint8_t* const row = rows + output * stride;
            uint8_t* const column = target + place(kFormat, output);
            const int64_t whole = output < num_outputs ? std::min(last, whole_steps) : first;
            __builtin_prefetch(row + last * kStepSize);  // rows are too far apart for the hardware to see it coming
            int64_t step = first;
            for (; step < whole; ++step) put_step<kFormat>(row + step * kStepSize, column + step * kStepBytes);
            for (; step < last; ++step) {
                std::memset(end, zero_byte(kFormat), sizeof(end));
                if (output < num_outputs && step == whole_steps) std::memcpy(end, row + step * kStepSize, static_cast<size_t>(rest));
                put_step<kFormat>(end, column + step * kStepBytes);
            }
        }
    }
}

using PackBlock = void (*)(const PackedWeight&, const uint8_t* rows, int64_t num_outputs, uint8_t* target);
constexpr PackBlock kPackBlock[] = {pack_block<kFormatFloat32>, pack_block<kFormatBf16>, pack_block<kFormatInt8>,
                                    pack_block<kFormatInt4>, pack_block<kFormatFp8>};

}  // namespace

bool can_pack_in_place(const PackedWeight& weight) {
    return weight.outputs % kBlock == 0 && block_bytes(weight) == kBlock * row_bytes(weight);
}

Status pack_values(Pool& threads, const PackedWeight& weight, const uint8_t* rows, uint8_t* values) {
    const int64_t size = block_bytes(weight);
    uint8_t* const scratch = static_cast<uint8_t*>(threads.scratch(size * threads.num_threads()));
    if (scratch == nullptr) return kNoMemory;
    parallel_for(threads, num_blocks(weight), [&](int64_t block, int thread) {
        const int64_t first = block * kBlock, num_outputs = std::min(kBlock, weight.outputs - first);
        kPackBlock[weight.format](weight, rows + first * row_bytes(weight), num_outputs, scratch + size * thread);
        std::memcpy(values + block * size, scratch + size * thread, static_cast<size_t>(size));
    });
    return kOk;
}

}  // namespace torchinfer
