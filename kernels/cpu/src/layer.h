// Half a layer in one call: x + attention(norm(x)), and x + mlp(norm(x)). The kernels and the rounding between them are
// those of the ops one by one, so the bits are too; a call saves what stands between them in Python, and passes over
// the rotated keys and the products that x is added to.
#pragma once

#include "activation.h"
#include "attention.h"
#include "linear.h"
#include "packed.h"
#include "rms_norm.h"
#include "rotary.h"
#include "write_kv.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

// Parts of the memory between kernels.
struct Parts {
    char* memory;
    int64_t number_bytes, used = 0;

    void* take(int64_t numbers) {
        void* const part = memory + used;
        used += bytes(numbers);
        return part;
    }
    int64_t bytes(int64_t numbers) const { return round_up(numbers * number_bytes, 64); }
};

// Tokens that pad a step all have slot 0, of page 0, which belongs to nobody: the last of them, -1 if there is none.
inline int64_t last_padded(const StepBatch& step) {
    int64_t token = step.tokens - 1;
    while (token >= 0 && step.slot[token] != 0) --token;
    return token;
}

// Each head of a token: norm, rotation, then to `query`, or into the cache. Threads have tokens of their own, and no two
// tokens have the same slot but those that pad: only the last of these is written, as if each were in its turn.
template <class T, class Cache>
struct HeadsRun {
    const AttentionLayer& task;
    const T* heads;  // [tokens, heads + 2 * kv_heads, head_size]
    T* query;        // [tokens, heads, head_size]
    int64_t padded;  // last_padded()

    void run(int64_t token) const {
        const int64_t size = task.head_size, cache_rows = task.pages * task.step->page_size * task.kv_heads;
        const Angles angles = {task.cosine + token * task.frequencies, task.sine + token * task.frequencies,
                               task.frequencies, task.is_interleaved != 0};
        const T* head = heads + token * task.qkv_size();
        for (int64_t h = 0; h < task.heads; ++h, head += size) {
            rotate(head, query + (token * task.heads + h) * size, task.query_norm, angles);
        }
        if (task.step->slot[token] == 0 && token != padded) return;
        const int64_t slot_row = task.step->slot[token] * task.kv_heads;
        T rotated[kMostHeadSize];
        for (int64_t k = 0; k < task.kv_heads; ++k, head += size) {
            rotate(head, rotated, task.key_norm, angles);
            put(rotated, slot_row + k);
        }
        for (int64_t k = 0; k < task.kv_heads; ++k, head += size) put(head, cache_rows + slot_row + k);
    }

  private:
    void rotate(const T* x, T* y, const void* norm, const Angles& angles) const {
        T normed[kMostHeadSize];
        if (norm != nullptr) {
            const RmsNorm facts = {nullptr, nullptr, nullptr, 1, task.head_size, 0, task.epsilon, task.offset, 0};
            rms_norm_row(x, static_cast<const T*>(norm), normed, facts);
            x = normed;
        }
        rotate_head(x, y, task.head_size, angles);
    }
    void put(const T* x, int64_t row) const {
        put_row(x, static_cast<Cache*>(task.cache) + row * task.head_size, task.head_size,
                task.scale == nullptr ? nullptr : task.scale + row);
    }
};

void rotate_and_write(Pool& threads, const AttentionLayer& task, const void* heads, void* query) {
    with_dtype(task.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_cache_dtype(task.cache_dtype, [&](auto* cache) {
            using Cache = std::remove_pointer_t<decltype(cache)>;
            const HeadsRun<T, Cache> heads_run = {task, static_cast<const T*>(heads), static_cast<T*>(query),
                                                  last_padded(*task.step)};
            parallel_rows(threads, task.step->tokens, task.qkv_size(),
                          [&](int64_t token) { heads_run.run(token); });
        });
    });
}

// y = a + b, all contiguous.
void add_values(Pool& threads, const void* a, const void* b, void* y, int64_t count, int32_t dtype) {
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel_ranges(threads, count, kItemValues, [&](int64_t i, int64_t end) {
            for (; i < end; i += 16) {
                const F first_value = load_some(static_cast<const T*>(a) + i, end - i);
                const F second_value = load_some(static_cast<const T*>(b) + i, end - i);
                store_some(static_cast<T*>(y) + i, add(first_value, second_value), end - i);
            }
        });
    });
}

