// What attention's jobs work on: blocks, items and spans (see attention.h), a thread's memory, the state of a softmax.
#pragma once

#include "attention_formats.h"
#include "isa.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kSpan = 512;
constexpr int64_t kBlockRows = 64;
constexpr int64_t kStateHead = 32;   // numbers: 16 sums of probabilities, the largest score
constexpr float kNoScore = -3e38f;

struct Block {
    int64_t row, token, count, position;  // of its first token
    int64_t first_key, span, span_end, first_state;
};

struct Item {
    const Block* block;
    int64_t head, head_end, span, span_end;
    float* states;  // of its span, null: they are merged at once
};

struct Sizes {
    int64_t group, padded, state, block_tokens, block_rows, state_rows;
};

// One thread's memory.
struct Workspace {
    char *query, *keys, *values, *probabilities, *products;
    float *facts, *key_scale, *value_scale, *value_factor, *states, *totals;
    float *drop, *decay, *row_scale, *sums;  // of a block's rows in a tile
    int64_t* slots[2];
    Run* runs;
};

// Hands out parts of a piece of memory; with none, counts the bytes.
struct Carver {
    char* memory;
    int64_t used;

    template <class T>
    T* take(int64_t count) {
        T* const part = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return part;
    }
};

inline Workspace carve(Carver& carver, const Sizes& sizes) {
    Workspace w;
    w.query = carver.take<char>(sizes.state_rows * sizes.padded * 4);
    w.keys = carver.take<char>(kTile * sizes.padded * 4);
    w.values = carver.take<char>(kTile * sizes.padded * 4);
    w.probabilities = carver.take<char>(sizes.block_rows * kTile * 4);
    w.products = carver.take<char>(sizes.block_rows * 8 * (sizes.padded > kTile ? sizes.padded : kTile));
    w.facts = carver.take<float>(sizes.state_rows * 4);
    for (float** part : {&w.key_scale, &w.value_scale, &w.value_factor}) *part = carver.take<float>(kTile);
    for (float** part : {&w.drop, &w.decay, &w.row_scale}) *part = carver.take<float>(round_up(sizes.block_rows, 16));
    w.sums = carver.take<float>(sizes.block_rows * 16);
    w.states = carver.take<float>(sizes.state_rows * sizes.state);
    w.totals = carver.take<float>(sizes.state_rows * sizes.state);
    for (int64_t*& slots : w.slots) slots = carver.take<int64_t>(kTile);
    w.runs = carver.take<Run>(kTile * 4);
    return w;
}

inline void clear_state(float* state, const Sizes& sizes) {
    for (int64_t i = 0; i < sizes.state; i += 16) store(state + i, zero_float());
    state[16] = kNoScore;
}

inline float exp2_of(float x) {
    float lanes[16];
    store(lanes, exp2(set(x)));
    return lanes[0];
}

inline void merge_state(float* total, const float* state, const Sizes& sizes) {
    const float most = total[16] > state[16] ? total[16] : state[16];
    const F old_factor = set(exp2_of(total[16] - most)), factor = set(exp2_of(state[16] - most));
    for (int64_t i = 0; i < sizes.state; i += 16) {
        if (i == 16) continue;
        store(total + i, fma(load(state + i), factor, mul(load(total + i), old_factor)));
    }
    total[16] = most;
}

template <class T>
inline void put_result(T* result, const float* total, int64_t size) {
    const F factor = set(1.0f / sum(load(total)));
    for (int64_t d = 0; d < size; d += 16) store_some(result + d, mul(load(total + kStateHead + d), factor), size - d);
}

template <class T>
inline T* result_row(const Attention& task, const Sizes& sizes, const Block& block, int64_t head, int64_t row) {
    const int64_t token = block.token + row / sizes.group, query_head = head * sizes.group + row % sizes.group;
    return static_cast<T*>(task.result) + (token * task.heads + query_head) * task.head_size;
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
