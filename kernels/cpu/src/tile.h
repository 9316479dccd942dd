// The inner loops of linear layers: a tile is a few rows of inputs times a block of 64 outputs, over all inputs.
//
// Each sum is made by one accumulator in the order of the inputs, group after group, whatever the number of rows: so a
// row's result has the same bits alone and among others.
#pragma once

#include "inputs.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kLine = 64;
constexpr int kStepsAtOnce = 4;            // between two bursts of prefetches
constexpr int64_t kChunkSteps = 64;        // 16 KiB of weights stay in the first cache while several tiles use them
constexpr int64_t kPrefetchAhead = 4096;   // bytes, where each byte of a block is used once

// What a tile brings into the cache for later: lines from `at` to `end`, then from `then` on. What is used once passes
// by the second cache, what is used again goes there.
struct Prefetch {
    const uint8_t *at, *end, *then;
    int lines;  // in a burst
    bool is_used_once;

    void burst() {
        for (int line = 0; line < lines; ++line) {
            if (at >= end) {
                if (then == nullptr) return;
                at = then, then = nullptr;
                end = at + (int64_t{1} << 40);
            }
            if (is_used_once) {
                __builtin_prefetch(at, 0, 0);
            } else {
                __builtin_prefetch(at, 0, 2);
            }
            at += kLine;
        }
    }
};

// Of each group from `group` on the steps from `step` on: whole groups, or a part of the only one.
struct Chunk {
    int64_t group, group_end, step, step_end;
};

struct Tile {
    const uint8_t* values;  // of the block
    const float* scale;     // [G][64], null: 1
    const uint8_t* zero;    // [G][64], null: the format's own
    const uint8_t* inputs;  // see inputs.h
    const int32_t* sums;    // [rows][planes][G]
    const float* row_scale;
    int64_t groups, steps;  // steps of a group
    int64_t vectors;        // of 16 outputs that are not all padding
    Prefetch prefetch;
};

// The formats. kVectors: how many vectors of 16 outputs are computed at once. Value: a plane's sums of a group.

struct Int8Format {
    static constexpr int kStep = 4, kStepBytes = 256, kVectors = kByteVectors, kLaneBytes = 4, kZero = 128;
    static constexpr bool kIsInteger = true;
    using Sum = I;
    using Weight = Bytes;
    using Input = Quad;
    struct Tables {};
    static Sum zero_sum() { return zero_int(); }
    static Tables tables() { return {}; }
    static void load_step(const uint8_t* step, int vector, const Tables&, Weight* weights) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) weights[v] = load_bytes(step + (vector + v) * 64);
    }
    static Input load_input(const uint8_t* p) { return load_quad(reinterpret_cast<const int8_t*>(p)); }
    static Sum multiply(Sum sum, const Weight& weight, const Input& input) { return dot(sum, weight, input); }
};

struct Int4Format : Int8Format {
    static constexpr int kStep = 8, kLaneBytes = 8, kZero = 8;
    struct Weight {
        Bytes low, high;
    };
    struct Input {
        Quad low, high;
    };
    static void load_step(const uint8_t* step, int vector, const Tables&, Weight* weights) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const Bytes both = load_bytes(step + (vector + v) * 64);
            weights[v] = {low_nibbles(both), high_nibbles(both)};
        }
    }
    static Input load_input(const uint8_t* p) {
        const int8_t* const inputs = reinterpret_cast<const int8_t*>(p);
        return {load_quad(inputs), load_quad(inputs + 4)};
    }
    static Sum multiply(Sum sum, const Weight& weight, const Input& input) {
        return dot(dot(sum, weight.low, input.low), weight.high, input.high);
    }
};

struct FloatFormat {
    static constexpr int kStep = 1, kStepBytes = 256, kVectors = kFloatVectors, kLaneBytes = 4, kZero = 0;
    static constexpr bool kIsInteger = false;
    using Sum = F;
    using Weight = F;
    using Input = F;
    struct Tables {};
    static Sum zero_sum() { return zero_float(); }
    static Tables tables() { return {}; }
    static void load_step(const uint8_t* step, int vector, const Tables&, Weight* weights) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) weights[v] = load(reinterpret_cast<const float*>(step) + (vector + v) * 16);
    }
    static Input load_input(const uint8_t* p) { return set(*reinterpret_cast<const float*>(p)); }
    static Sum multiply(Sum sum, const Weight& weight, const Input& input) { return fma(weight, input, sum); }
};

