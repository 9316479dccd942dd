// The library's C interface, all that is visible of it. Returns a Status; kernels/cpu/library.py has the prototypes.
#include <initializer_list>
#include <mutex>

#include "isa.h"
#include "packed.h"
#include "pool.h"
#include "types.h"

#define API extern "C" __attribute__((visibility("default")))

using namespace torchinfer;

namespace {

bool is_aligned(const void* pointer, int64_t alignment) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0;
}

bool is_valid(const PackedWeight& weight) {
    const bool has_sizes = weight.num_experts > 0 && weight.outputs > 0 && weight.inputs > 0;
    const bool has_groups = weight.group >= weight.inputs || weight.group % 16 == 0;
    return has_sizes && has_groups && weight.inputs <= kMostInputs && weight.group > 0 && weight.format >= 0 &&
           weight.format <= kFormatFp8 && weight.activations >= 0 && weight.activations <= kRoundedToFp8 &&
           (weight.format != kFormatInt4 || weight.inputs % 2 == 0);
}

bool is_dtype(int32_t dtype) { return dtype >= kFloat32 && dtype <= kFloat16; }
bool is_scaled(int32_t cache_dtype) { return cache_dtype == kInt8Cache || cache_dtype == kFp8Cache; }
bool is_cache(int32_t cache_dtype, const float* scale) {
    return is_scaled(cache_dtype) ? scale != nullptr : is_dtype(cache_dtype) && scale == nullptr;
}
int64_t cache_size_of(int32_t cache_dtype) { return is_scaled(cache_dtype) ? 1 : size_of(cache_dtype); }

// Each row's tokens follow those of the row before and end its context, whose pages are all in the table and the cache.
bool has_valid_rows(const Attention& task) {
    if (task.rows < 0 || task.query_start[0] != 0 || task.query_start[task.rows] > task.tokens) return false;
    for (int64_t row = 0; row < task.rows; ++row) {
        const int64_t count = int64_t{task.query_start[row + 1]} - task.query_start[row];
        if (count == 0) continue;
        const int64_t length = task.kv_length[row], used = (length + task.page_size - 1) / task.page_size;
        if (count < 0 || length < count || used > task.table_width) return false;
        const int32_t* const table = task.page_table + row * task.table_width;
        uint32_t last = 0;  // a negative page is a large number without its sign
        for (int64_t page = 0; page < used; ++page) {
            const uint32_t number = static_cast<uint32_t>(table[page]);
            last = number > last ? number : last;
        }
        if (last >= task.pages) return false;
    }
    return true;
}

bool is_valid(const Attention& task) {
    const bool has_sizes = task.tokens >= 0 && task.heads > 0 && task.kv_heads > 0 && task.head_size > 0 &&
                           task.pages > 0 && task.page_size > 0 && task.table_width >= 0 && task.window >= 0;
    const bool is_small = task.heads <= kMostHeads && task.head_size <= kMostHeadSize && task.pages <= INT32_MAX;
    return has_sizes && is_small && task.heads % task.kv_heads == 0 && is_dtype(task.dtype) &&
           is_cache(task.cache_dtype, task.scale) && has_valid_rows(task);
}

bool are_slots(const int32_t* slot, int64_t tokens, int64_t slots) {
    for (int64_t token = 0; token < tokens; ++token) {
        if (slot[token] < 0 || slot[token] >= slots) return false;
    }
    return true;
}

bool is_valid(const WriteKv& task) {
    const bool has_sizes = task.tokens >= 0 && task.kv_heads > 0 && task.head_size > 0;
    return has_sizes && is_dtype(task.dtype) && is_cache(task.cache_dtype, task.scale) &&
           are_slots(task.slot, task.tokens, task.slots);
}

bool is_valid(const Quantize& task) {
    const bool has_sizes = task.rows >= 0 && task.columns > 0 && task.stride >= task.columns && task.row_block > 0 &&
                           task.column_block > 0;
    if (task.format == kFormatInt4) {
        return has_sizes && is_dtype(task.dtype) && task.row_block == 1 && task.column_block % 2 == 0 &&
               task.columns % task.column_block == 0;
    }
    return has_sizes && is_dtype(task.dtype) && (task.format == kFormatInt8 || task.format == kFormatFp8);
}

bool is_matrix(const PackedWeight* weight, int64_t outputs, int64_t inputs) {
    return is_valid(*weight) && weight->num_experts == 1 && weight->outputs == outputs && weight->inputs == inputs;
}

bool is_valid(const AttentionLayer& task) {
    const int64_t hidden = task.qkv->inputs;
    return is_valid(task.attention(nullptr, nullptr)) && is_matrix(task.qkv, task.qkv_size(), hidden) &&
           is_matrix(task.output, hidden, task.query_size()) && task.frequencies >= 0 &&
           2 * task.frequencies <= task.head_size &&
           are_slots(task.step->slot, task.step->tokens, task.pages * task.step->page_size);
}

