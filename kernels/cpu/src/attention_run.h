// What one item of attention computes: see attention.h.
#pragma once

#include "attention_items.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

// Few rows: prefetches come after each few steps of products; many: after each block of rows.
constexpr int64_t kMostBlocksOfBursts = 8, kStepsOfBurst = 4;

// Keys of a tile.
struct Range {
    int64_t first, end;
};

// Format says in which numbers.
template <class Format, class T, class Cache>
struct ItemRun {
    using Word = typename Format::Word;
    using Number = typename Format::Number;
    static constexpr int64_t kProbabilityWords = kTile / Format::kNumbersOfWord;
    const Attention& task;
    const Sizes& sizes;
    const Item& item;
    const Block& block;
    Workspace& w;
    const int64_t rows = block.count * sizes.group, row_words = sizes.padded / Format::kNumbersOfWord;
    const int64_t heads = item.head_end - item.head;
    const int64_t row_bytes = task.head_size * static_cast<int64_t>(sizeof(Cache));
    const int64_t slot_bytes = task.kv_heads * row_bytes;
    const int64_t context_end = block.position + block.count;
    const int64_t end = item.span_end * kSpan < context_end ? item.span_end * kSpan : context_end;
    float* const states = item.states != nullptr ? item.states : w.states;

    void run() {
        int64_t base = block.first_key / kTile * kTile;
        base = item.span * kSpan > base ? item.span * kSpan : base;
        find_slots(base, w.slots[1]);
        RunPrefetch first_tile = prefetch(base);
        first_tile.at_once = INT64_MAX;
        first_tile.burst();
        put_queries();
        for (int64_t i = 0; i < sizes.block_rows; i += 16) store(w.drop + i, zero_float());
        if (item.states == nullptr) clear_states(w.totals);
        for (int64_t span = item.span; span < item.span_end; ++span) {
            clear_states(states);
            const int64_t span_end = (span + 1) * kSpan < end ? (span + 1) * kSpan : end;
            for (; base < span_end; base += kTile) run_tile(base);
            if (item.states != nullptr) return;
            for (int64_t i = 0; i < heads * rows; ++i) {
                merge_state(w.totals + i * sizes.state, states + i * sizes.state, sizes);
            }
        }
        for (int64_t i = 0; i < heads * rows; ++i) {
            T* const result = result_row<T>(task, sizes, block, item.head + i / rows, i % rows);
            put_result(result, w.totals + i * sizes.state, task.head_size);
        }
    }

    void clear_states(float* cleared) {
        for (int64_t i = 0; i < heads * rows; ++i) clear_state(cleared + i * sizes.state, sizes);
    }

