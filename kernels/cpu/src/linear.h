// Linear layers: rows of inputs times packed matrices, one matrix or one for each run of rows (experts).
#pragma once

#include "activation.h"
#include "isa.h"
#include "pool.h"
#include "tile.h"

namespace torchinfer::TORCHINFER_LEVEL {
namespace {

constexpr int64_t kMostRows = 1024;         // at once: a bound on the memory for planes
constexpr int64_t kTilesAtOnce = 8;         // use a chunk one after the other
constexpr int64_t kFewTiles = 2;            // wait for memory; more of them compute longer than a chunk takes to come
constexpr int64_t kManySteps = 512;         // of a chunk then: a block must not fill the second cache
constexpr int64_t kFewLanes = 4;            // compute so little for a line that the machine's own prefetches are ahead
constexpr int64_t kRunsOfThread = 8;        // of blocks: as many as that share the work evenly
constexpr int64_t kSerialInputs = 1 << 14;  // fewer numbers are split into planes by the caller alone

// What is done with a tile's results.
struct Store {
    void* y;               // of `first_row` and `first_column`; a row begins `stride` values after the one before
    const void* bias;      // [outputs] in y's dtype, or null
    const void* residual;  // as y, or null: added to what would be stored without it
    int64_t outputs, stride;
    int32_t dtype;
    int64_t first_row = 0, first_column = 0;

    void operator()(const float* result, int64_t row, int64_t num_rows, int64_t block) const {
        with_dtype(dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            const int64_t first = block * kBlock, count = outputs - first < kBlock ? outputs - first : kBlock;
            for (int64_t i = 0; i < num_rows; ++i) {
                const int64_t offset = (row + i - first_row) * stride + first - first_column;
                T* const place = static_cast<T*>(y) + offset;
                for (int64_t output = 0; output < count; output += 16) {
                    F value = load(result + i * kBlock + output);
                    if (bias != nullptr) {
                        value = add(value, load_some(static_cast<const T*>(bias) + first + output, count - output));
                    }
                    if (residual != nullptr) {
                        const T* const other = static_cast<const T*>(residual) + offset + output;
                        value = add(load_some(other, count - output), rounded(value, other));
                    }
                    store_some(place + output, value, count - output);
                }
            }
        });
    }
};

// Rows of one expert, of a pass.
struct Segment {
    int64_t expert, first, rows;  // `first` counts from the pass's first row
};

// Rows cut into tiles that differ by one row at most: a tile of few rows takes longer than its share. A run of these tiles
// is cut in the same way as all are.
struct Tiles {
    int64_t rows, count;

    int64_t row_of(int64_t index) const { return rows / count * index + (index < rows % count ? index : rows % count); }
    int64_t rows_of(int64_t index) const { return row_of(index + 1) - row_of(index); }
    // The tile that row `row` is in.
    int64_t tile_of(int64_t row) const {
        const int64_t fewer = rows / count, larger = rows % count * (fewer + 1);
        return row < larger ? row / (fewer + 1) : rows % count + (row - larger) / fewer;
    }
};

// Memory of a pass.
struct Scratch {
    uint8_t* inputs;
    int32_t* sums;      // [rows][planes][groups]
    float* row_scale;   // [rows]
    Segment* segments;
    int64_t num_segments;
};

template <class Format, int kPlanes>
class Pass {
  public:
    static constexpr int kRows = most_rows<Format>(kPlanes);

    Pass(const Linear& task, Scratch scratch, int64_t first_row, int num_threads)
        : task_(task), weight_(*task.weight), scratch_(scratch), first_row_(first_row), num_threads_(num_threads),
          groups_(num_groups(weight_)), blocks_(num_blocks(weight_)), block_bytes_(block_bytes(weight_)),
          row_bytes_(padded_inputs(weight_) / Format::kStep * Format::kLaneBytes),
          items_(task.is_gated ? blocks_ / 2 : blocks_) {}

