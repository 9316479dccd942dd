// Attention over the paged cache, all rows of a step in one job.
//
// A block is some tokens of a row times the query heads of a KV head: they share what is read of the cache. Its context
// is cut into spans of 512 positions, counted from position 0, and spans into tiles of 64. A span has a softmax of its
// own, and spans are merged in their order. An item of the job is a block with all its spans, or, where blocks are too
// few for the threads, with one span; the merge then follows as a second job. The arithmetic is the same: a token's
// result depends neither on the other tokens nor on the threads.
#pragma once

#include "attention_formats.h"
#include "isa.h"
#include "pool.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kSpan = 512;
constexpr int64_t kBlockRows = 64;
constexpr int64_t kItemsPerThread = 8;
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
    float *facts, *key_scale, *value_scale, *decay, *row_scale, *states, *totals;
    int64_t* slots[2];
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
    w.key_scale = carver.take<float>(kTile);
    w.value_scale = carver.take<float>(kTile);
    w.decay = carver.take<float>(sizes.block_rows);
    w.row_scale = carver.take<float>(sizes.block_rows);
    w.states = carver.take<float>(sizes.state_rows * sizes.state);
    w.totals = carver.take<float>(sizes.state_rows * sizes.state);
    for (int64_t*& slots : w.slots) slots = carver.take<int64_t>(kTile);
    return w;
}

// Brings the next tile's rows into the cache, a few lines between two pieces of work.
struct RowPrefetch {
    const uint8_t *keys, *values;  // of the head's row in slot 0
    const int64_t* slot;
    int64_t slot_bytes, row_bytes, key, end, at_once;

    void burst() {
        for (int64_t n = 0; n < at_once && key < end; ++n, ++key) {
            const int64_t offset = slot[key] * slot_bytes;
            for (int64_t byte = 0; byte < row_bytes; byte += 64) {
                __builtin_prefetch(keys + offset + byte, 0, 2);
                __builtin_prefetch(values + offset + byte, 0, 2);
            }
        }
    }
};

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

// What an item computes; Format says in which numbers.
template <class Format, class T, class Cache>
struct ItemRun {
    using Word = typename Format::Word;
    using Number = typename Format::Number;
    const Attention& task;
    const Sizes& sizes;
    const Item& item;
    const Block& block;
    Workspace& w;
    const int64_t rows = block.count * sizes.group, row_words = sizes.padded / Format::kNumbersOfWord;
    const int64_t row_bytes = task.head_size * static_cast<int64_t>(sizeof(Cache));
    const int64_t slot_bytes = task.kv_heads * row_bytes;
    const int64_t context_end = block.position + block.count;

    void run() {
        put_queries();
        const int64_t num_states = (item.head_end - item.head) * rows;
        float* const states = item.states != nullptr ? item.states : w.states;
        if (item.states == nullptr) clear_states(w.totals, num_states);
        const int64_t item_end = item.span_end * kSpan < context_end ? item.span_end * kSpan : context_end;
        int64_t base = block.first_key / kTile * kTile;
        base = item.span * kSpan > base ? item.span * kSpan : base;
        find_slots(base, w.slots[0]);
        for (int64_t span = item.span; span < item.span_end; ++span) {
            clear_states(states, num_states);
            const int64_t end = (span + 1) * kSpan < item_end ? (span + 1) * kSpan : item_end;
            for (; base < end; base += kTile) {
                if (base + kTile < item_end) find_slots(base + kTile, w.slots[1]);
                for (int64_t head = item.head; head < item.head_end; ++head) {
                    RowPrefetch ahead = prefetch(base + kTile, item_end, head);
                    run_tile(base, head, states + (head - item.head) * rows * sizes.state, ahead);
                }
                int64_t* const next = w.slots[1];
                w.slots[1] = w.slots[0], w.slots[0] = next;
            }
            if (item.states != nullptr) return;
            for (int64_t i = 0; i < num_states; ++i) merge_state(w.totals + i * sizes.state, states + i * sizes.state, sizes);
        }
        for (int64_t head = item.head; head < item.head_end; ++head) {
            for (int64_t row = 0; row < rows; ++row) {
                put_result(result_row<T>(task, sizes, block, head, row),
                           w.totals + ((head - item.head) * rows + row) * sizes.state, task.head_size);
            }
        }
    }

    void clear_states(float* states, int64_t count) {
        for (int64_t i = 0; i < count; ++i) clear_state(states + i * sizes.state, sizes);
    }

