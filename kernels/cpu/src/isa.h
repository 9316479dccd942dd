// The levels of instruction sets, and the kernels of each.
#pragma once

#include <cstdint>

namespace torchinfer {

class Pool;
struct PackedWeight;

struct RmsNorm {
    const void* x;  // [rows, columns]; a row begins `stride` values after the one before
    const void* weight;
    void* y;  // [rows, columns], contiguous
    int64_t rows, columns, stride;
    float epsilon, offset;
    int32_t dtype;
};

struct LayerNorm {
    const void* x;  // [rows, columns]; a row begins `stride` values after the one before
    const void *weight, *bias;
    void* y;  // [rows, columns], contiguous
    int64_t rows, columns, stride;
    float epsilon;
    int32_t dtype;
};

// y = x times the transposed matrix, plus bias, plus residual. With group_sizes each run of rows has its own matrix.
struct Linear {
    const PackedWeight* weight;
    const void* x;  // [rows, inputs]; a row begins `stride` values after the one before
    void* y;        // [rows, outputs], contiguous
    const void* bias;            // [outputs], or null
    const int32_t* group_sizes;  // [experts], their sum is `rows`; null: there is one matrix
    int64_t rows, stride;
    int32_t dtype;  // of x, y, bias and residual
    const void* residual = nullptr;  // [rows, outputs], contiguous, or null
    bool is_gated = false;           // y [rows, outputs / 2] = activation(first half) * second half, 64 outputs at once
    int32_t kind = 0;                // ActivationKind
};

constexpr int64_t kMostHeads = 4096, kMostHeadSize = 1024;

// A step's queries over the paged cache. batch.py describes the rows.
struct Attention {
    const void* query;   // [tokens, heads, head_size]; a token begins `stride` values after the one before
    void* result;        // [tokens, heads, head_size], contiguous
    const void* cache;   // [2, pages, page_size, kv_heads, head_size], contiguous
    const float* scale;  // [2, pages, page_size, kv_heads]; null: the cache has none
    const int32_t* query_start;  // [rows + 1]
    const int32_t* kv_length;    // [rows]
    const int32_t* page_table;   // [rows, table_width]
    int64_t tokens, rows, heads, kv_heads, head_size, stride, pages, page_size, table_width;
    int64_t window;    // 0: none
    float score_scale, soft_cap;  // 0: none
    int32_t dtype, cache_dtype;

    int64_t cache_rows() const { return pages * page_size * kv_heads; }  // of the keys, and of the values
};

struct WriteKv {
    const void* key;    // [tokens, kv_heads, head_size]
    const void* value;  // as key
    void* cache;        // as in Attention
    float* scale;
    const int32_t* slot;  // [tokens]
    int64_t tokens, kv_heads, head_size, key_stride, value_stride, slots;
    int32_t dtype, cache_dtype;
};

// A matrix into fewer bits: `row_block` rows by `column_block` columns share a scale.
struct Quantize {
    const void* x;  // [rows, columns]; a row begins `stride` values after the one before
    void* values;   // [rows, columns] of int8 or e4m3fn, or [rows, columns / 2] of two of 4 bits; contiguous
    float* scale;   // [blocks of rows, groups of columns]
    int64_t rows, columns, stride, row_block, column_block;
    int32_t dtype, format;  // Dtype of x; Format of the values: int8, int4 or fp8

    int64_t num_groups() const { return (columns + column_block - 1) / column_block; }
};

struct Rotary {
    const void* x;  // [tokens, heads, head_size]; a token begins `stride` values after the one before
    void* y;        // as x, contiguous
    const float* cosine;  // [tokens, frequencies], contiguous
    const float* sine;
    int64_t tokens, heads, head_size, frequencies, stride;
    int32_t is_interleaved, dtype;
};

enum ActivationKind : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };
struct GatedActivation {
    const void* x;  // [rows, 2 * columns]: gates, then what they are multiplied with
    void* y;        // [rows, columns]
    int64_t rows, columns, stride, y_stride;
    int32_t kind, dtype;
};

