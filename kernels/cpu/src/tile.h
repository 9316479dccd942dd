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

// The formats. kVectors: how many vectors of 16 outputs are computed at once. kSumLanes: how many lanes of inputs (rows
// times planes) a Sum holds. Of each lane comes a number of type Lane for each output.
template <class S>
struct OneLane {
    using Sum = S;
    using Lane = S;
    static constexpr int kSumLanes = 1;
    static Lane lane_of(const Sum& sum, int) { return sum; }
};

#if TORCHINFER_WITH_i8mm

// Products of matrices: eight inputs of two lanes at once. A last lane that is alone gets what lies behind it as its
// second one, which nobody asks for.
struct Int8Format {
    static constexpr int kStep = 8, kStepBytes = 512, kVectors = kByteVectors, kLaneBytes = 8, kZero = 128;
    static constexpr int kSumLanes = 2;
    static constexpr bool kIsInteger = true;
    using Sum = SumOfTwo;
    using Lane = I;
    using Weight = Eights;
    using Input = EightOfTwo;
    struct Tables {};
    static Sum zero_sum() { return zero_of_two(); }
    static Lane lane_of(const Sum& sum, int lane) { return pick_lane(sum, lane); }
    static Tables tables() { return {}; }
    static void load_step(const uint8_t* step, int vector, const Tables&, Weight* weights) {
        static_assert(kVectors == 1);
        weights[0] = eights(load_bytes(step + vector * 64), load_bytes(step + 256 + vector * 64));
    }
    static Input load_input(const uint8_t* p) { return load_eight_of_two(reinterpret_cast<const int8_t*>(p)); }
    static Sum multiply(const Sum& sum, const Weight& weight, const Input& input) { return dot(sum, weight, input); }
};

struct Int4Format : Int8Format {
    static constexpr int kStepBytes = 256, kZero = 8;
    static void load_step(const uint8_t* step, int vector, const Tables&, Weight* weights) {
        const Bytes both = load_bytes(step + vector * 64);
        weights[0] = eights(low_nibbles(both), high_nibbles(both));
    }
};

#else

struct Int8Format : OneLane<I> {
    static constexpr int kStep = 4, kStepBytes = 256, kVectors = kByteVectors, kLaneBytes = 4, kZero = 128;
    static constexpr bool kIsInteger = true;
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

#endif

struct FloatFormat : OneLane<F> {
    static constexpr int kStep = 1, kStepBytes = 256, kVectors = kFloatVectors, kLaneBytes = 4, kZero = 0;
    static constexpr bool kIsInteger = false;
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

struct Bf16Format : OneLane<F> {
    using Element = std::conditional_t<kHasBf16Products, Bf16, float>;
    static constexpr int kStep = 2, kStepBytes = 256, kVectors = kPairVectors, kLaneBytes = 2 * sizeof(Element);
    static constexpr int kZero = 0;
    static constexpr bool kIsInteger = false;
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

template <class Format, int kLanes>
constexpr int kNumSums = (kLanes + Format::kSumLanes - 1) / Format::kSumLanes;
template <class Format, int kLanes>
using Sums = typename Format::Sum[kNumSums<Format, kLanes>][Format::kVectors];

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
                      const typename Format::Tables& tables, Prefetch& prefetch, Sums<Format, kLanes>& sums) {
    constexpr int kVectors = Format::kVectors;
    int64_t step = 0;
    while (step < steps) {
        prefetch.burst();
        const int64_t end = step + kStepsAtOnce < steps ? step + kStepsAtOnce : steps;
        for (; step < end; ++step) {
            typename Format::Weight weights[kVectors];
            Format::load_step(values, vector, tables, weights);
#pragma GCC unroll 6
            for (int i = 0; i < kNumSums<Format, kLanes>; ++i) {
                const auto input = Format::load_input(inputs + i * Format::kSumLanes * Format::kLaneBytes);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sums[i][v] = Format::multiply(sums[i][v], weights[v], input);
            }
            values += Format::kStepBytes;
            inputs += kLanes * Format::kLaneBytes;
        }
    }
}

template <class Format, int kLanes>
inline void clear_sums(Sums<Format, kLanes>& sums) {
#pragma GCC unroll 6
    for (int i = 0; i < kNumSums<Format, kLanes>; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < Format::kVectors; ++v) sums[i][v] = Format::zero_sum();
    }
}

template <class Format, int kLanes>
inline void copy_sums(const Sums<Format, kLanes>& from, Sums<Format, kLanes>& to) {
#pragma GCC unroll 6
    for (int i = 0; i < kNumSums<Format, kLanes>; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < Format::kVectors; ++v) to[i][v] = from[i][v];
    }
}

// The same, added to sums in memory, or put there. Not inline: among the rest of a tile GCC would keep some of the sums
// there.
template <class Format, int kLanes, bool kIsFirst>
__attribute__((noinline)) void add_steps(const uint8_t* values, const uint8_t* inputs, int64_t steps, int vector,
                                         Prefetch& prefetch, Sums<Format, kLanes>& carried) {
    Sums<Format, kLanes> sums;
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
    const typename Format::Tables tables = Format::tables();
    Prefetch prefetch = tile.prefetch;
    for (int vector = 0; vector < tile.vectors; vector += kVectors) {
        for (int64_t group = chunk.group; group < chunk.group_end; ++group) {
            Sums<Format, kLanes> sums;
            const int64_t first = group * tile.steps + chunk.step, steps = chunk.step_end - chunk.step;
            const uint8_t* const values = tile.values + first * Format::kStepBytes;
            const uint8_t* const inputs = tile.inputs + first * kLanes * Format::kLaneBytes;
            if constexpr (kHasGroups) {
                clear_sums<Format, kLanes>(sums);
                sum_steps<Format, kLanes>(values, inputs, steps, vector, tables, prefetch, sums);
            } else {
                auto& kept = reinterpret_cast<Sums<Format, kLanes>*>(carried)[vector / kVectors];
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
                    typename Format::Lane planes[kPlanes];
                    for (int plane = 0; plane < kPlanes; ++plane) {
                        const int lane = row * kPlanes + plane;
                        planes[plane] = Format::lane_of(sums[lane / Format::kSumLanes][v], lane % Format::kSumLanes);
                    }
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