    void put_queries() {
        for (int64_t head = 0; head < heads; ++head) {
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t token = block.token + row / sizes.group;
                const T* const query = static_cast<const T*>(task.query) + token * task.stride +
                                       ((item.head + head) * sizes.group + row % sizes.group) * task.head_size;
                Format::put_query(query, task.head_size, query_words(head) + row * Format::kPlanes * row_words,
                                  row_words, w.facts + (head * rows + row) * 4);
            }
        }
    }
    Word* query_words(int64_t head) const {
        return reinterpret_cast<Word*>(w.query) + head * rows * Format::kPlanes * row_words;
    }

    int64_t first_of(int64_t base) const { return block.first_key > base ? block.first_key - base : 0; }
    int64_t end_of(int64_t base) const { return context_end - base < kTile ? context_end - base : kTile; }

    void find_slots(int64_t base, int64_t* slots) const {
        const int32_t* const table = task.page_table + block.row * task.table_width;
        const int64_t first = first_of(base), last = end_of(base);
        int64_t page = (base + first) / task.page_size, offset = (base + first) % task.page_size;
        for (int64_t key = first; key < last; ++page, offset = 0) {
            for (const int64_t start = table[page] * task.page_size; offset < task.page_size && key < last; ++offset) {
                slots[key++] = start + offset;
            }
        }
    }

    const uint8_t* rows_of(int64_t head, int which) const {
        return static_cast<const uint8_t*>(task.cache) + (which * task.cache_rows() + item.head + head) * row_bytes;
    }

    // What the tile at `base` reads, its slots in w.slots[1]; nothing at the item's end.
    RunPrefetch prefetch(int64_t base) const {
        RunPrefetch ahead{w.runs, w.runs, 0, 0, row_words};
        if (base >= end) return ahead;
        const int64_t first = first_of(base), last = end_of(base), bytes = heads * row_bytes;
        Run* run = w.runs;
        int64_t num_lines = 0;
        for (int64_t key = first, key_end; key < last; key = key_end) {
            const int64_t slot = w.slots[1][key];
            for (key_end = key + 1; heads == task.kv_heads && key_end < last; ++key_end) {
                if (w.slots[1][key_end] != slot + key_end - key) break;
            }
            const int64_t count = key_end - key, row = slot * task.kv_heads + item.head;
            for (int which = 0; which < 2; ++which) {
                *run++ = {rows_of(0, which) + slot * slot_bytes, count * bytes};
                if (task.scale == nullptr) continue;
                const float* const scale = task.scale + which * task.cache_rows() + row;
                *run++ = {reinterpret_cast<const uint8_t*>(scale), count * heads * 4};
            }
            num_lines += 2 * (count * bytes + 63) / 64 + 2 * (count * heads + 15) / 16;
        }
        ahead.end = run;
        const int64_t blocks = (rows * Format::kPlanes + kProductRows - 1) / kProductRows;
        const int64_t row_vectors = (row_words + 15) / 16;
        ahead.steps = blocks < kMostBlocksOfBursts ? kStepsOfBurst : row_words;
        const int64_t of_products = blocks * (row_words + kProbabilityWords) / ahead.steps;
        const int64_t of_packing = kTile / 16 * row_vectors + kProbabilityWords;
        ahead.at_once = num_lines / (heads * (of_products + of_packing + rows)) + 1;
        return ahead;
    }

    // Of all heads. The slots of the tile are in w.slots[1].
    void run_tile(int64_t base) {
        int64_t* const slots = w.slots[1];
        w.slots[1] = w.slots[0], w.slots[0] = slots;
        if (base + kTile < end) find_slots(base + kTile, w.slots[1]);
        RunPrefetch ahead = prefetch(base + kTile);
        for (int64_t head = 0; head < heads; ++head) run_head(base, head, states + head * rows * sizes.state, ahead);
    }

    void run_head(int64_t base, int64_t head, float* head_states, RunPrefetch& ahead) {
        const int64_t first = first_of(base), last = end_of(base), vectors = (last + 15) / 16;
        const TileRows keys{rows_of(head, 0), w.slots[0], slot_bytes, first, last, task.head_size};
        const TileRows values{rows_of(head, 1), w.slots[0], slot_bytes, first, last, task.head_size};
        Word* const key_words = reinterpret_cast<Word*>(w.keys);
        Word* const value_words = reinterpret_cast<Word*>(w.values);
        Number* const products = reinterpret_cast<Number*>(w.products);
        const Word* const probabilities = reinterpret_cast<const Word*>(w.probabilities);
        const int64_t planes = rows * Format::kPlanes;
        put_scales(item.head + head, first, last);
        Format::put_keys(keys, vectors, key_words, ahead);
        const int64_t words = (task.head_size + Format::kNumbersOfWord - 1) / Format::kNumbersOfWord;
        multiply_tile<typename Format::ScoreOp>(key_words, kTile, query_words(head), row_words, words, products, kTile,
                                                planes, vectors, ahead);
        softmax(base, vectors, head, head_states, ahead);
        Format::put_values(values, vectors, value_words, sizes.padded, ahead);
        multiply_tile<typename Format::ValueOp>(value_words, sizes.padded, probabilities, kProbabilityWords,
                                                vectors * 16 / Format::kNumbersOfWord, products, sizes.padded, planes,
                                                (task.head_size + 15) / 16, ahead);
        add_products(products, head_states);
    }

    // What scores and probabilities of the tile's keys are multiplied with.
    void put_scales(int64_t head, int64_t first, int64_t last) {
        const float factor = task.soft_cap != 0.0f ? task.score_scale / task.soft_cap : task.score_scale * kLog2OfE;
        for (int64_t key = 0; key < kTile; key += 16) {
            store(w.key_scale + key, set(factor));
            store(w.value_scale + key, zero_float());
        }
        if (task.scale == nullptr) return;
        const float* const key_scale = task.scale + head;
        const float* const value_scale = key_scale + task.cache_rows();
        for (int64_t key = first; key < last; ++key) {
            const int64_t index = w.slots[0][key] * task.kv_heads;
            w.key_scale[key] = factor * key_scale[index];
            w.value_scale[key] = value_scale[index];
        }
    }

    void softmax(int64_t base, int64_t vectors, int64_t head, float* head_states, RunPrefetch& ahead) {
        const float row_scale =
            task.scale != nullptr ? Format::put_factors(w.value_scale, vectors, 0, kTile, w.value_factor) : 1.0f;
        for (int64_t row = 0; row < rows; ++row) {
            ahead.burst();
            const int64_t position = block.position + row / sizes.group;
            const Range seen = {task.window > 0 ? position - task.window + 1 - base : 0, position + 1 - base};
            const bool is_whole = seen.first <= 0 && seen.end >= kTile && task.soft_cap == 0.0f;
            const float* const facts = w.facts + (head * rows + row) * 4;
            float& most = head_states[row * sizes.state + 16];
            w.row_scale[row] = row_scale;
            if (is_whole) {
                softmax_row<true>(row, kTile / 16, seen, facts, most);
            } else {
                softmax_row<false>(row, vectors, seen, facts, most);
            }
        }
        for (int64_t row = 0; row < rows; row += 16) store(w.decay + row, exp2(load(w.drop + row)));
    }

    // Probabilities of a row's keys in the tile, in relation to the largest score up to here. Whole: the row sees all
    // of them, and there is no cap.
    template <bool kIsWhole>
    void softmax_row(int64_t row, int64_t vectors, const Range& seen, const float* facts, float& state_most) {
        const Number* const products = reinterpret_cast<const Number*>(w.products) + row * Format::kPlanes * kTile;
        Word* const words = reinterpret_cast<Word*>(w.probabilities) + row * Format::kPlanes * kProbabilityWords;
        const bool is_scaled = task.scale != nullptr, is_masked = seen.first > 0 || seen.end < vectors * 16;
        if (kIsWhole) vectors = kTile / 16;
        F scores[kTile / 16], most = set(kNoScore);
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) {
            F score = mul(Format::score(products, facts, v), load(w.key_scale + v * 16));
            if (!kIsWhole && task.soft_cap != 0.0f) score = mul(tanh(score), set(task.soft_cap * kLog2OfE));
            if (!kIsWhole && is_masked) score = keep_range(score, seen.first - v * 16, seen.end - v * 16);
            scores[v] = score;
            most = max(score, most);
        }
        const float tile_most = largest(most), new_most = state_most > tile_most ? state_most : tile_most;
        w.drop[row] = state_most - new_most;
        state_most = new_most;
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) scores[v] = exp2(sub(scores[v], set(new_most)));
        const float* factor = is_scaled ? w.value_factor : nullptr;
        float own[kTile];
        if (!kIsWhole && is_scaled && is_masked && Format::kHasRowScale) {
            // They must not depend on keys that the row does not see.
            w.row_scale[row] = Format::put_factors(w.value_scale, vectors, seen.first, seen.end, own);
            factor = own;
        }
        store(w.sums + row * 16, Format::put_probabilities(scores, factor, vectors, words));
    }

    void add_products(const Number* products, float* head_states) const {
        for (int64_t row = 0; row < rows; ++row) {
            const F decay = set(w.decay[row]), row_scale = set(w.row_scale[row]);
            const Number* const product = products + row * Format::kPlanes * sizes.padded;
            float* const state = head_states + row * sizes.state;
            store(state, fma(load(state), decay, load(w.sums + row * 16)));
            for (int64_t d = 0; d < task.head_size; d += 16) {
                float* const output = state + kStateHead + d;
                store(output, fma(load(output), decay, Format::weighted(product, sizes.padded, d, row_scale)));
            }
        }
    }
};

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
