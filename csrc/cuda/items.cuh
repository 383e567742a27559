// Which output tiles a block works on: row tiles of the experts, from the device, times the
// columns.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace simple_moe::cuda {

// One output tile.
struct alignas(16) Item {
  int expert, row_begin, row_count, column_tile;
};

template <int kCols>
__host__ __device__ __forceinline__ int column_tiles(const GroupedGemm& p) {
  const int64_t width = is_gated(p.activation.kind) ? kCols / 2 : kCols;
  return static_cast<int>((p.n + width - 1) / width);
}

// A block's share of the items: every gridDim.x-th, in column sweeps over kGroup row tiles, so that
// the rows and the columns in flight stay in L2. The next one is read ahead.
class Items {
 public:
  __device__ Items(const GroupedGemm& p, int column_tiles)
      : tiles_(p.row_tiles.data),
        column_tiles_(column_tiles),
        row_tiles_(tiles_[0].count),
        number_(blockIdx.x),
        next_{} {
    read_ahead();
  }

  // False past the last.
  __device__ bool next(Item& item) {
    if (number_ >= row_tiles_ * column_tiles_) return false;
    item = next_;
    number_ += gridDim.x;
    read_ahead();
    return true;
  }

 private:
  static constexpr unsigned kGroup = 16;

  __device__ void read_ahead() {
    if (number_ >= row_tiles_ * column_tiles_) return;
    const unsigned first = number_ / (kGroup * column_tiles_) * kGroup;
    const unsigned in_group = number_ - first * column_tiles_;
    const unsigned left = row_tiles_ - first, height = left < kGroup ? left : kGroup;
    const RowTile rows = tiles_[1 + first + in_group % height];
    next_ = {rows.expert, rows.begin, rows.count, static_cast<int>(in_group / height)};
  }

  const RowTile* tiles_;
  unsigned column_tiles_, row_tiles_;
  unsigned number_;
  Item next_;
};

}  // namespace simple_moe::cuda