// Without temperatures the first of a row's largest logits, else as the door says.
struct Sample {
    const float* logits;  // [rows, columns]; a row begins `stride` values after the one before
    int32_t* ids;         // [rows]
    const float *temperature, *top_p, *min_p, *uniform;  // [rows], all null or none
    const int32_t* top_k;                                // [rows]
    int64_t rows, columns, stride;
};

// What a step's layers have in common. batch.py describes the rows.
struct StepBatch {
    const int32_t* slot;         // [tokens]
    const int32_t* query_start;  // [rows + 1]
    const int32_t* kv_length;    // [rows]
    const int32_t* page_table;   // [rows, table_width]
    int64_t tokens, rows, table_width, page_size;
};

// y = x + output_norm(output(attention(qkv(norm(x))))); norms and biases that are null are left out.
struct AttentionLayer {
    const StepBatch* step;
    const void* x;  // [tokens, hidden], contiguous
    void* y;        // as x, elsewhere
    const float* cosine;  // [tokens, frequencies], contiguous
    const float* sine;
    void* cache;  // as in Attention
    float* scale;
    int64_t frequencies, pages;
    // What the layer always has.
    const PackedWeight *qkv, *output;
    const void *qkv_bias, *output_bias, *norm, *query_norm, *key_norm, *output_norm;
    int64_t heads, kv_heads, head_size, window;
    float score_scale, soft_cap, epsilon, offset;
    int32_t is_interleaved, dtype, cache_dtype;

    int64_t query_size() const { return heads * head_size; }
    int64_t qkv_size() const { return (heads + 2 * kv_heads) * head_size; }
    Attention attention(const void* query, void* result) const {
        const StepBatch& s = *step;
        return {query, result, cache, scale, s.query_start, s.kv_length, s.page_table,
                s.tokens, s.rows, heads, kv_heads, head_size, query_size(), pages, s.page_size, s.table_width,
                window, score_scale, soft_cap, dtype, cache_dtype};
    }
};

// y = x + output_norm(down(activation(gate) * up)), gate and up being gate_up(norm(x)).
struct MlpLayer {
    const void* x;  // [tokens, hidden], contiguous
    void* y;        // as x, elsewhere
    int64_t tokens;
    const PackedWeight *gate_up, *down;
    const void *gate_up_bias, *down_bias, *norm, *output_norm;
    float epsilon, offset;
    int32_t kind, dtype;
};

// One for each level; a new kernel is a new field here and a line in level.cpp.
struct Kernels {
    void (*rms_norm)(Pool&, const RmsNorm&);
    void (*layer_norm)(Pool&, const LayerNorm&);
    int32_t (*linear)(Pool&, const Linear&);  // returns a Status
    float (*measure_read)(Pool&, const void* memory, int64_t bytes, int32_t streams, int64_t ahead);
    int64_t (*measure_products)(Pool&, int32_t format, int64_t repeats);
    int32_t (*attention)(Pool&, const Attention&);  // returns a Status
    void (*write_kv)(Pool&, const WriteKv&);
    void (*quantize)(Pool&, const Quantize&);
    void (*rotary)(Pool&, const Rotary&);
    void (*gated_activation)(Pool&, const GatedActivation&);
    int32_t (*attention_layer)(Pool&, const AttentionLayer&);  // returns a Status
    int32_t (*mlp_layer)(Pool&, const MlpLayer&);              // returns a Status
    int32_t (*sample)(Pool&, const Sample&);                   // returns a Status
};

// The kernels of the best level that this machine runs, or of the one that was chosen.
const Kernels& kernels();
const char* level_name();
// False if the machine or the library lacks the level; nullptr or "": the best one.
bool choose_level(const char* name);
// Names of the levels that this machine runs, the best first, separated by spaces.
const char* level_names();

}  // namespace torchinfer