struct Bf16Format {
    using Element = std::conditional_t<kHasBf16Products, Bf16, float>;
    static constexpr int kStep = 2, kStepBytes = 256, kVectors = kPairVectors, kLaneBytes = 2 * sizeof(Element);
    static constexpr int kZero = 0;
    static constexpr bool kIsInteger = false;
    using Sum = F;
    using Weight = Pairs;
    using Input = PairInput;
    struct Tables {};
    static Sum zero_sum() { return zero_float(); }
    static Tables tables() { return {}; }
    static void load_step(const uint8_t* step, int vector, const Tables&, Weight* weights) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            weights[v] = load_pairs(reinterpret_cast<const Bf16*>(step) + (vector + v) * 32);
        }
    }
    static Input load_input(const uint8_t* p) { return load_pair_input(reinterpret_cast<const Element*>(p)); }
    static Sum multiply(Sum sum, const Weight& weight, const Input& input) { return dot(sum, weight, input); }
};

struct Fp8Format : Bf16Format {
    static constexpr int kStepBytes = 128, kVectors = kPairVectors < 2 ? 2 : kPairVectors;  // unpacked two at a time
    using Tables = Fp8Tables;
    static Tables tables() { return load_fp8_tables(); }
    static void load_step(const uint8_t* step, int vector, const Tables& tables, Weight* weights) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v += 2) load_fp8_pairs(step + (vector + v) * 32, tables, weights + v);
    }
};

template <class Format>
constexpr int most_rows(int planes) {
    // Two vectors at once in few registers: half the rows.
    const int lanes = Format::kVectors == 2 && kPairVectors == 1 ? kTileRows / 2 : kTileRows;
    return lanes / planes > 0 ? lanes / planes : 1;
}

// The planes' sums of a group put together. sums: the row's, [planes][groups].
template <class Format, int kPlanes>
inline F combine(const Tile& tile, const I* planes, int64_t group, const int32_t* sums, int vector) {
    F value = zero_float();
#pragma GCC unroll 3
    for (int plane = 0; plane < kPlanes; ++plane) {
        const int32_t inputs = sums[plane * tile.groups + group];
        const I zeros = tile.zero != nullptr
                            ? mul(load_bytes_as_int(tile.zero + group * kBlock + vector * 16), set(inputs))
                            : set(Format::kZero * inputs);
        const I exact = sub(planes[plane], zeros);
        value = plane == 0 ? to_float(exact) : fma(value, set(128.0f), to_float(exact));
    }
    return value;
}
template <class Format, int kPlanes>
inline F combine(const Tile&, const F* planes, int64_t, const int32_t*, int) {
    F value = planes[kPlanes - 1];
    for (int plane = kPlanes - 2; plane >= 0; --plane) value = add(planes[plane], value);
    return value;
}

// kVectors vectors of outputs, from `vector` on, over some steps: the inner loop.
template <class Format, int kLanes>
inline void sum_steps(const uint8_t* values, const uint8_t* inputs, int64_t steps, int vector,
                      const typename Format::Tables& tables, Prefetch& prefetch,
                      typename Format::Sum (&sums)[kLanes][Format::kVectors]) {
    constexpr int kVectors = Format::kVectors;
    int64_t step = 0;
    while (step < steps) {
        prefetch.burst();
        const int64_t end = step + kStepsAtOnce < steps ? step + kStepsAtOnce : steps;
        for (; step < end; ++step) {
            typename Format::Weight weights[kVectors];
            Format::load_step(values, vector, tables, weights);
#pragma GCC unroll 6
            for (int lane = 0; lane < kLanes; ++lane) {
                const typename Format::Input input = Format::load_input(inputs + lane * Format::kLaneBytes);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sums[lane][v] = Format::multiply(sums[lane][v], weights[v], input);
            }
            values += Format::kStepBytes;
            inputs += kLanes * Format::kLaneBytes;
        }
    }
}

template <class Format, int kLanes>
inline void clear_sums(typename Format::Sum (&sums)[kLanes][Format::kVectors]) {
#pragma GCC unroll 6
    for (int lane = 0; lane < kLanes; ++lane) {
#pragma GCC unroll 4
        for (int v = 0; v < Format::kVectors; ++v) sums[lane][v] = Format::zero_sum();
    }
}