    static int64_t scratch_bytes(const PackedWeight& weight, int64_t rows) {
        const int64_t row_bytes = padded_inputs(weight) / Format::kStep * Format::kLaneBytes;
        return rows * kPlanes * (row_bytes + num_groups(weight) * 4) + rows * 4 +
               weight.num_experts * static_cast<int64_t>(sizeof(Segment)) + 4 * kLine;
    }

    void split_rows(Pool& threads, int64_t num_rows) const {
        // A tile's rows lie side by side in the same lines of the cache: one thread writes them all.
        const auto split_tile = [&](int64_t row, int) {
            const Segment& segment = segment_of(row);
            const Tiles tiles = tiles_of(segment.rows);
            const int64_t index = tiles.tile_of(row - segment.first), rows = tiles.rows_of(index);
            if (segment.first + tiles.row_of(index) != row) return;
            with_dtype(task_.dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                const T* const x = static_cast<const T*>(task_.x) + (first_row_ + row) * task_.stride;
                for (int64_t i = 0; i < rows; ++i) split_row_of(x + i * task_.stride, row + i, i, rows);
            });
        };
        if (num_rows * weight_.inputs <= kSerialInputs) {
            for (int64_t row = 0; row < num_rows; ++row) split_tile(row, 0);
        } else {
            parallel_for(threads, num_rows, split_tile);
        }
    }

    void multiply(Pool& threads, int64_t num_rows) const {
        const int64_t run = blocks_of_run(num_rows), runs = (items_ + run - 1) / run;
        const auto start_of = [&](int64_t at) -> const uint8_t* {
            if (at >= scratch_.num_segments * runs) return nullptr;
            return values_of(scratch_.segments[at / runs].expert, at % runs * run);
        };
        parallel_for(threads, scratch_.num_segments * runs, [&](int64_t at, int) {
            const int64_t first = at % runs * run, last = first + run < items_ ? first + run : items_;
            // Threads claim runs in turn, so the next one of this thread is most likely that.
            compute_run(scratch_.segments[at / runs], first, last, start_of(at + num_threads_));
        });
    }

  private:
    // Row `in_tile` of a tile of `rows`.
    template <class T>
    void split_row_of(const T* x, int64_t row, int64_t in_tile, int64_t rows) const {
        const RowTarget target = {scratch_.inputs + (row - in_tile) * kPlanes * row_bytes_, in_tile * kPlanes,
                                  rows * kPlanes};
        if constexpr (Format::kIsInteger) {
            int32_t* const sums = scratch_.sums + row * kPlanes * groups_;
            scratch_.row_scale[row] = integer_row<Format::kStep, kPlanes>(weight_, x, target, sums);
        } else {
            scratch_.row_scale[row] = float_row<Format::kStep, kPlanes>(weight_, x, target);
        }
    }

    const Segment& segment_of(int64_t row) const {
        int64_t low = 0, high = scratch_.num_segments - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (scratch_.segments[middle].first <= row) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return scratch_.segments[low];
    }

    const uint8_t* values_of(int64_t expert, int64_t block) const {
        return weight_.values + (expert * blocks_ + block) * block_bytes_;
    }

    // Where memory decides, a thread takes blocks that lie one behind the other: the machine's own prefetches, which are
    // ahead of the end of a block, are of use then.
    int64_t blocks_of_run(int64_t num_rows) const {
        if (num_rows > kRows * scratch_.num_segments) return 1;
        const int64_t run = scratch_.num_segments * items_ / (kRunsOfThread * num_threads_);
        return run < 1 ? 1 : run < items_ ? run : items_;
    }

