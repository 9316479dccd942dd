// Token ids from logits: temperature, top_k, top_p, min_p, and inversion of the cumulative distribution. No sort: the
// smallest logit that top_k and top_p keep is found by halving the range of floats, among the few near the largest where
// these suffice. A row is one item, so its id does not depend on the others.
#pragma once

#include "isa.h"
#include "pool.h"
#include "vector_math.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kSampleBlock = 256;
constexpr float kNear = 10.0f;  // logits below the largest that are looked at first: they are improbable, e^-10

// The order of floats as that of integers, with room on both sides; the zeros are apart.
inline int64_t key_of(float value) {
    const int32_t bits = static_cast<int32_t>(as_bits(value));
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
inline float value_of(int64_t key) {
    const int32_t bits = static_cast<int32_t>(key);
    return as_float(static_cast<uint32_t>(bits >= 0 ? bits : bits ^ 0x7fffffff));
}

// The first `count` of 16 logits; the others are minus infinity.
inline F load_logits(const float* value, int64_t count) {
    return count >= 16 ? load(value) : keep_range(load_part(value, count), 0, count);
}

// Logits with what each counts: its probability, or 1 where `mass` is null.
struct Weighted {
    const float* value;
    const float* mass;
    int64_t count;

    // Of those above `limit`. A sum of less is never more: rounding keeps the order.
    float above(float limit) const {
        F total = zero_float();
        for (int64_t i = 0; i < count; i += 16) {
            const F weight = mass == nullptr ? set(1.0f) : load_some(mass + i, count - i);
            const F values = load_logits(value + i, count - i);
            total = add(total, where_above(values, set(limit), weight));
        }
        return sum(total);
    }
    // The smallest value that has less than `target` above it, of those that are at least `least`.
    float smallest(float target, float least, float largest) const {
        int64_t low = key_of(least) - 1, high = key_of(largest);
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            (above(value_of(middle)) < target ? high : low) = middle;
        }
        return value_of(high);
    }
};

// The index of the first of the largest; NaN is never it.
inline int64_t first_largest(const float* value, int64_t count) {
    float most = -__builtin_inff();
    int64_t found = 0;
    for (int64_t block = 0; block < count; block += kSampleBlock) {
        const int64_t end = block + kSampleBlock < count ? block + kSampleBlock : count;
        F here = set(-__builtin_inff());
        for (int64_t i = block; i < end; i += 16) {
            const F values = load_logits(value + i, end - i);
            here = max(values, here);  // where a value is NaN, what was there before
        }
        if (!(largest(here) > most)) continue;
        for (int64_t i = block; i < end; ++i) {
            if (value[i] > most) most = value[i], found = i;
        }
    }
    return found;
}

struct SampleRow {
    const float* logits;
    int64_t size;
    float temperature, top_p, min_p, uniform;
    int64_t top_k;  // 1 to `size`; `size` keeps all
    float *value, *near_value, *near_mass, *block_mass;  // memory: 3 times size, and a number for each block
    float most = 0;

    int64_t run() {
        const int64_t greedy = first_largest(logits, size);
        if (temperature == 0.0f) return greedy;
        for (int64_t i = 0; i < size; i += 16) {
            store_some(value + i, div(load_some(logits + i, size - i), set(temperature)), size - i);
        }
        most = value[greedy];
        const int64_t found = invert(threshold());
        return found < 0 ? greedy : found;
    }