    void put_queries() {
        for (int64_t head = item.head; head < item.head_end; ++head) {
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t token = block.token + row / sizes.group, index = (head - item.head) * rows + row;
                const T* const query = static_cast<const T*>(task.query) + token * task.stride +
                                       (head * sizes.group + row % sizes.group) * task.head_size;
                Format::put_query(query, task.head_size, query_words(head) + row * Format::kPlanes * row_words, row_words,
                                  w.facts + index * 4);
            }
        }
    }
    Word* query_words(int64_t head) {
        return reinterpret_cast<Word*>(w.query) + (head - item.head) * rows * Format::kPlanes * row_words;
    }

    int64_t first_of(int64_t base) const { return block.first_key > base ? block.first_key - base : 0; }
    int64_t end_of(int64_t base) const { return context_end - base < kTile ? context_end - base : kTile; }

    void find_slots(int64_t base, int64_t* slots) {
        const int32_t* const table = task.page_table + block.row * task.table_width;
        const int64_t first = first_of(base), end = end_of(base);
        int64_t page = (base + first) / task.page_size, offset = (base + first) % task.page_size;
        for (int64_t key = first; key < end; ++page, offset = 0) {
            for (const int64_t start = table[page] * task.page_size; offset < task.page_size && key < end; ++offset) {
                slots[key++] = start + offset;
            }
        }
    }

    const uint8_t* rows_of(int64_t head, int which) const {
        return static_cast<const uint8_t*>(task.cache) + (which * task.cache_rows() + head) * row_bytes;
    }

    RowPrefetch prefetch(int64_t base, int64_t item_end, int64_t head) const {
        const bool is_there = base < item_end;
        const int64_t bursts = 2 * (rows * Format::kPlanes / kProductRows) + rows + 1;
        return {rows_of(head, 0), rows_of(head, 1),  w.slots[1], slot_bytes, row_bytes, is_there ? first_of(base) : 0,
                is_there ? end_of(base) : 0, (kTile + bursts - 1) / bursts};
    }

    void run_tile(int64_t base, int64_t head, float* states, RowPrefetch& ahead) {
        const int64_t first = first_of(base), end = end_of(base), vectors = (end + 15) / 16;
        const TileRows keys{rows_of(head, 0), w.slots[0], slot_bytes, first, end, task.head_size};
        const TileRows values{rows_of(head, 1), w.slots[0], slot_bytes, first, end, task.head_size};
        Word* const key_words = reinterpret_cast<Word*>(w.keys);
        Word* const value_words = reinterpret_cast<Word*>(w.values);
        Number* const products = reinterpret_cast<Number*>(w.products);
        Word* const probabilities = reinterpret_cast<Word*>(w.probabilities);
        constexpr int64_t kProbabilityWords = kTile / Format::kNumbersOfWord;
        put_scales(head, first, end);
        Format::put_keys(keys, vectors, key_words);
        const int64_t words = (task.head_size + Format::kNumbersOfWord - 1) / Format::kNumbersOfWord;
        multiply_tile<typename Format::ScoreOp>(key_words, kTile, query_words(head), row_words, words, products, kTile,
                                                rows * Format::kPlanes, vectors, ahead);
        const float* const facts = w.facts + (head - item.head) * rows * 4;
        for (int64_t row = 0; row < rows; ++row) {
            ahead.burst();
            softmax(base, vectors, block.position + row / sizes.group, products + row * Format::kPlanes * kTile,
                    facts + row * 4, states + row * sizes.state, probabilities + row * Format::kPlanes * kProbabilityWords,
                    row);
        }
        Format::put_values(values, vectors, value_words, sizes.padded);
        multiply_tile<typename Format::ValueOp>(value_words, sizes.padded, probabilities, kProbabilityWords,
                                                vectors * 16 / Format::kNumbersOfWord, products, sizes.padded,
                                                rows * Format::kPlanes, (task.head_size + 15) / 16, ahead);
        for (int64_t row = 0; row < rows; ++row) {
            const F decay = set(w.decay[row]), row_scale = set(w.row_scale[row]);
            const Number* const product = products + row * Format::kPlanes * sizes.padded;
            float* const output = states + row * sizes.state + kStateHead;
            for (int64_t d = 0; d < task.head_size; d += 16) {
                store(output + d, fma(load(output + d), decay, Format::weighted(product, sizes.padded, d, row_scale)));
            }
        }
    }

    // What scores and probabilities of the tile's keys are multiplied with.
    void put_scales(int64_t head, int64_t first, int64_t end) {
        const float factor = task.soft_cap != 0.0f ? task.score_scale / task.soft_cap : task.score_scale * kLog2OfE;
        for (int64_t key = 0; key < kTile; key += 16) {
            store(w.key_scale + key, set(factor));
            store(w.value_scale + key, zero_float());
        }
        if (task.scale == nullptr) return;
        for (int64_t key = first; key < end; ++key) {
            const int64_t index = w.slots[0][key] * task.kv_heads + head;
            w.key_scale[key] = factor * task.scale[index];
            w.value_scale[key] = task.scale[task.cache_rows() + index];
        }
    }

    void softmax(int64_t base, int64_t vectors, int64_t position, const Number* products, const float* facts,
                 float* state, Word* probabilities, int64_t row) {
        const int64_t first = task.window > 0 ? position - task.window + 1 - base : 0, end = position + 1 - base;
        const bool is_masked = first > 0 || end < vectors * 16;
        F scores[kTile / 16], most = set(kNoScore);
        for (int64_t v = 0; v < vectors; ++v) {
            F score = mul(Format::score(products, facts, v), load(w.key_scale + v * 16));
            if (task.soft_cap != 0.0f) score = mul(tanh(score), set(task.soft_cap * kLog2OfE));
            if (is_masked) score = keep_range(score, first - v * 16, end - v * 16);
            scores[v] = score;
            most = max(score, most);
        }
        const float tile_most = largest(most), new_most = state[16] > tile_most ? state[16] : tile_most;
        for (int64_t v = 0; v < vectors; ++v) scores[v] = exp2(sub(scores[v], set(new_most)));
        const float* const scale = task.scale == nullptr ? nullptr : w.value_scale;
        const F total = Format::put_probabilities(scores, scale, vectors, probabilities, w.row_scale + row);
        w.decay[row] = exp2_of(state[16] - new_most);
        store(state, fma(load(state), set(w.decay[row]), total));
        state[16] = new_most;
    }
};