    // Blocks of outputs, or of gates with those of what they are multiplied with.
    void compute_run(const Segment& segment, int64_t first, int64_t last, const uint8_t* next) const {
        const Tiles tiles = tiles_of(segment.rows);
        const int64_t at_once = task_.is_gated && tiles.count < kTilesAtOnce ? kTilesAtOnce / tiles.count : 1;
        for (int64_t block = first; block < last; block += at_once) {
            const int64_t count = last - block < at_once ? last - block : at_once;
            const uint8_t* const following = block + count < last ? values_of(segment.expert, block + count) : next;
            for (int64_t tile = 0; tile < tiles.count; tile += kTilesAtOnce) {
                const int64_t end = tile + kTilesAtOnce < tiles.count ? tile + kTilesAtOnce : tiles.count;
                const int64_t row = segment.first + tiles.row_of(tile);
                const Tiles some = {tiles.row_of(end) - tiles.row_of(tile), end - tile};
                if (task_.is_gated) {
                    compute_gated(segment.expert, block, count, row, some, following);
                } else {
                    const int64_t outputs = weight_.outputs;
                    const Store store = {task_.y, task_.bias, task_.residual, outputs, outputs, task_.dtype};
                    compute_tiles(tile_of(segment.expert, block), block, row, some, following, store);
                }
            }
        }
    }

