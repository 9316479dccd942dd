// Calls the library from several threads, on every level and with several sizes of the pool, and compares results with
// plain loops, and those of every function in every dtype with what the portable level gives. Run by scripts/sanitize
// under ThreadSanitizer and, for NEON, under qemu.
#include <algorithm>
#include <functional>
#include <string>
#include <thread>

#include "exercise.h"

using namespace torchinfer;
using namespace torchinfer::exercise;

namespace {

constexpr int64_t kRows = 9, kOutputs = 130;

void check_linear(const Matrix& matrix) {
    const int64_t inputs = matrix.weight.inputs;
    std::vector<float> x(static_cast<size_t>(kRows * inputs)), y(static_cast<size_t>(kRows * kOutputs));
    for (size_t i = 0; i < x.size(); ++i) x[i] = number(static_cast<uint32_t>(i + 77));
    const int32_t status =
        torchinfer_cpu_linear(&matrix.weight, x.data(), y.data(), nullptr, nullptr, kRows, inputs, kFloat32);
    require(status == kOk, "status of linear");
    for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t output = 0; output < kOutputs; ++output) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < inputs; ++k) {
                const double product = double{x[row * inputs + k]} * matrix.exact[output * inputs + k];
                sum += product, size += std::fabs(product);
            }
            const double factor = matrix.weight.scale != nullptr ? 0.5 : 1.0;
            const double error = std::fabs(y[row * kOutputs + output] - sum * factor);
            require(error <= 1e-5 * size * factor + 1e-6, "linear");
        }
    }
}

