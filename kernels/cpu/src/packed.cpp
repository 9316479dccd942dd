#include "packed.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace torchinfer {
namespace {

// What stands for zero in the padding.
uint8_t zero_byte(int32_t format) { return format == kFormatInt8 ? 128 : format == kFormatInt4 ? 0x88 : 0; }

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

// One step of one output: `count` bytes of its row, which may be fewer at its end.
void put_step(int32_t format, const uint8_t* source, int64_t count, uint8_t* target) {
    if (format == kFormatInt8) {
        for (int64_t i = 0; i < 4; ++i) target[i] = i < count ? source[i] ^ 128 : 128;
    } else if (format == kFormatInt4) {
        const auto nibble = [&](int64_t k) { return k / 2 < count ? source[k / 2] >> (k % 2 * 4) & 15 : 8; };
        for (int64_t i = 0; i < 4; ++i) target[i] = static_cast<uint8_t>(nibble(i) | nibble(i + 4) << 4);
    } else {
        std::memcpy(target, source, static_cast<size_t>(count));
    }
}

// Of every row a cache line or so, then the next rows: what is read and written stays in the first cache.
void pack_block(const PackedWeight& weight, const uint8_t* rows, int64_t block, uint8_t* target) {
    const int32_t format = weight.format;
    const int64_t step_size = format == kFormatFp8 ? 2 : 4, stride = row_bytes(weight);
    const int64_t num_steps = (stride + step_size - 1) / step_size, steps_at_once = 16;
    const int64_t num_outputs = std::min(kBlock, weight.outputs - block * kBlock);
    std::memset(target, zero_byte(format), static_cast<size_t>(block_bytes(weight)));
    for (int64_t first = 0; first < num_steps; first += steps_at_once) {
        const int64_t last = std::min(first + steps_at_once, num_steps);
        for (int64_t output = 0; output < num_outputs; ++output) {
            const uint8_t* const row = rows + (block * kBlock + output) * stride;
            uint8_t* const column = target + place(format, output);
            for (int64_t step = first; step < last; ++step) {
                const int64_t count = std::min(step_size, stride - step * step_size);
                put_step(format, row + step * step_size, count, column + step * step_bytes(format));
            }
        }
    }
}

}  // namespace

void pack_values(Pool& threads, const PackedWeight& weight, const uint8_t* rows, uint8_t* values) {
    parallel_for(threads, num_blocks(weight), [&](int64_t block, int) {
        pack_block(weight, rows, block, values + block * block_bytes(weight));
    });
}

}  // namespace torchinfer
