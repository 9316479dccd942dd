// The library's C interface, all that is visible of it. Returns a Status; kernels/cpu/library.py has the prototypes.
#include <mutex>

#include "isa.h"
#include "pool.h"
#include "types.h"

#define API extern "C" __attribute__((visibility("default")))

using namespace torchinfer;

namespace {

int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

bool is_aligned(const void* pointer, int64_t alignment) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0;
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
