#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace torchinfer {

// CMake's list of the levels that are compiled, the best first: LEVEL(avx2) LEVEL(portable) ...
#define LEVEL(name)             \
    namespace name {            \
    extern const Kernels table; \
    }
TORCHINFER_LEVELS
#undef LEVEL

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
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_vnni_bf16() {
    return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
// Not every compiler that has the flag knows the name. Leaf 7.1, EAX bit 4.
[[maybe_unused]] bool has_avx2_vnni() {
#if TORCHINFER_EVEX_VNNI
    return has_avx512_vnni();
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
#endif
}
#elif defined(__aarch64__)
#if defined(__linux__)
bool has_neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
bool has_neon_i8mm() { return has_neon() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#else
bool has_neon() { return true; }
bool has_neon_i8mm() { return false; }  // nobody to ask
#endif
#endif
bool has_portable() { return true; }

#define LEVEL(name) {#name, &name::table, has_##name},
const Level kLevels[] = {TORCHINFER_LEVELS};
#undef LEVEL

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
