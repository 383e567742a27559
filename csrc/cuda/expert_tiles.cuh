// Which output tile comes next: a persistent block walks tile numbers blockIdx.x,
// blockIdx.x + gridDim.x, ... and this turns a number into (expert, rows, columns) from the expert
// offsets on the device. No host ever learns the routing.
//
// Experts are looked at in windows of kExpertWindow: one scan over the block per window makes the
// prefix sum of their row tiles in shared memory. Tile numbers only grow, so a window is never
// visited twice, and any number of experts takes the same few KB.
#pragma once

#include <cstdint>

#include "block_scan.cuh"

namespace simple_moe {

constexpr int kExpertsPerThread = 4;

template <int kThreads>
struct ExpertTilesStorage {
  static constexpr int kWindow = kThreads * kExpertsPerThread;
  int row_begin[kWindow + 1];
  int tiles_before[kWindow + 1];  // row tiles before each expert, over all windows
  int warp_totals[kThreads / 32];
};

struct Tile {
  int64_t expert;
  int row_begin;  // first row of the tile
  int row_count;  // rows of the expert from there on, at most the tile's height
  int column_tile;
};

template <int kThreads, int kTileRows>
class ExpertTiles {
 public:
  using Storage = ExpertTilesStorage<kThreads>;

  __device__ ExpertTiles(Storage* storage, const int32_t* offsets, int64_t experts, int64_t rows,
                         int64_t column_tiles)
      : s_(*storage),
        offsets_(offsets),
        experts_(experts),
        rows_(static_cast<int>(rows)),
        column_tiles_(column_tiles) {
    scan_window();
  }

  // The tile of that number, or false past the last. All threads of the block must come, with the
  // same, growing numbers.
  __device__ bool find(int64_t number, Tile& tile) {
    const int64_t row_tile = number / column_tiles_;
    while (row_tile >= s_.tiles_before[Storage::kWindow]) {
      first_expert_ += Storage::kWindow;
      if (first_expert_ >= experts_) return false;
      scan_window();
    }
    int low = 0, high = Storage::kWindow;  // tiles_before[low] <= row_tile < tiles_before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (s_.tiles_before[middle] <= row_tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    // Within an expert: column sweeps over kGroup row tiles, so that the few rows and the few
    // columns in flight stay in L2.
    constexpr int64_t kGroup = 16;
    const int64_t expert_tiles = s_.tiles_before[low + 1] - s_.tiles_before[low];
    const int64_t in_expert = number - s_.tiles_before[low] * column_tiles_;
    const int64_t group = in_expert / (kGroup * column_tiles_);
    const int64_t in_group = in_expert - group * kGroup * column_tiles_;
    const int64_t left = expert_tiles - group * kGroup;
    const int64_t height = left < kGroup ? left : kGroup;
    const int first_row = static_cast<int>((group * kGroup + in_group % height) * kTileRows);
    tile.expert = first_expert_ + low;
    tile.column_tile = static_cast<int>(in_group / height);
    tile.row_begin = s_.row_begin[low] + first_row;
    const int rows_left = s_.row_begin[low + 1] - tile.row_begin;
    tile.row_count = rows_left < kTileRows ? rows_left : kTileRows;
    return true;
  }

 private:
  // Offsets from outside may be malformed: they are clamped to [0, rows] and made monotonic by a
  // running maximum, so that no row is read out of bounds or belongs to two experts.
  __device__ void scan_window() {
    int begin[kExpertsPerThread], running = 0;
    for (int i = 0; i < kExpertsPerThread; ++i) {
      // The offset that ends each expert of this thread.
      const int64_t e = first_expert_ + threadIdx.x * kExpertsPerThread + i + 1;
      const int offset = e <= experts_ ? offsets_[e] : 0;
      const int clamped = offset < 0 ? 0 : (offset > rows_ ? rows_ : offset);
      running = Max()(running, clamped);
      begin[i] = running;
    }
    int window_max, window_tiles;
    const int upto = block_scan<kThreads>(running, Max(), s_.warp_totals, window_max);
    if (first_expert_ == 0) {
      const int first = offsets_[0];
      max_before_ = first < 0 ? 0 : (first > rows_ ? rows_ : first);
    }
    // The exclusive scan is the left neighbour's inclusive one.
    int left = __shfl_up_sync(0xffffffffu, upto, 1);
    if (threadIdx.x % 32 == 0) {
      left = 0;
      for (int w = 0; w < static_cast<int>(threadIdx.x / 32); ++w) {
        left = Max()(left, s_.warp_totals[w]);
      }
    }
    left = Max()(left, max_before_);
    int tiles[kExpertsPerThread], sum = 0, row = left;
    for (int i = 0; i < kExpertsPerThread; ++i) {
      const int end = Max()(left, begin[i]);
      tiles[i] = (end - row + kTileRows - 1) / kTileRows;
      sum += tiles[i];
      begin[i] = row;
      row = end;
    }
    int before = block_scan<kThreads>(sum, Sum(), s_.warp_totals, window_tiles) - sum;
    before += tiles_before_;
    for (int i = 0; i < kExpertsPerThread; ++i) {
      const int slot = threadIdx.x * kExpertsPerThread + i;
      s_.row_begin[slot] = begin[i];
      s_.tiles_before[slot] = before;
      before += tiles[i];
    }
    max_before_ = Max()(max_before_, window_max);
    tiles_before_ += window_tiles;
    if (threadIdx.x == 0) {
      s_.row_begin[Storage::kWindow] = max_before_;
      s_.tiles_before[Storage::kWindow] = tiles_before_;
    }
    __syncthreads();
  }

  Storage& s_;
  const int32_t* offsets_;
  int64_t experts_;
  int rows_;
  int64_t column_tiles_;
  int64_t first_expert_ = 0;
  int max_before_ = 0;    // running maximum of the offsets before this window
  int tiles_before_ = 0;  // row tiles before this window
};

}  // namespace simple_moe