    // Gates and what they are multiplied with are rounded, as if they were written out. count * tiles: at most
    // kTilesAtOnce.
    void compute_gated(int64_t expert, int64_t block, int64_t count, int64_t row, Tiles tiles,
                       const uint8_t* next) const {
        alignas(64) char both[kTilesAtOnce * kRows * 2 * kBlock * 4];  // [count][rows][2][64]
        const int64_t rows = tiles.rows, bytes = size_of(task_.dtype), part_bytes = rows * 2 * kBlock * bytes;
        for (int64_t i = 0; i < 2 * count; ++i) {
            const int64_t half = i / count, index = i % count, part = half * items_ + block + index;
            const Store store = {both + index * part_bytes, task_.bias, nullptr, weight_.outputs, 2 * kBlock,
                                 task_.dtype, first_row_ + row, (part - half) * kBlock};
            const uint8_t* const behind = half == 0 ? values_of(expert, items_ + block) : next;
            const uint8_t* const following = index + 1 < count ? values_of(expert, part + 1) : behind;
            compute_tiles(tile_of(expert, part), part, row, tiles, following, store);
        }
        const int64_t columns = weight_.outputs / 2;
        for (int64_t index = 0; index < count; ++index) {
            char* const y = static_cast<char*>(task_.y) +
                            ((first_row_ + row) * columns + (block + index) * kBlock) * bytes;
            const GatedActivation task = {both + index * part_bytes, y, rows, kBlock, 2 * kBlock, columns,
                                          task_.kind, task_.dtype};
            with_dtype(task_.dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                for (int64_t i = 0; i < rows; ++i) activate_part<T>(task, i, 0, kBlock);
            });
        }
    }

    Tile tile_of(int64_t expert, int64_t block) const {
        const int64_t tables = (expert * blocks_ + block) * groups_ * kBlock;
        const int64_t num_outputs = weight_.outputs - block * kBlock;
        Tile tile = {};
        tile.values = values_of(expert, block);
        tile.scale = weight_.scale == nullptr ? nullptr : weight_.scale + tables;
        tile.zero = weight_.zero == nullptr ? nullptr : weight_.zero + tables;
        tile.groups = groups_;
        tile.steps = padded_inputs(weight_) / groups_ / Format::kStep;
        tile.vectors = num_outputs < kBlock ? (num_outputs + 15) / 16 : kBlock / 16;
        return tile;
    }

    // Chunk by chunk, so that the tiles after the first find the weights in the first cache.
    void compute_tiles(Tile tile, int64_t block, int64_t first_row, Tiles tiles, const uint8_t* next,
                       const Store& put) const {
        alignas(64) float results[kTilesAtOnce][kRows * kBlock];
        constexpr int64_t kLanes = round_up(kRows * kPlanes, Format::kSumLanes);
        alignas(64) char carried[kTilesAtOnce][kLanes * kBlock * 4];
        Chunk chunk = {0, 0, 0, 0};
        while (next_chunk(tile, tiles.count, chunk)) {
            for (int64_t index = 0; index < tiles.count; ++index) {
                const int64_t row = first_row + tiles.row_of(index);
                tile.inputs = scratch_.inputs + row * kPlanes * row_bytes_;
                tile.sums = scratch_.sums + row * kPlanes * groups_;
                tile.row_scale = scratch_.row_scale + row;
                tile.prefetch = plan_prefetch(tile, chunk, next, index, tiles);
                compute_rows<kRows>(tiles.rows_of(index), tile, chunk, carried[index], results[index]);
                if (chunk.group_end == tile.groups && chunk.step_end == tile.steps) {
                    put(results[index], first_row_ + row, tiles.rows_of(index), block);
                }
            }
        }
    }

    static Tiles tiles_of(int64_t num_rows) { return {num_rows, (num_rows + kRows - 1) / kRows}; }

    // False after the last one. A tile that is alone takes all at once.
    static bool next_chunk(const Tile& tile, int64_t num_tiles, Chunk& chunk) {
        const int64_t several = num_tiles <= kFewTiles ? kChunkSteps : kManySteps;
        const int64_t at_once = num_tiles == 1 ? tile.groups * tile.steps : several;
        if (chunk.step_end < tile.steps && chunk.group_end > 0) {
            chunk.step = chunk.step_end;
        } else {
            if (chunk.group_end == tile.groups) return false;
            const int64_t groups = at_once / tile.steps > 1 ? at_once / tile.steps : 1;
            chunk.group = chunk.group_end, chunk.step = 0;
            chunk.group_end = chunk.group + groups < tile.groups ? chunk.group + groups : tile.groups;
        }
        // Only a single group is cut: sums of several would have to be kept.
        const int64_t steps = tile.groups == 1 ? at_once : tile.steps;
        chunk.step_end = chunk.step + steps < tile.steps ? chunk.step + steps : tile.steps;
        return true;
    }

    // A block that is used once is fetched shortly before its use, or by the machine alone: more of its prefetches are on
    // their way at once than of ours. Where a block is used by several tiles, these fetch the next chunk meanwhile, each as
    // much of it as it has rows, so that memory is busy all the while that they compute.
    Prefetch plan_prefetch(const Tile& tile, const Chunk& chunk, const uint8_t* next, int64_t index,
                           Tiles tiles) const {
        if (tiles.rows * kPlanes <= kFewLanes) return {};
        constexpr int kBurst = kStepsAtOnce * Format::kStepBytes / kLine;
        const int64_t ahead = kPrefetchAhead < block_bytes_ ? kPrefetchAhead : block_bytes_;
        if (tiles.count == 1) return {tile.values + ahead, tile.values + block_bytes_, next, kBurst, true};
        const int64_t steps = (chunk.group_end - chunk.group - 1) * tile.steps + chunk.step_end - chunk.step;
        const int64_t done = (chunk.group_end - 1) * tile.steps + chunk.step_end, bytes = steps * Format::kStepBytes;
        const bool is_last = done == tile.groups * tile.steps;
        const uint8_t* const start = is_last ? next : tile.values + done * Format::kStepBytes;
        if (start == nullptr) return {};
        const int64_t rows = tiles.rows_of(index), from = tiles.row_of(index) * bytes / tiles.rows / kLine * kLine;
        const int64_t behind = tiles.row_of(index + 1) * bytes / tiles.rows;
        const int64_t end = index + 1 == tiles.count ? bytes : behind / kLine * kLine;
        const int lines = static_cast<int>((kBurst * rows + tiles.rows - 1) / tiles.rows);
        return {start + from, start + end, nullptr, lines, false};
    }

    template <int kCount>
    static void compute_rows(int64_t rows, const Tile& tile, const Chunk& chunk, char* carried, float* result) {
        if constexpr (kCount > 1) {
            if (rows < kCount) return compute_rows<kCount - 1>(rows, tile, chunk, carried, result);
        }
        compute_tile<Format, kPlanes, kCount>(tile, chunk, carried, result);
    }

    const Linear& task_;
    const PackedWeight& weight_;
    const Scratch scratch_;
    const int64_t first_row_;
    const int num_threads_;
    const int64_t groups_, blocks_, block_bytes_, row_bytes_, items_;
};