template <class Format, class T, class Cache>
void run_item(const Attention& task, const Sizes& sizes, const Item& item, Workspace& w) {
    ItemRun<Format, T, Cache>{task, sizes, item, *item.block, w}.run();
}

template <class T>
void merge_block(const Attention& task, const Sizes& sizes, const Block& block, int64_t head, const float* states,
                 float* total) {
    const int64_t rows = block.count * sizes.group;
    for (int64_t row = 0; row < rows; ++row) {
        clear_state(total, sizes);
        for (int64_t span = block.span; span < block.span_end; ++span) {
            const int64_t index = block.first_state + ((span - block.span) * task.kv_heads + head) * rows + row;
            merge_state(total, states + index * sizes.state, sizes);
        }
        put_result(result_row<T>(task, sizes, block, head, row), total, task.head_size);
    }
}

// Calls body with each block, in order.
template <class Body>
inline void for_blocks(const Attention& task, const Sizes& sizes, const Body& body) {
    int64_t first_state = 0;
    for (int64_t row = 0; row < task.rows; ++row) {
        const int64_t start = task.query_start[row], end = task.query_start[row + 1];
        for (int64_t token = start; token < end; token += sizes.block_tokens) {
            const int64_t count = end - token < sizes.block_tokens ? end - token : sizes.block_tokens;
            const int64_t position = task.kv_length[row] - (end - token);
            const int64_t window_start = task.window > 0 ? position - task.window + 1 : 0;
            const int64_t first_key = window_start > 0 ? window_start : 0;
            const Block block{row, token, count, position, first_key, first_key / kSpan,
                              (position + count - 1) / kSpan + 1, first_state};
            first_state += (block.span_end - block.span) * task.kv_heads * count * sizes.group;
            body(block);
        }
    }
}

// How a step is cut into items.
struct Plan {
    int64_t blocks = 0, spans = 0, states = 0;
    bool is_split = false, has_all_heads = false;
};

inline Plan make_plan(const Attention& task, Sizes& sizes, int64_t threads) {
    Plan plan;
    int64_t most_tokens = 1;
    for_blocks(task, sizes, [&](const Block& block) {
        ++plan.blocks;
        plan.spans += block.span_end - block.span;
        plan.states = block.first_state + (block.span_end - block.span) * task.kv_heads * block.count * sizes.group;
        most_tokens = block.count > most_tokens ? block.count : most_tokens;
    });
    const int64_t wanted = kItemsPerThread * threads;
    plan.is_split = plan.blocks * task.kv_heads < wanted && plan.spans > plan.blocks;
    // Tokens lie in the cache with all their heads: where there are items enough, one reads them in a row.
    plan.has_all_heads = most_tokens == 1 && (plan.is_split ? plan.spans : plan.blocks) >= wanted;
    sizes.block_rows = most_tokens * sizes.group;
    sizes.state_rows = plan.has_all_heads ? task.heads : sizes.block_rows;
    if (!plan.is_split) plan.states = 0;
    return plan;
}