void check_rms_norm() {
    std::vector<float> x(kRows * 500), weight(500, 1.0f), y(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = number(static_cast<uint32_t>(i));
    torchinfer_cpu_rms_norm(x.data(), weight.data(), y.data(), kRows, 500, 500, 0.0f, 0.0f, kFloat32);
    double squares = 0;
    for (int i = 0; i < 500; ++i) squares += double{y[i]} * y[i];
    require(std::fabs(squares / 500 - 1) < 1e-4, "rms_norm");
}

void check_layer_norm() {
    std::vector<float> x(kRows * 500), weight(500, 1.0f), bias(500, 2.0f), y(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = number(static_cast<uint32_t>(i));
    torchinfer_cpu_layer_norm(x.data(), weight.data(), bias.data(), y.data(), kRows, 500, 500, 0.0f, kFloat32);
    double mean = 0, squares = 0;
    for (int i = 0; i < 500; ++i) mean += y[i] / 500.0, squares += (y[i] - 2.0) * (y[i] - 2.0) / 500;
    require(std::fabs(mean - 2) < 1e-4 && std::fabs(squares - 1) < 1e-4, "layer_norm");
}

// Rows that lie apart, into bytes by rows and into halves of bytes by groups: within half a step of what they were.
void check_quantize(int32_t format) {
    constexpr int64_t kColumns = 160, kStride = 176, kGroup = 32;
    const bool is_int4 = format == kFormatInt4;
    const int64_t group = is_int4 ? kGroup : kColumns, groups = kColumns / group;
    std::vector<float> x(kRows * kStride), scale(static_cast<size_t>(kRows * groups));
    std::vector<uint8_t> values(static_cast<size_t>(is_int4 ? kRows * kColumns / 2 : kRows * kColumns));
    for (size_t i = 0; i < x.size(); ++i) x[i] = number(static_cast<uint32_t>(i + 3));
    const Quantize task = {x.data(), values.data(), scale.data(), kRows, kColumns, kStride, 1, group, kFloat32, format};
    require(torchinfer_cpu_quantize(&task) == kOk, "status of quantize");
    for (int64_t i = 0; i < kRows * kColumns; ++i) {
        const size_t at = static_cast<size_t>(i);
        const int value = is_int4 ? (values[at / 2] >> (i % 2 * 4) & 15) - 8 : static_cast<int8_t>(values[at]);
        const float exact = x[static_cast<size_t>(i / kColumns * kStride + i % kColumns)];
        const float step = scale[static_cast<size_t>(i / group)];
        // With 4 bits the largest numbers may be cut off, by up to three tenths of 7.5 steps and half of one.
        require(std::fabs(exact - value * step) <= step * (is_int4 ? 3.75f : 0.501f), "quantize");
    }
}

// A step of two rows over a float32 or an int8 cache: one token of a long context, and the last three of a short one.
struct AttentionStep {
    static constexpr int64_t kHeads = 6, kKvHeads = 2, kSize = 40, kPageSize = 8, kPages = 100, kTokens = 4;
    static constexpr int64_t kSlots = kPages * kPageSize, kCacheRows = kSlots * kKvHeads;
    int32_t query_start[3] = {0, 1, 4}, kv_length[2] = {610, 37}, table[2 * 80] = {};
    std::vector<float> query, result, cache, scale;  // the cache as floats, before the scale
    std::vector<int8_t> bytes;

    explicit AttentionStep(bool is_int8)
        : query(kTokens * kHeads * kSize), result(query.size()), cache(2 * kCacheRows * kSize) {
        for (int i = 0; i < 160; ++i) table[i] = i < 80 ? 99 - i : i - 80;
        for (size_t i = 0; i < query.size(); ++i) query[i] = number(static_cast<uint32_t>(i + 5));
        for (size_t i = 0; i < cache.size(); ++i) cache[i] = number(static_cast<uint32_t>(i + 9));
        if (!is_int8) return;
        scale.assign(2 * kCacheRows, 1.0f / 127);
        for (float& value : cache) bytes.push_back(static_cast<int8_t>(value = std::round(value * 127)));
    }
    Attention task() {
        const void* const stored = bytes.empty() ? static_cast<const void*>(cache.data()) : bytes.data();
        const float* const scales = bytes.empty() ? nullptr : scale.data();
        return {query.data(), result.data(), stored, scales, query_start, kv_length, table, kTokens, 2, kHeads,
                kKvHeads, kSize, kHeads * kSize, kPages, kPageSize, 80, 0, 0.5f, 0.0f, kFloat32,
                bytes.empty() ? int32_t{kFloat32} : int32_t{kInt8Cache}};
    }
    const float* stored_row(int row, int64_t key, int64_t head, int64_t which) const {
        const int64_t slot = table[row * 80 + key / kPageSize] * kPageSize + key % kPageSize;
        return &cache[static_cast<size_t>((which * kCacheRows + slot * kKvHeads + head) * kSize)];
    }
    double expected(int row, int64_t token, int64_t head, int64_t d) const {
        const int64_t length = kv_length[row] - (query_start[row + 1] - 1 - token);
        const int64_t kv_head = head / (kHeads / kKvHeads);
        const double factor = bytes.empty() ? 1.0 : 1.0 / 127;
        double total = 0, sum = 0;
        for (int64_t key = 0; key < length; ++key) {
            double score = 0;
            const float* const keys = stored_row(row, key, kv_head, 0);
            const float* const values = stored_row(row, key, kv_head, 1);
            const float* const queries = &query[static_cast<size_t>((token * kHeads + head) * kSize)];
            for (int64_t i = 0; i < kSize; ++i) score += double{queries[i]} * keys[i];
            const double weight = std::exp(score * factor * 0.5);
            total += weight, sum += weight * values[d] * factor;
        }
        return sum / total;
    }
};

void check_attention(bool is_int8) {
    AttentionStep step(is_int8);
    const Attention task = step.task();
    require(torchinfer_cpu_attention(&task) == kOk, "status of attention");
    for (int row = 0; row < 2; ++row) {
        for (int64_t token = step.query_start[row]; token < step.query_start[row + 1]; ++token) {
            for (int64_t head = 0; head < step.kHeads; ++head) {
                const float actual = step.result[static_cast<size_t>((token * step.kHeads + head) * step.kSize + 7)];
                require(std::fabs(actual - step.expected(row, token, head, 7)) < 1e-4, "attention");
            }
        }
    }
}

// Of 1,000 logits the 10 largest are kept: the row's number picks among these in the order of their ids.
void check_sample() {
    constexpr int64_t kColumns = 1000;
    std::vector<float> logits(kRows * kColumns), temperature(kRows, 0.5f), top_p(kRows, 1.0f), min_p(kRows, 0.0f);
    std::vector<float> uniform(kRows);
    std::vector<int32_t> top_k(kRows, 10), ids(kRows);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = number(static_cast<uint32_t>(i + 3)) * 4;
    for (int64_t row = 0; row < kRows; ++row) uniform[row] = static_cast<float>(row) / kRows;
    const Sample task = {logits.data(), ids.data(), temperature.data(), top_p.data(), min_p.data(),
                         uniform.data(), top_k.data(), kRows, kColumns, kColumns};
    require(torchinfer_cpu_sample(&task) == kOk, "status of sample");
    for (int64_t row = 0; row < kRows; ++row) {
        const float* const own = &logits[static_cast<size_t>(row * kColumns)];
        std::vector<float> sorted(own, own + kColumns);
        std::sort(sorted.begin(), sorted.end());
        double all = 0, before = 0;
        for (int64_t i = 0; i < kColumns; ++i) all += own[i] >= sorted[kColumns - 10] ? std::exp(own[i] / 0.5) : 0;
        require(own[ids[row]] >= sorted[kColumns - 10], "sample keeps top_k");
        for (int64_t i = 0; i < ids[row]; ++i) before += own[i] >= sorted[kColumns - 10] ? std::exp(own[i] / 0.5) : 0;
        const double end = before + std::exp(own[ids[row]] / 0.5);
        require(before / all - 1e-5 <= uniform[row] && uniform[row] <= end / all + 1e-5, "sample");
    }
}

void check_all(const std::vector<Outcome>& expected) {
    for (int32_t format = kFormatFloat32; format <= kFormatFp8; ++format) {
        for (const int64_t group : {int64_t{1000}, int64_t{32}}) {
            if (group == 32 && format < kFormatInt4) continue;
            Matrix matrix;
            matrix.weight.num_experts = 1, matrix.weight.outputs = kOutputs, matrix.weight.inputs = 160;
            matrix.weight.group = group, matrix.weight.format = format;
            fill(matrix);
            check_linear(matrix);
        }
    }
    check_rms_norm();
    check_layer_norm();
    check_sample();
    check_quantize(kFormatInt8);
    check_quantize(kFormatInt4);
    check_attention(false);
    check_attention(true);
    check_outcomes(outcomes(), expected);
}

}  // namespace

// Argument: the largest size of the pool, 4 without it.
int main(int argc, char** argv) {
    const int most_threads = argc > 1 ? std::atoi(argv[1]) : 4;
    require(most_threads > 0, "number of threads");
    require(torchinfer_cpu_choose_level("portable") == kOk, "choose_level");
    const std::vector<Outcome> expected = outcomes();
    const std::string levels = std::string(torchinfer_cpu_levels()) + " ";
    for (size_t start = 0; start < levels.size(); start = levels.find(' ', start) + 1) {
        const std::string level = levels.substr(start, levels.find(' ', start) - start);
        require(torchinfer_cpu_choose_level(level.c_str()) == kOk, "choose_level");
        for (int num_threads = 1; num_threads <= most_threads; ++num_threads) {
            torchinfer_cpu_configure(num_threads, 0);
            std::vector<std::thread> callers;
            for (int caller = 0; caller < 3; ++caller) callers.emplace_back(check_all, std::cref(expected));
            for (std::thread& caller : callers) caller.join();
        }
        std::printf("%s: as plain loops compute\n", level.c_str());
    }
    torchinfer_cpu_configure(1, 0);  // no threads are left at the end
}