// The part of each expert's rows in [first, last).
inline int64_t find_segments(const Linear& task, int64_t first, int64_t last, Segment* segments) {
    int64_t count = 0, start = 0;
    for (int64_t expert = 0; expert < task.weight->num_experts; ++expert) {
        const int64_t rows = task.group_sizes == nullptr ? task.rows : task.group_sizes[expert];
        const int64_t begin = start > first ? start : first, end = start + rows < last ? start + rows : last;
        if (begin < end) segments[count++] = {expert, begin - first, end - begin};
        start += rows;
    }
    return count;
}

template <class Format, int kPlanes>
int32_t linear_passes(Pool& threads, const Linear& task) {
    using ThisPass = Pass<Format, kPlanes>;
    const PackedWeight& weight = *task.weight;
    const int64_t most_rows = task.rows < kMostRows ? task.rows : kMostRows;
    uint8_t* const memory = static_cast<uint8_t*>(threads.scratch(ThisPass::scratch_bytes(weight, most_rows)));
    if (memory == nullptr) return kNoMemory;
    const int64_t row_bytes = padded_inputs(weight) / Format::kStep * Format::kLaneBytes;
    Scratch scratch = {};
    scratch.inputs = memory;
    scratch.segments = reinterpret_cast<Segment*>(memory + round_up(most_rows * kPlanes * row_bytes, kLine));
    scratch.sums = reinterpret_cast<int32_t*>(scratch.segments + weight.num_experts);
    scratch.row_scale = reinterpret_cast<float*>(scratch.sums + most_rows * kPlanes * num_groups(weight));
    for (int64_t first = 0; first < task.rows; first += kMostRows) {
        const int64_t last = first + kMostRows < task.rows ? first + kMostRows : task.rows;
        scratch.num_segments = find_segments(task, first, last, scratch.segments);
        const ThisPass pass(task, scratch, first, threads.num_threads());
        pass.split_rows(threads, last - first);
        pass.multiply(threads, last - first);
    }
    return kOk;
}

template <class Format>
int32_t linear_format(Pool& threads, const Linear& task) {
    constexpr bool kHasPlanes = Format::kIsInteger || (kHasBf16Products && Format::kStep == 2);
    if constexpr (kHasPlanes) {
        // Rounded inputs are whole numbers or e4m3fn, which bf16 holds: one plane. In groups they have their scale.
        const bool has_scale = task.weight->activations == kAsTheyAre || is_rounded_in_groups(*task.weight);
        if (has_scale && task.dtype == kFloat32) {
            return linear_passes<Format, 3>(threads, task);
        }
        const int64_t bits_of_plane = Format::kIsInteger ? 7 : 8, bits = task.dtype == kFloat16 ? 11 : 8;
        if (has_scale && bits > bits_of_plane) {
            return linear_passes<Format, 2>(threads, task);
        }
    }
    return linear_passes<Format, 1>(threads, task);
}

int32_t linear(Pool& threads, const Linear& task) {
    switch (task.weight->format) {
        case kFormatFloat32:
            return linear_format<FloatFormat>(threads, task);
        case kFormatBf16:
            return linear_format<Bf16Format>(threads, task);
        case kFormatInt8:
            return linear_format<Int8Format>(threads, task);
        case kFormatInt4:
            return linear_format<Int4Format>(threads, task);
        default:
            return linear_format<Fp8Format>(threads, task);
    }
}

}  // namespace
}  // namespace torchinfer::TORCHINFER_LEVEL
