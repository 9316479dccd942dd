// The library's C interface, all that is visible of it. Returns a Status; kernels/cpu/library.py has the prototypes.
#include <mutex>

#include "isa.h"
#include "packed.h"
#include "pool.h"
#include "types.h"

#define API extern "C" __attribute__((visibility("default")))

using namespace torchinfer;

namespace {

int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

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

}  // namespace

API const char* torchinfer_cpu_level() { return level_name(); }
API const char* torchinfer_cpu_levels() { return level_names(); }
API int32_t torchinfer_cpu_choose_level(const char* name) { return choose_level(name) ? kOk : kBadArgument; }
API int32_t torchinfer_cpu_num_threads() { return pool().num_threads(); }
API int32_t torchinfer_cpu_configure(int32_t num_threads, int32_t is_pinned) {
    if (num_threads < 0 || num_threads > 1024) return kBadArgument;
    configure_pool(num_threads, is_pinned != 0);
    return kOk;
}

API int32_t torchinfer_cpu_rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t columns,
                                    int64_t stride, float epsilon, float offset, int32_t dtype) {
    if (!is_dtype(dtype) || rows < 0 || columns < 1) return kBadArgument;
    const int64_t size = size_of(dtype);
    if (!is_aligned(x, size) || !is_aligned(weight, size) || !is_aligned(y, size)) return kMisaligned;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    kernels().rms_norm(threads, {x, weight, y, rows, columns, stride, epsilon, offset, dtype});
    return kOk;
}

// Bytes that the packed values of one expert take.
API int64_t torchinfer_cpu_packed_bytes(const PackedWeight* weight) {
    return is_valid(*weight) ? num_blocks(*weight) * block_bytes(*weight) : -1;
}

API int32_t torchinfer_cpu_pack(const PackedWeight* weight, const void* rows, void* values) {
    if (!is_valid(*weight)) return kBadArgument;
    if (!is_aligned(values, 64)) return kMisaligned;
    Pool& threads = pool();
    std::lock_guard<std::mutex> guard(threads.use);
    pack_values(threads, *weight, static_cast<const uint8_t*>(rows), static_cast<uint8_t*>(values));
    return kOk;
}

API int32_t torchinfer_cpu_linear(const PackedWeight* weight, const void* x, void* y, const void* bias,
                                  const int32_t* group_sizes, int64_t rows, int64_t stride, int32_t dtype) {
    if (!is_dtype(dtype) || rows < 0 || !is_valid(*weight)) return kBadArgument;
    if (group_sizes == nullptr && weight->num_experts != 1) return kBadArgument;
    const int64_t size = size_of(dtype);
    if (!is_aligned(x, size) || !is_aligned(y, size) || !is_aligned(bias, size)) return kMisaligned;
    if (!is_aligned(weight->values, 64) || !is_aligned(group_sizes, 4)) return kMisaligned;
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