template <class Format, class T, class Cache>
int32_t run_attention(Pool& threads, const Attention& task) {
    Sizes sizes{};
    sizes.group = task.heads / task.kv_heads;
    sizes.padded = round_up(task.head_size, 64);
    sizes.state = sizes.padded + kStateHead;
    sizes.block_tokens = sizes.group < kBlockRows ? kBlockRows / sizes.group : 1;
    const int64_t num_threads = threads.num_threads();
    const Plan plan = make_plan(task, sizes, num_threads);
    const int64_t head_items = plan.has_all_heads ? 1 : task.kv_heads, item_heads = task.kv_heads / head_items;
    const int64_t num_items = (plan.is_split ? plan.spans : plan.blocks) * head_items;

    Carver count{nullptr, 0};
    carve(count, sizes);
    const int64_t workspace_bytes = count.used;
    const int64_t table_bytes = round_up(plan.blocks * static_cast<int64_t>(sizeof(Block)), 64) +
                                round_up(num_items * static_cast<int64_t>(sizeof(Item)), 64);
    const int64_t state_bytes = plan.states * sizes.state * 4;
    char* const memory = static_cast<char*>(threads.scratch(table_bytes + state_bytes + workspace_bytes * num_threads));
    if (memory == nullptr) return kNoMemory;
    Carver carver{memory, 0};
    Block* const blocks = carver.take<Block>(plan.blocks);
    Item* const items = carver.take<Item>(num_items);
    float* const states = carver.take<float>(plan.states * sizes.state);
    char* const workspaces = memory + carver.used;

    int64_t block_index = 0, item_index = 0;
    for_blocks(task, sizes, [&](const Block& block) {
        const Block* const kept = &(blocks[block_index++] = block);
        const int64_t step = plan.is_split ? 1 : block.span_end - block.span, rows = block.count * sizes.group;
        for (int64_t span = block.span; span < block.span_end; span += step) {
            for (int64_t head = 0; head < task.kv_heads; head += item_heads) {
                const int64_t index = block.first_state + ((span - block.span) * task.kv_heads + head) * rows;
                items[item_index++] = {kept, head, head + item_heads, span, span + step,
                                       plan.is_split ? states + index * sizes.state : nullptr};
            }
        }
    });
    // The last ones first: a prompt's last tokens have the longest context.
    parallel_for(threads, num_items, [&](int64_t index, int thread) {
        Carver own{workspaces + thread * workspace_bytes, 0};
        Workspace workspace = carve(own, sizes);
        run_item<Format, T, Cache>(task, sizes, items[num_items - 1 - index], workspace);
    });
    if (!plan.is_split) return kOk;
    parallel_for(threads, plan.blocks * task.kv_heads, [&](int64_t index, int thread) {
        Carver own{workspaces + thread * workspace_bytes, 0};
        merge_block<T>(task, sizes, blocks[index / task.kv_heads], index % task.kv_heads, states,
                       carve(own, sizes).totals);
    });
    return kOk;
}

template <class T, class Cache>
struct AttentionFormatOf {
    using Type = FloatAttention<T, Cache>;
};
#if TORCHINFER_IS_avx512_vnni_bf16
template <>
struct AttentionFormatOf<Bf16, Bf16> {
    using Type = Bf16Attention<Bf16>;
};
template <>
struct AttentionFormatOf<Bf16, Fp8> {
    using Type = Bf16Attention<Fp8>;
};
template <>
struct AttentionFormatOf<Bf16, Int8> {
    using Type = Int8Attention<Bf16>;
};
template <>
struct AttentionFormatOf<Half, Int8> {
    using Type = Int8Attention<Half>;
};
#endif

int32_t attention(Pool& threads, const Attention& task) {
    int32_t status = kOk;
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* const result = static_cast<T*>(task.result);
        const int64_t token_numbers = task.heads * task.head_size, live = task.query_start[task.rows] * token_numbers;
        __builtin_memset(result + live, 0, static_cast<size_t>(task.tokens * token_numbers - live) * sizeof(T));
        with_cache_dtype(task.cache_dtype, [&](auto* cache) {
            using Cache = std::remove_pointer_t<decltype(cache)>;
            status = run_attention<typename AttentionFormatOf<T, Cache>::Type, T, Cache>(threads, task);
        });
    });
    return status;
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
