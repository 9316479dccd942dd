// What the machine could do at most, for benchmarks: reading memory in several ways, products of registers.
#pragma once

#include "isa.h"
#include "pool.h"
#include "tile.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kReadItem = 1 << 20;

// Reads `bytes` in `streams` parts side by side, each line fetched `ahead` bytes before; ahead 0: by the machine alone.
template <int kStreams>
float read_item(const uint8_t* memory, int64_t ahead) {
    constexpr int64_t kPart = kReadItem / kStreams;
    F sums[4] = {zero_float(), zero_float(), zero_float(), zero_float()};
    for (int64_t i = 0; i < kPart; i += 4 * kLine) {
        for (int stream = 0; stream < kStreams; ++stream) {
            const uint8_t* const place = memory + stream * kPart + i;
#pragma GCC unroll 4
            for (int line = 0; line < 4; ++line) {
                if (ahead > 0) __builtin_prefetch(place + line * kLine + ahead, 0, 2);
                sums[line] = add(sums[line], load(reinterpret_cast<const float*>(place + line * kLine)));
            }
        }
    }
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// bytes: whole items of 1 MiB. Returns a sum, so that no read is left out.
float measure_read(Pool& threads, const void* memory, int64_t bytes, int32_t streams, int64_t ahead) {
    float totals[1024] = {};
    parallel_for(threads, bytes / kReadItem, [&](int64_t item, int thread) {
        const uint8_t* const start = static_cast<const uint8_t*>(memory) + item * kReadItem;
        const float sum = streams == 1   ? read_item<1>(start, ahead)
                          : streams == 2 ? read_item<2>(start, ahead)
                                         : read_item<4>(start, ahead);
        totals[thread] += sum;
    });
    float total = 0;
    for (float part : totals) total += part;
    return total;
}

// `repeats` times a tile's products of a step, on every thread, with all operands in registers.
template <class Format>
float multiply_registers(Pool& threads, int64_t repeats) {
    constexpr int kVectors = Format::kVectors, kRows = kNumSums<Format, kTileRows>;
    alignas(64) static const uint8_t numbers[512] = {1, 2, 3};
    const uint8_t* memory = numbers;
    asm volatile("" : "+r"(memory));  // the compiler must not know that sums are equal, or it makes one of them
    float totals[1024] = {};
    parallel_for(threads, threads.num_threads(), [&](int64_t, int thread) {
        Sums<Format, kTileRows> sums;
        typename Format::Weight weights[kVectors];
        Format::load_step(memory, 0, Format::tables(), weights);
        const typename Format::Input input = Format::load_input(memory);
        // Unrolled like the products: sums that are indexed somewhere would be kept in memory everywhere.
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const typename Format::Input other = Format::load_input(memory + 8 * (row + 1));
                sums[row][v] = Format::multiply(Format::zero_sum(), weights[v], other);
            }
        }
        for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sums[row][v] = Format::multiply(sums[row][v], weights[v], input);
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                totals[thread] += static_cast<float>(sum(Format::lane_of(sums[row][v], 0)));
            }
        }
    });
    float total = 0;
    for (float part : totals) total += part;
    return total;
}

// Returns the multiply-adds of each thread for each repeat.
int64_t measure_products(Pool& threads, int32_t format, int64_t repeats) {
    volatile float used = 0;
    if (format == kFormatFloat32) {
        used = multiply_registers<FloatFormat>(threads, repeats);
        return kTileRows * FloatFormat::kVectors * 16;
    }
    if (format == kFormatBf16) {
        used = multiply_registers<Bf16Format>(threads, repeats);
        return kTileRows * Bf16Format::kVectors * 16 * 2;
    }
    used = multiply_registers<Int8Format>(threads, repeats);
    (void)used;
    return kTileRows * Int8Format::kVectors * 16 * Int8Format::kStep;
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