// y = x + the matrix's product with `input`, through output_norm if there is one.
template <class Layer>
int32_t put_output(Pool& threads, const Layer& task, const PackedWeight& weight, const void* bias, const void* input,
                   int64_t tokens, Parts& parts) {
    const int64_t hidden = weight.outputs;
    if (task.output_norm == nullptr) {
        return linear(threads, {&weight, input, task.y, bias, nullptr, tokens, weight.inputs, task.dtype, task.x});
    }
    void* const product = parts.take(tokens * hidden);
    void* const normed = parts.take(tokens * hidden);
    const int32_t status =
        linear(threads, {&weight, input, product, bias, nullptr, tokens, weight.inputs, task.dtype});
    if (status != kOk) return status;
    const RmsNorm norm = {product, task.output_norm, normed,      tokens,    hidden,
                          hidden,  task.epsilon,     task.offset, task.dtype};
    rms_norm(threads, norm);
    add_values(threads, task.x, normed, task.y, tokens * hidden, task.dtype);
    return kOk;
}

int32_t attention_layer(Pool& threads, const AttentionLayer& task) {
    const StepBatch& step = *task.step;
    const int64_t tokens = step.tokens, hidden = task.qkv->inputs, query_size = task.query_size();
    if (tokens == 0) return kOk;
    Parts parts = {nullptr, size_of(task.dtype)};
    const int64_t bytes = 3 * parts.bytes(tokens * hidden) + parts.bytes(tokens * task.qkv_size()) +
                          2 * parts.bytes(tokens * query_size);
    parts.memory = static_cast<char*>(threads.activations(bytes));
    if (parts.memory == nullptr) return kNoMemory;
    void* const normed = parts.take(tokens * hidden);
    void* const heads = parts.take(tokens * task.qkv_size());
    void* const query = parts.take(tokens * query_size);
    void* const attended = parts.take(tokens * query_size);
    rms_norm(threads, {task.x, task.norm, normed, tokens, hidden, hidden, task.epsilon, task.offset, task.dtype});
    int32_t status =
        linear(threads, {task.qkv, normed, heads, task.qkv_bias, nullptr, tokens, hidden, task.dtype});
    if (status != kOk) return status;
    rotate_and_write(threads, task, heads, query);
    status = attention(threads, task.attention(query, attended));
    if (status != kOk) return status;
    return put_output(threads, task, *task.output, task.output_bias, attended, tokens, parts);
}

int32_t mlp_layer(Pool& threads, const MlpLayer& task) {
    const int64_t tokens = task.tokens, hidden = task.gate_up->inputs, inner = task.down->inputs;
    if (tokens == 0) return kOk;
    Parts parts = {nullptr, size_of(task.dtype)};
    const bool is_gated = inner % kBlock == 0;  // or a block would have gates and what they are multiplied with
    const int64_t bytes = 3 * parts.bytes(tokens * hidden) + parts.bytes(tokens * inner) +
                          (is_gated ? 0 : parts.bytes(tokens * 2 * inner));
    parts.memory = static_cast<char*>(threads.activations(bytes));
    if (parts.memory == nullptr) return kNoMemory;
    void* const normed = parts.take(tokens * hidden);
    void* const activated = parts.take(tokens * inner);
    rms_norm(threads, {task.x, task.norm, normed, tokens, hidden, hidden, task.epsilon, task.offset, task.dtype});
    Linear gate_up = {task.gate_up, normed, activated, task.gate_up_bias, nullptr, tokens, hidden, task.dtype};
    gate_up.kind = task.kind;
    gate_up.is_gated = is_gated;
    if (!is_gated) gate_up.y = parts.take(tokens * 2 * inner);
    const int32_t status = linear(threads, gate_up);
    if (status != kOk) return status;
    if (!is_gated) {
        gated_activation(threads, {gate_up.y, activated, tokens, inner, 2 * inner, inner, task.kind, task.dtype});
    }
    return put_output(threads, task, *task.down, task.down_bias, activated, tokens, parts);
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
