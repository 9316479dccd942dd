// Attention over the paged cache, all rows of a step in one job.
//
// A block is some tokens of a row times the query heads of a KV head: they share what is read of the cache. Its context
// is cut into spans of 512 positions, counted from position 0, and spans into tiles of 64. A span has a softmax of its
// own, and spans are merged in their order. An item of the job is a block with all its spans, or, where blocks are too
// few for the threads, with one span; the merge then follows as a second job. The arithmetic is the same: a token's
// result depends neither on the other tokens nor on the threads.
#pragma once

#include "attention_run.h"
#include "pool.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kItemsPerThread = 8;

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
    // Tokens lie in the cache with all their heads: where there are items enough, one reads them in a row.
    plan.has_all_heads = most_tokens == 1 && plan.spans >= wanted;
    plan.is_split = plan.blocks * (plan.has_all_heads ? 1 : task.kv_heads) < wanted && plan.spans > plan.blocks;
    sizes.block_rows = most_tokens * sizes.group;
    sizes.state_rows = plan.has_all_heads ? task.heads : sizes.block_rows;
    if (!plan.is_split) plan.states = 0;
    return plan;
}

inline Sizes make_sizes(const Attention& task) {
    Sizes sizes{};
    sizes.group = task.heads / task.kv_heads;
    sizes.padded = round_up(task.head_size, 64);
    sizes.state = sizes.padded + kStateHead;
    sizes.block_tokens = sizes.group < kBlockRows ? kBlockRows / sizes.group : 1;
    return sizes;
}

// A step's memory: what all threads share, then each thread's own.
struct Step {
    Block* blocks;
    Item* items;
    float* states;
    char* workspaces;
    int64_t num_items, workspace_bytes;

    Workspace workspace(int thread, const Sizes& sizes) const {
        Carver own{workspaces + thread * workspace_bytes, 0};
        return carve(own, sizes);
    }
};

// blocks is null where there is no memory.
inline Step make_step(Pool& threads, const Attention& task, const Sizes& sizes, const Plan& plan) {
    Step step{};
    step.num_items = (plan.is_split ? plan.spans : plan.blocks) * (plan.has_all_heads ? 1 : task.kv_heads);
    Carver of_thread{nullptr, 0};
    carve(of_thread, sizes);
    step.workspace_bytes = of_thread.used;
    const auto take = [&](Carver carver) {
        step.blocks = carver.take<Block>(plan.blocks);
        step.items = carver.take<Item>(step.num_items);
        step.states = carver.take<float>(plan.states * sizes.state);
        step.workspaces = carver.take<char>(step.workspace_bytes * threads.num_threads());
        return carver.used;
    };
    char* const memory = static_cast<char*>(threads.scratch(take({nullptr, 0})));
    if (memory != nullptr) take({memory, 0});
    return step;
}

inline void put_items(const Attention& task, const Sizes& sizes, const Plan& plan, Step& step) {
    const int64_t item_heads = plan.has_all_heads ? task.kv_heads : 1;
    int64_t num_blocks = 0, num_items = 0;
    for_blocks(task, sizes, [&](const Block& block) {
        const Block* const kept = &(step.blocks[num_blocks++] = block);
        const int64_t spans = plan.is_split ? 1 : block.span_end - block.span, rows = block.count * sizes.group;
        for (int64_t span = block.span; span < block.span_end; span += spans) {
            for (int64_t head = 0; head < task.kv_heads; head += item_heads) {
                const int64_t index = block.first_state + ((span - block.span) * task.kv_heads + head) * rows;
                float* const states = plan.is_split ? step.states + index * sizes.state : nullptr;
                step.items[num_items++] = {kept, head, head + item_heads, span, span + spans, states};
            }
        }
    });
}

template <class Format, class T, class Cache>
int32_t run_attention(Pool& threads, const Attention& task) {
    Sizes sizes = make_sizes(task);
    const Plan plan = make_plan(task, sizes, threads.num_threads());
    Step step = make_step(threads, task, sizes, plan);
    if (step.blocks == nullptr) return kNoMemory;
    put_items(task, sizes, plan, step);
    // The last ones first: a prompt's last tokens have the longest context.
    parallel_for(threads, step.num_items, [&](int64_t index, int thread) {
        Workspace workspace = step.workspace(thread, sizes);
        const Item& item = step.items[step.num_items - 1 - index];
        ItemRun<Format, T, Cache>{task, sizes, item, *item.block, workspace}.run();
    });
    if (!plan.is_split) return kOk;
    parallel_for(threads, plan.blocks * task.kv_heads, [&](int64_t index, int thread) {
        float* const total = step.workspace(thread, sizes).totals;
        merge_block<T>(task, sizes, step.blocks[index / task.kv_heads], index % task.kv_heads, step.states, total);
    });
    return kOk;
}

template <class T, class Cache>
struct AttentionFormatOf {
    using Type = FloatAttention<T, Cache>;
};
#if TORCHINFER_WITH_bf16
template <>
struct AttentionFormatOf<Bf16, Bf16> {
    using Type = Bf16Attention<Bf16>;
};
template <>
struct AttentionFormatOf<Bf16, Fp8> {
    using Type = Bf16Attention<Fp8>;
};
#endif
#if TORCHINFER_WITH_avx512 && TORCHINFER_WITH_vnni
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
        const int64_t padded = task.tokens * token_numbers - live;
        if (padded > 0) __builtin_memset(result + live, 0, static_cast<size_t>(padded) * sizeof(T));
        with_cache_dtype(task.cache_dtype, [&](auto* cache) {
            using Cache = std::remove_pointer_t<decltype(cache)>;
            status = run_attention<typename AttentionFormatOf<T, Cache>::Type, T, Cache>(threads, task);
        });
    });
    return status;
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