  private:
    F mass_of(int64_t i, int64_t end) const {
        return exp(sub(load_logits(value + i, end - i), set(most)));
    }
    // The smallest logit that is kept, or minus infinity.
    float threshold() const {
        float least = -__builtin_inff();
        if (top_k < size || top_p < 1.0f) {
            if (!find(most - kNear, &least)) find(-__builtin_inff(), &least);
        }
        const float by_min_p = min_p > 0.0f ? most + __builtin_logf(min_p) : -__builtin_inff();
        return by_min_p > least ? by_min_p : least;
    }
    // Looks among the logits from `cut` up; false if what is looked for is below.
    bool find(float cut, float* least) const {
        const bool is_all = cut == -__builtin_inff();
        int64_t count = 0;
        for (int64_t block = 0; block < size; block += 16) {
            const int64_t end = block + 16 < size ? block + 16 : size;
            if (!is_all && end - block == 16 && largest(load(value + block)) < cut) continue;
            for (int64_t i = block; i < end; ++i) {
                near_value[count] = value[i];
                count += value[i] >= cut;
            }
        }
        if (!is_all && top_k < size && count < top_k) return false;
        const Weighted ones = {near_value, nullptr, count};
        *least = top_k < size ? ones.smallest(static_cast<float>(top_k), cut, most) : -__builtin_inff();
        if (top_p >= 1.0f) return true;
        for (int64_t i = 0; i < count; i += 16) {
            const F values = load_some(near_value + i, count - i);
            store_some(near_mass + i, exp(sub(values, set(most))), count - i);
        }
        const Weighted masses = {near_value, near_mass, count};
        const float target = top_p * total(masses, *least);
        if (!is_all && top_k == size && masses.above(-__builtin_inff()) < target) return false;
        *least = masses.smallest(target, top_k < size ? *least : cut, most);
        return true;
    }
    // Of what top_k leaves: of several that are equal to the last, no more than fit.
    float total(const Weighted& masses, float last) const {
        if (top_k == size) {
            F all = zero_float();
            for (int64_t i = 0; i < size; i += 16) all = add(all, mass_of(i, size));
            return sum(all);
        }
        const Weighted ones = {masses.value, nullptr, masses.count};
        const float equal = static_cast<float>(top_k) - ones.above(last);
        return masses.above(last) + equal * __builtin_expf(last - most);
    }
    // The first token at which the sum over those kept exceeds its share; -1 if there is no distribution.
    int64_t invert(float least) {
        double all = 0;
        for (int64_t block = 0; block < size; block += kSampleBlock) {
            const int64_t end = block + kSampleBlock < size ? block + kSampleBlock : size;
            F part = zero_float();
            for (int64_t i = block; i < end; i += 16) part = add(part, kept(i, end, least));
            all += block_mass[block / kSampleBlock] = sum(part);
        }
        if (!(all > 0)) return -1;
        const double target = all * static_cast<double>(uniform);
        double before = 0;
        for (int64_t block = 0; block < size; block += kSampleBlock) {
            const double mass = static_cast<double>(block_mass[block / kSampleBlock]);
            if (before + mass > target) return invert_block(block, least, before, target);
            before += mass;
        }
        return -1;
    }
    int64_t invert_block(int64_t block, float least, double before, double target) const {
        const int64_t end = block + kSampleBlock < size ? block + kSampleBlock : size;
        float masses[kSampleBlock];
        for (int64_t i = block; i < end; i += 16) store(masses + (i - block), kept(i, end, least));
        int64_t last = -1;  // should these sums be rounded below the block's, its last token takes the rest
        for (int64_t i = block; i < end; ++i) {
            if (masses[i - block] == 0.0f) continue;
            last = i;
            before += static_cast<double>(masses[i - block]);
            if (before > target) break;
        }
        return last;
    }
    F kept(int64_t i, int64_t end, float least) const {
        const F mass = mass_of(i, end);
        const F values = load_some(value + i, end - i);
        return sub(mass, where_above(set(least), values, mass));
    }
};

int32_t sample(Pool& threads, const Sample& task) {
    const int64_t padded = round_up(task.columns, 16), blocks = round_up(task.columns / kSampleBlock + 1, 16);
    const int64_t numbers = 3 * padded + blocks;
    const int64_t bytes = task.temperature == nullptr ? 0 : threads.num_threads() * numbers * int64_t{sizeof(float)};
    float* const memory = static_cast<float*>(threads.scratch(bytes));
    if (memory == nullptr && bytes > 0) return kNoMemory;
    parallel_for(threads, task.rows, [&](int64_t row, int thread) {
        const float* const logits = task.logits + row * task.stride;
        if (task.temperature == nullptr) {
            task.ids[row] = static_cast<int32_t>(first_largest(logits, task.columns));
            return;
        }
        float* const own = memory + thread * numbers;
        const int64_t k = task.top_k[row], kept = k <= 0 || k > task.columns ? task.columns : k;
        SampleRow each = {logits, task.columns, task.temperature[row], task.top_p[row], task.min_p[row],
                          task.uniform[row], kept, own, own + padded, own + 2 * padded, own + 3 * padded};
        task.ids[row] = static_cast<int32_t>(each.run());
    });
    return kOk;
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
