// What exercise_library.cpp compares between levels: each function once in each dtype.
#include "exercise.h"

namespace torchinfer::exercise {
namespace {

constexpr int32_t kDtypes[] = {kFloat32, kBfloat16, kFloat16};
constexpr int32_t kCaches[] = {kFloat32, kBfloat16, kFloat16, kInt8Cache, kFp8Cache};

uint16_t half_of(float value) {
    int exponent = 0;
    const float fraction = std::frexp(std::fabs(value), &exponent);
    const int sign = value < 0 ? 0x8000 : 0;
    if (value == 0.0f) return 0;
    return static_cast<uint16_t>(sign | (exponent + 14) << 10 | (static_cast<int>(fraction * 2048) & 0x3ff));
}
float float_of(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    const float size = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(1.0f * mantissa, -24)
                                       : std::ldexp(1024.0f + mantissa, exponent - 25);
    return half & 0x8000 ? -size : size;
}

// Numbers of a dtype, which every dtype holds exactly.
struct Numbers {
    int32_t dtype;
    std::vector<uint8_t> bytes;

    Numbers(int32_t numbers_dtype, int64_t count, uint32_t seed)
        : dtype(numbers_dtype), bytes(static_cast<size_t>(count * size_of(numbers_dtype))) {
        for (int64_t i = 0; i < count; ++i) put(i, std::round(number(static_cast<uint32_t>(i) + seed) * 128) / 128);
    }
    void put(int64_t at, float value) {
        uint8_t* const place = &bytes[static_cast<size_t>(at * size_of(dtype))];
        uint32_t bits = 0;
        std::memcpy(&bits, &value, 4);
        const uint16_t word = dtype == kFloat16 ? half_of(value) : static_cast<uint16_t>(bits >> 16);
        std::memcpy(place, dtype == kFloat32 ? static_cast<const void*>(&value) : &word, size_of(dtype));
    }
    float at(size_t index) const {
        if (dtype == kFloat32) {
            float value;
            std::memcpy(&value, &bytes[index * 4], 4);
            return value;
        }
        uint16_t word;
        std::memcpy(&word, &bytes[index * 2], 2);
        if (dtype == kFloat16) return float_of(word);
        const uint32_t bits = static_cast<uint32_t>(word) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    void* data() { return bytes.data(); }
    Outcome outcome(const char* what) const {
        Outcome result = {what, dtype, {}};
        for (size_t i = 0; i < bytes.size() / static_cast<size_t>(size_of(dtype)); ++i) result.values.push_back(at(i));
        return result;
    }
};

void size_matrix(Matrix& matrix, int32_t format, int64_t outputs, int64_t inputs, int64_t group, int64_t experts) {
    matrix.weight.num_experts = experts, matrix.weight.outputs = outputs, matrix.weight.inputs = inputs;
    matrix.weight.group = group, matrix.weight.format = format;
}

// Two experts, rows in odd numbers, inputs in no whole step.
void put_linear(std::vector<Outcome>& results, int32_t format, int32_t activations, int32_t dtype, bool has_zeros,
                bool has_groups) {
    constexpr int64_t kOutputs = 130, kRows = 12;
    const int64_t inputs = has_groups ? 96 : 75;
    Matrix matrix;
    size_matrix(matrix, format, kOutputs, inputs, has_groups ? 32 : inputs, 2);
    fill(matrix);
    matrix.weight.activations = activations;
    std::vector<uint8_t> zero(matrix.scale.size());
    for (size_t i = 0; i < zero.size(); ++i) zero[i] = static_cast<uint8_t>(i * 7 % 16);
    if (has_zeros) matrix.weight.zero = zero.data();
    Numbers x(dtype, kRows * inputs, 77), bias(dtype, kOutputs, 5), y(dtype, kRows * kOutputs, 0);
    x.put(4 * inputs + 3, NAN);
    const int32_t sizes[2] = {7, 5};
    require(torchinfer_cpu_linear(&matrix.weight, x.data(), y.data(), bias.data(), sizes, kRows, inputs, dtype) == kOk,
            "status of linear with experts");
    results.push_back(y.outcome("linear with experts"));
}

void put_rotary(std::vector<Outcome>& results, int32_t dtype) {
    constexpr int64_t kTokens = 5, kHeads = 3, kSize = 50, kFrequencies = 21, kStride = kHeads * kSize + 8;
    Numbers x(dtype, kTokens * kStride, 1), y(dtype, kTokens * kHeads * kSize, 0);
    Numbers cosine(kFloat32, kTokens * kFrequencies, 3), sine(kFloat32, kTokens * kFrequencies, 4);
    for (const int32_t is_interleaved : {0, 1}) {
        const int32_t status = torchinfer_cpu_rotary(
            x.data(), y.data(), static_cast<float*>(cosine.data()), static_cast<float*>(sine.data()), kTokens, kHeads,
            kSize, kFrequencies, kStride, is_interleaved, dtype);
        require(status == kOk, "status of rotary");
        results.push_back(y.outcome("rotary"));
    }
}

void put_activations(std::vector<Outcome>& results, int32_t dtype) {
    constexpr int64_t kRows = 4, kColumns = 77;
    for (const int32_t kind : {kSilu, kGelu, kGeluTanh}) {
        Numbers x(dtype, kRows * 2 * kColumns, 9), y(dtype, kRows * kColumns, 0);
        require(torchinfer_cpu_gated_activation(x.data(), y.data(), kRows, kColumns, 2 * kColumns, kind, dtype) == kOk,
                "status of gated_activation");
        results.push_back(y.outcome("gated_activation"));
    }
}

// A step of two rows, one token of a context over two spans and the last three of a short one, and its paged cache.
struct Step {
    static constexpr int64_t kHeads = 4, kKvHeads = 2, kSize = 40, kPageSize = 8, kPages = 80, kTokens = 4;
    static constexpr int64_t kSlots = kPages * kPageSize, kQkv = (kHeads + 2 * kKvHeads) * kSize;
    int32_t query_start[3] = {0, 1, 4}, kv_length[2] = {530, 30}, table[2 * 70] = {}, slot[kTokens] = {};
    std::vector<uint8_t> cache;
    std::vector<float> scale;
    int32_t dtype, cache_dtype;