bool is_valid(const MlpLayer& task) {
    const int64_t hidden = task.gate_up->inputs, inner = task.down->inputs;
    return is_dtype(task.dtype) && task.tokens >= 0 && is_matrix(task.gate_up, 2 * inner, hidden) &&
           is_matrix(task.down, hidden, inner) && task.kind >= kSilu && task.kind <= kGeluTanh;
}

bool are_aligned(std::initializer_list<const void*> pointers, int64_t alignment) {
    for (const void* pointer : pointers) {
        if (!is_aligned(pointer, alignment)) return false;
    }
    return true;
}

}  // namespace

API const char* torchinfer_cpu_level() { return level_name(); }
API const char* torchinfer_cpu_levels() { return level_names(); }
API int32_t torchinfer_cpu_choose_level(const char* name) { return choose_level(name) ? kOk : kBadArgument; }
API int32_t torchinfer_cpu_num_threads() { return pool().num_threads(); }
// More than num_threads() where the system did not let all of them start.
API int32_t torchinfer_cpu_wanted_threads() { return pool().wanted_threads(); }
API int32_t torchinfer_cpu_configure(int32_t num_threads, int32_t is_pinned) {
    if (num_threads < 0 || num_threads > kMostThreads) return kBadArgument;
    configure_pool(num_threads, is_pinned != 0);
    return kOk;
}

API int32_t torchinfer_cpu_rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t columns,
                                    int64_t stride, float epsilon, float offset, int32_t dtype) {
    if (!is_dtype(dtype) || rows < 0 || columns < 1) return kBadArgument;
    if (!are_aligned({x, weight, y}, size_of(dtype))) return kMisaligned;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    kernels().rms_norm(threads, {x, weight, y, rows, columns, stride, epsilon, offset, dtype});
    return kOk;
}

API int32_t torchinfer_cpu_layer_norm(const void* x, const void* weight, const void* bias, void* y, int64_t rows,
                                      int64_t columns, int64_t stride, float epsilon, int32_t dtype) {
    if (!is_dtype(dtype) || rows < 0 || columns < 1) return kBadArgument;
    if (!are_aligned({x, weight, bias, y}, size_of(dtype))) return kMisaligned;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    kernels().layer_norm(threads, {x, weight, bias, y, rows, columns, stride, epsilon, dtype});
    return kOk;
}

// Bytes that the packed values of one expert take.
API int64_t torchinfer_cpu_packed_bytes(const PackedWeight* weight) {
    return is_valid(*weight) ? num_blocks(*weight) * block_bytes(*weight) : -1;
}

API int32_t torchinfer_cpu_pack(const PackedWeight* weight, const void* rows, void* values) {
    if (!is_valid(*weight) || (rows == values && !can_pack_in_place(*weight))) return kBadArgument;
    if (!is_aligned(values, 64)) return kMisaligned;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    return pack_values(threads, *weight, static_cast<const uint8_t*>(rows), static_cast<uint8_t*>(values));
}

API int32_t torchinfer_cpu_linear(const PackedWeight* weight, const void* x, void* y, const void* bias,
                                  const int32_t* group_sizes, int64_t rows, int64_t stride, int32_t dtype) {
    if (!is_dtype(dtype) || rows < 0 || !is_valid(*weight)) return kBadArgument;
    if (group_sizes == nullptr && weight->num_experts != 1) return kBadArgument;
    const int64_t size = size_of(dtype);
    if (!is_aligned(x, size) || !is_aligned(y, size) || !is_aligned(bias, size)) return kMisaligned;
    if (!is_aligned(weight->values, 64)) return kMisaligned;
    if (!are_aligned({group_sizes, weight->scale, weight->input_scale}, 4)) return kMisaligned;
    int64_t sum = 0;
    for (int64_t expert = 0; group_sizes != nullptr && expert < weight->num_experts; ++expert) {
        if (group_sizes[expert] < 0) return kBadArgument;
        sum += group_sizes[expert];
    }
    if (group_sizes != nullptr && sum != rows) return kBadArgument;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    return kernels().linear(threads, {weight, x, y, bias, group_sizes, rows, stride, dtype});
}

// For benchmarks/cpu_linear.py. `memory` has `ahead` bytes more than `bytes`.
API int32_t torchinfer_cpu_measure_read(const void* memory, int64_t bytes, int32_t streams, int64_t ahead) {
    if (!is_aligned(memory, 64) || bytes < 0 || ahead < 0) return kBadArgument;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    volatile float used = kernels().measure_read(threads, memory, bytes, streams, ahead);
    (void)used;
    return kOk;
}

// Returns the multiply-adds of each thread for each repeat.
API int64_t torchinfer_cpu_measure_products(int32_t format, int64_t repeats) {
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    return kernels().measure_products(threads, format, repeats);
}