template <class Format, int kLanes>
inline void copy_sums(const typename Format::Sum (&from)[kLanes][Format::kVectors],
                      typename Format::Sum (&to)[kLanes][Format::kVectors]) {
#pragma GCC unroll 6
    for (int lane = 0; lane < kLanes; ++lane) {
#pragma GCC unroll 4
        for (int v = 0; v < Format::kVectors; ++v) to[lane][v] = from[lane][v];
    }
}

// The same, added to sums in memory, or put there. Not inline: among the rest of a tile GCC would keep some of the sums
// there.
template <class Format, int kLanes, bool kIsFirst>
__attribute__((noinline)) void add_steps(const uint8_t* values, const uint8_t* inputs, int64_t steps, int vector,
                                         Prefetch& prefetch,
                                         typename Format::Sum (&carried)[kLanes][Format::kVectors]) {
    typename Format::Sum sums[kLanes][Format::kVectors];
    if constexpr (kIsFirst) {
        clear_sums<Format, kLanes>(sums);
    } else {
        copy_sums<Format, kLanes>(carried, sums);
    }
    sum_steps<Format, kLanes>(values, inputs, steps, vector, Format::tables(), prefetch, sums);
    copy_sums<Format, kLanes>(sums, carried);
}

// With one group of inputs their sums go from chunk to chunk in `carried`; with several a chunk has whole groups.
// In one function, or GCC keeps some of the sums of a group in memory.
template <class Format, int kPlanes, int kRows, bool kHasGroups>
void compute_chunk(const Tile& tile, const Chunk& chunk, char* carried, float* result) {
    constexpr int kLanes = kRows * kPlanes, kVectors = Format::kVectors;
    using Sums = typename Format::Sum[kLanes][kVectors];
    const typename Format::Tables tables = Format::tables();
    Prefetch prefetch = tile.prefetch;
    for (int vector = 0; vector < tile.vectors; vector += kVectors) {
        for (int64_t group = chunk.group; group < chunk.group_end; ++group) {
            Sums sums;
            const int64_t first = group * tile.steps + chunk.step, steps = chunk.step_end - chunk.step;
            const uint8_t* const values = tile.values + first * Format::kStepBytes;
            const uint8_t* const inputs = tile.inputs + first * kLanes * Format::kLaneBytes;
            if constexpr (kHasGroups) {
                clear_sums<Format, kLanes>(sums);
                sum_steps<Format, kLanes>(values, inputs, steps, vector, tables, prefetch, sums);
            } else {
                Sums& kept = reinterpret_cast<Sums*>(carried)[vector / kVectors];
                if (chunk.step == 0) {
                    add_steps<Format, kLanes, true>(values, inputs, steps, vector, prefetch, kept);
                } else {
                    add_steps<Format, kLanes, false>(values, inputs, steps, vector, prefetch, kept);
                }
                if (chunk.step_end < tile.steps) continue;
                copy_sums<Format, kLanes>(kept, sums);
            }
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    typename Format::Sum planes[kPlanes];
                    for (int plane = 0; plane < kPlanes; ++plane) planes[plane] = sums[row * kPlanes + plane][v];
                    const int32_t* const row_sums = tile.sums + row * kPlanes * tile.groups;
                    F value = combine<Format, kPlanes>(tile, planes, group, row_sums, vector + v);
                    float* const place = result + row * kBlock + (vector + v) * 16;
                    if (tile.scale == nullptr) {
                        store(place, value);
                        continue;
                    }
                    const F scale = load(tile.scale + group * kBlock + (vector + v) * 16);
                    if constexpr (kHasGroups) {
                        const F before = group == 0 ? zero_float() : load(place);
                        value = fma(value, scale, before);
                        store(place, group + 1 < tile.groups ? value : mul(value, set(tile.row_scale[row])));
                    } else {
                        // In this order, as the reference does it.
                        store(place, mul(mul(value, set(tile.row_scale[row])), scale));
                    }
                }
            }
        }
    }
}

// result: [kRows][64]; what belongs to vectors of padding is left.
template <class Format, int kPlanes, int kRows>
void compute_tile(const Tile& tile, const Chunk& chunk, char* carried, float* result) {
    if (tile.groups > 1) {
        compute_chunk<Format, kPlanes, kRows, true>(tile, chunk, carried, result);
    } else {
        compute_chunk<Format, kPlanes, kRows, false>(tile, chunk, carried, result);
    }
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