    Step(int32_t numbers_dtype, int32_t numbers_cache) : dtype(numbers_dtype), cache_dtype(numbers_cache) {
        for (int i = 0; i < 140; ++i) table[i] = i < 70 ? 79 - i : i - 70;
        slot[0] = table[529 / 8] * 8 + 529 % 8;
        for (int i = 0; i < 3; ++i) slot[1 + i] = 27 + i;
        const bool is_scaled = cache_dtype == kInt8Cache || cache_dtype == kFp8Cache;
        cache.resize(static_cast<size_t>(2 * kSlots * kKvHeads * kSize * (is_scaled ? 1 : size_of(cache_dtype))));
        if (is_scaled) scale.assign(2 * kSlots * kKvHeads, 0.0f);
        fill_cache();
    }
    float* scales() { return scale.empty() ? nullptr : scale.data(); }
    void fill_cache() {
        constexpr int64_t kNumbers = kSlots * kKvHeads * kSize;
        Numbers key(dtype, kNumbers, 21), value(dtype, kNumbers, 22);
        std::vector<int32_t> all(kSlots);
        for (int32_t i = 0; i < kSlots; ++i) all[static_cast<size_t>(i)] = i;
        const WriteKv task = {key.data(), value.data(), cache.data(), scales(), all.data(), kSlots, kKvHeads, kSize,
                              kKvHeads * kSize, kKvHeads * kSize, kSlots, dtype, cache_dtype};
        require(torchinfer_cpu_write_kv(&task) == kOk, "status of write_kv");
    }
    StepBatch batch() const { return {slot, query_start, kv_length, table, kTokens, 2, 70, kPageSize}; }
};

void put_attention(std::vector<Outcome>& results, int32_t dtype, int32_t cache_dtype) {
    Step step(dtype, cache_dtype);
    Numbers query(dtype, Step::kTokens * Step::kHeads * Step::kSize, 31);
    Numbers result(dtype, Step::kTokens * Step::kHeads * Step::kSize, 0);
    for (const bool is_limited : {false, true}) {
        const int64_t window = is_limited ? 100 : 0;
        const float soft_cap = is_limited ? 5.0f : 0.0f;
        const Attention task = {query.data(), result.data(), step.cache.data(), step.scales(), step.query_start,
                                step.kv_length, step.table, Step::kTokens, 2, Step::kHeads, Step::kKvHeads,
                                Step::kSize, Step::kHeads * Step::kSize, Step::kPages, Step::kPageSize, 70, window,
                                0.5f, soft_cap, dtype, cache_dtype};
        require(torchinfer_cpu_attention(&task) == kOk, "status of attention");
        results.push_back(result.outcome("attention"));
    }
}

void put_layers(std::vector<Outcome>& results, int32_t dtype, int32_t cache_dtype, int32_t format) {
    constexpr int64_t kHidden = 64, kInner = 128, kFrequencies = 16;
    Matrix qkv, output, gate_up, down;
    size_matrix(qkv, format, Step::kQkv, kHidden, kHidden, 1);
    size_matrix(output, format, kHidden, Step::kHeads * Step::kSize, Step::kHeads * Step::kSize, 1);
    size_matrix(gate_up, format, 2 * kInner, kHidden, kHidden, 1);
    size_matrix(down, format, kHidden, kInner, kInner, 1);
    for (Matrix* matrix : {&qkv, &output, &gate_up, &down}) fill(*matrix);
    Numbers x(dtype, Step::kTokens * kHidden, 41), y(dtype, Step::kTokens * kHidden, 0), norm(dtype, kHidden, 42);
    Numbers head_norm(dtype, Step::kSize, 43), bias(dtype, Step::kQkv, 44);
    Numbers cosine(kFloat32, Step::kTokens * kFrequencies, 3), sine(kFloat32, Step::kTokens * kFrequencies, 4);
    Step step(dtype, cache_dtype);
    const StepBatch batch = step.batch();
    AttentionLayer layer = {};
    layer.step = &batch, layer.x = x.data(), layer.y = y.data();
    layer.cosine = static_cast<float*>(cosine.data()), layer.sine = static_cast<float*>(sine.data());
    layer.cache = step.cache.data(), layer.scale = step.scales(), layer.frequencies = kFrequencies;
    layer.pages = Step::kPages, layer.qkv = &qkv.weight, layer.output = &output.weight, layer.qkv_bias = bias.data();
    layer.norm = layer.output_norm = norm.data(), layer.query_norm = layer.key_norm = head_norm.data();
    layer.heads = Step::kHeads, layer.kv_heads = Step::kKvHeads, layer.head_size = Step::kSize;
    layer.score_scale = 0.2f, layer.epsilon = 1e-5f, layer.dtype = dtype, layer.cache_dtype = cache_dtype;
    require(torchinfer_cpu_attention_layer(&layer) == kOk, "status of attention_layer");
    results.push_back(y.outcome("attention_layer"));
    const MlpLayer mlp = {x.data(), y.data(), Step::kTokens, &gate_up.weight, &down.weight, nullptr, nullptr,
                          norm.data(), norm.data(), 1e-5f, 0.0f, kSilu, dtype};
    require(torchinfer_cpu_mlp_layer(&mlp) == kOk, "status of mlp_layer");
    results.push_back(y.outcome("mlp_layer"));
}

}  // namespace

std::vector<Outcome> outcomes() {
    std::vector<Outcome> results;
    for (const int32_t dtype : kDtypes) {
        for (int32_t format = kFormatFloat32; format <= kFormatFp8; ++format) {
            put_linear(results, format, kAsTheyAre, dtype, false, format == kFormatInt4);
        }
        put_linear(results, kFormatInt4, kAsTheyAre, dtype, true, true);
        put_linear(results, kFormatInt8, kRoundedToInt8, dtype, false, false);
        put_linear(results, kFormatInt4, kRoundedToInt8, dtype, true, true);
        for (const bool has_groups : {false, true}) {
            put_linear(results, kFormatFp8, kRoundedToFp8, dtype, false, has_groups);
        }
        put_rotary(results, dtype);
        put_activations(results, dtype);
        for (const int32_t cache_dtype : kCaches) put_attention(results, dtype, cache_dtype);
        put_layers(results, dtype, dtype, kFormatBf16);
        put_layers(results, dtype, kInt8Cache, kFormatInt8);
    }
    return results;
}

void check_outcomes(const std::vector<Outcome>& actual, const std::vector<Outcome>& expected) {
    require(actual.size() == expected.size(), "number of outcomes");
    for (size_t i = 0; i < actual.size(); ++i) {
        const Outcome &a = actual[i], &b = expected[i];
        require(a.values.size() == b.values.size(), b.what);
        float largest = 0;
        for (const float value : b.values) largest = std::isnan(value) ? largest : std::fmax(largest, std::fabs(value));
        // Sums of products of bf16 and their results are rounded; what a row's values are small against counts, too.
        const float tolerance = (b.dtype == kFloat32 ? 1e-4f : b.dtype == kFloat16 ? 2e-3f : 2e-2f) * largest;
        for (size_t j = 0; j < a.values.size(); ++j) {
            const bool are_nan = std::isnan(a.values[j]) && std::isnan(b.values[j]);
            require(are_nan || std::fabs(a.values[j] - b.values[j]) <= tolerance, b.what);
        }
    }
}

}  // namespace torchinfer::exercise