API int32_t torchinfer_cpu_attention(const Attention* task) {
    if (!is_aligned(task->query_start, 4) || !is_aligned(task->kv_length, 4) || !is_aligned(task->page_table, 4)) {
        return kMisaligned;
    }
    if (!is_valid(*task)) return kBadArgument;
    const int64_t size = size_of(task->dtype);
    if (!is_aligned(task->query, size) || !is_aligned(task->result, size) || !is_aligned(task->scale, 4) ||
        !is_aligned(task->cache, cache_size_of(task->cache_dtype))) {
        return kMisaligned;
    }
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    return kernels().attention(threads, *task);
}

API int32_t torchinfer_cpu_write_kv(const WriteKv* task) {
    if (!is_aligned(task->slot, 4)) return kMisaligned;
    if (!is_valid(*task)) return kBadArgument;
    const int64_t size = size_of(task->dtype);
    if (!is_aligned(task->key, size) || !is_aligned(task->value, size) || !is_aligned(task->scale, 4) ||
        !is_aligned(task->cache, cache_size_of(task->cache_dtype))) {
        return kMisaligned;
    }
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    kernels().write_kv(threads, *task);
    return kOk;
}

API int32_t torchinfer_cpu_quantize(const Quantize* task) {
    if (!is_valid(*task)) return kBadArgument;
    if (!is_aligned(task->x, size_of(task->dtype)) || !is_aligned(task->scale, 4)) return kMisaligned;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    kernels().quantize(threads, *task);
    return kOk;
}

API int32_t torchinfer_cpu_rotary(const void* x, void* y, const float* cosine, const float* sine, int64_t tokens,
                                  int64_t heads, int64_t head_size, int64_t frequencies, int64_t stride,
                                  int32_t is_interleaved, int32_t dtype) {
    const bool has_sizes = tokens >= 0 && heads > 0 && frequencies >= 0 && 2 * frequencies <= head_size;
    if (!is_dtype(dtype) || !has_sizes || head_size < 1) return kBadArgument;
    const int64_t size = size_of(dtype);
    if (!is_aligned(x, size) || !is_aligned(y, size) || !is_aligned(cosine, 4) || !is_aligned(sine, 4)) {
        return kMisaligned;
    }
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    kernels().rotary(threads,
                     {x, y, cosine, sine, tokens, heads, head_size, frequencies, stride, is_interleaved, dtype});
    return kOk;
}

API int32_t torchinfer_cpu_gated_activation(const void* x, void* y, int64_t rows, int64_t columns, int64_t stride,
                                            int32_t kind, int32_t dtype) {
    if (!is_dtype(dtype) || rows < 0 || columns < 1 || kind < kSilu || kind > kGeluTanh) return kBadArgument;
    const int64_t size = size_of(dtype);
    if (!is_aligned(x, size) || !is_aligned(y, size)) return kMisaligned;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    kernels().gated_activation(threads, {x, y, rows, columns, stride, columns, kind, dtype});
    return kOk;
}

API int32_t torchinfer_cpu_attention_layer(const AttentionLayer* task) {
    const StepBatch& step = *task->step;
    if (!are_aligned({step.slot, step.query_start, step.kv_length, step.page_table}, 4)) return kMisaligned;
    if (!is_valid(*task)) return kBadArgument;
    if (!are_aligned({task->x, task->y, task->qkv_bias, task->output_bias, task->norm, task->query_norm, task->key_norm,
                      task->output_norm},
                     size_of(task->dtype)) ||
        !are_aligned({task->cosine, task->sine, task->scale}, 4) ||
        !are_aligned({task->qkv->values, task->output->values}, 64) ||
        !is_aligned(task->cache, cache_size_of(task->cache_dtype))) {
        return kMisaligned;
    }
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    return kernels().attention_layer(threads, *task);
}

API int32_t torchinfer_cpu_mlp_layer(const MlpLayer* task) {
    if (!is_valid(*task)) return kBadArgument;
    if (!are_aligned({task->x, task->y, task->gate_up_bias, task->down_bias, task->norm, task->output_norm},
                     size_of(task->dtype)) ||
        !are_aligned({task->gate_up->values, task->down->values}, 64)) {
        return kMisaligned;
    }
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    return kernels().mlp_layer(threads, *task);
}

API int32_t torchinfer_cpu_sample(const Sample* task) {
    if (task->rows < 0 || task->columns < 1 || task->columns > INT32_MAX) return kBadArgument;
    const bool is_greedy = task->temperature == nullptr;
    for (const void* each : {static_cast<const void*>(task->top_p), static_cast<const void*>(task->min_p),
                             static_cast<const void*>(task->uniform), static_cast<const void*>(task->top_k)}) {
        if ((each == nullptr) != is_greedy) return kBadArgument;
    }
    if (!are_aligned({task->logits, task->ids, task->temperature, task->top_p, task->min_p, task->uniform, task->top_k}, 4)) {
        return kMisaligned;
    }
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    return kernels().sample(threads, *task);
}
