#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace torchinfer {

#define DECLARE_LEVEL(level)   \
    namespace level {          \
    extern const Kernels table; \
    }
#if TORCHINFER_HAS_avx512_vnni_bf16
DECLARE_LEVEL(avx512_vnni_bf16)
#endif
#if TORCHINFER_HAS_avx512
DECLARE_LEVEL(avx512)
#endif
#if TORCHINFER_HAS_avx2
DECLARE_LEVEL(avx2)
#endif
#if TORCHINFER_HAS_neon
DECLARE_LEVEL(neon)
#endif
DECLARE_LEVEL(portable)

namespace {

struct Level {
    const char* name;
    const Kernels* table;
    bool (*is_supported)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the system saves the wide registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi");
}
#elif defined(__aarch64__)
bool has_neon() {
#if defined(__linux__)
    constexpr unsigned long kDotProduct = 1UL << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
    return true;
#endif
}
#endif

const Level kLevels[] = {
#if TORCHINFER_HAS_avx512_vnni_bf16
    {"avx512_vnni_bf16", &avx512_vnni_bf16::table, has_avx512_vnni_bf16},
#endif
#if TORCHINFER_HAS_avx512
    {"avx512", &avx512::table, has_avx512},
#endif
#if TORCHINFER_HAS_avx2
    {"avx2", &avx2::table, has_avx2},
#endif
#if TORCHINFER_HAS_neon
    {"neon", &neon::table, has_neon},
#endif
    {"portable", &portable::table, [] { return true; }},
};

std::atomic<const Level*> chosen{nullptr};

const Level& best() {
    for (const Level& level : kLevels) {
        if (level.is_supported()) return level;
    }
    __builtin_unreachable();
}

const Level& current() {
    const Level* level = chosen.load(std::memory_order_acquire);
    if (level == nullptr) chosen.store(level = &best(), std::memory_order_release);
    return *level;
}

}  // namespace

const Kernels& kernels() { return *current().table; }

const char* level_name() { return current().name; }

bool choose_level(const char* name) {
    if (name == nullptr || *name == '\0') {
        chosen.store(&best());
        return true;
    }
    for (const Level& level : kLevels) {
        if (std::strcmp(level.name, name) == 0 && level.is_supported()) {
            chosen.store(&level);
            return true;
        }
    }
    return false;
}

const char* level_names() {
    static const std::string names = [] {  // made once, whichever threads ask
        std::string all;
        for (const Level& level : kLevels) {
            if (level.is_supported()) all += (all.empty() ? "" : " ") + std::string(level.name);
        }
        return all;
    }();
    return names.c_str();
}

}  // namespace torchinfer
