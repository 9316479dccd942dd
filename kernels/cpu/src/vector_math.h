// Powers, tanh and erf of sixteen lanes.
#pragma once

#include "vector.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr float kLog2OfE = 1.4426950408889634f;

// largest(): of the lanes, where none is NaN.
// keep_range(): the others become minus infinity.
#if TORCHINFER_WITH_avx512
inline float largest(F value) { return _mm512_reduce_max_ps(value.v); }
inline F keep_range(F value, int64_t first, int64_t end) {
    const uint32_t from = first <= 0 ? 0xffffu : first >= 16 ? 0u : 0xffffu << first & 0xffffu;
    const uint32_t to = end >= 16 ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1;
    return {_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), static_cast<__mmask16>(from & to), value.v)};
}
#else
inline float largest(F value) {
    float lanes[16];
    store(lanes, value);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
    }
    return lanes[0];
}
inline F keep_range(F value, int64_t first, int64_t end) {
    float lanes[16];
    store(lanes, value);
    for (int i = 0; i < 16; ++i) lanes[i] = i >= first && i < end ? lanes[i] : -__builtin_inff();
    return load(lanes);
}
#endif

// scaled(): y 2^n of an integer n from kLeastPower to 127; zero for y up to 1.5 and kLeastPower.
#if TORCHINFER_WITH_avx512
constexpr float kLeastPower = -160.0f;
inline F scaled(F y, F n) { return {_mm512_scalef_ps(y.v, n.v)}; }
inline F nearest(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
#else
constexpr float kLeastPower = -127.0f;
inline F power_of_two(F n);  // 2^-127 counts as zero
inline F scaled(F y, F n) { return mul(y, power_of_two(n)); }
inline F nearest(F a) { return to_float(round_to_int(a)); }
#endif

#if TORCHINFER_WITH_avx2
inline F power_of_two(F n) {
    F result;
    for (int i = 0; i < 2; ++i) {
        const __m256i shifted = _mm256_add_epi32(_mm256_cvtps_epi32(n.v[i]), _mm256_set1_epi32(127));
        result.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(shifted, 23));
    }
    return result;
}
#elif TORCHINFER_WITH_neon
inline F power_of_two(F n) {
    F result;
    for (int i = 0; i < 4; ++i) {
        const int32x4_t shifted = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
        result.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(shifted, 23));
    }
    return result;
}
#elif TORCHINFER_WITH_portable
inline F power_of_two(F n) {
    F result;
    for (int i = 0; i < 16; ++i) {
        result.v[i] = as_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23);
    }
    return result;
}
#endif

// 2^x: exactly 1 at 0, exactly 0 from -151 down (without AVX-512 from -127), relative error 2e-7 of normal numbers.
// x is at most 126; NaN stays.
inline F exp2(F x) {
    x = max(set(kLeastPower), x);  // of a number and NaN, x86 takes the second
    const F n = nearest(x), f = sub(x, n);
    F y = set(1.3264712e-3f);
    y = fma(y, f, set(9.6715123e-3f));
    y = fma(y, f, set(5.5507338e-2f));
    y = fma(y, f, set(2.4022242e-1f));
    y = fma(y, f, set(6.9314698e-1f));
    y = fma(y, f, set(1.0f));
    return scaled(y, n);
}

inline F exp(F x) { return exp2(min(set(126.0f), mul(x, set(kLog2OfE)))); }

// 1 - 2 / (e^2x + 1), absolute error 1e-7.
inline F tanh(F x) {
    const F power = exp2(min(set(126.0f), mul(x, set(2 * kLog2OfE))));
    return sub(set(1.0f), div(set(2.0f), add(power, set(1.0f))));
}

// Abramowitz and Stegun, 7.1.26: absolute error 2e-7. Of |x|: erf is odd.
inline F erf_of_magnitude(F x) {
    const F t = div(set(1.0f), fma(x, set(0.3275911f), set(1.0f)));
    F y = set(1.061405429f);
    y = fma(y, t, set(-1.453152027f));
    y = fma(y, t, set(1.421413741f));
    y = fma(y, t, set(-0.284496736f));
    y = fma(y, t, set(0.254829592f));
    return sub(set(1.0f), mul(mul(y, t), exp(sub(zero_float(), mul(x, x)))));
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
