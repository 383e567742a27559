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

// A block's share of the items: every gridDim.x-th, in sweeps over the columns of a group of row
// tiles, so that the rows and the columns in flight stay in L2. The next one is read ahead.
class Items {
 public:
  // Of `cols` columns each: half of them gates and half ups, where the activation is gated.
  __device__ Items(const GroupedGemm& p, int cols)
      : tiles_(p.row_tiles), number_(blockIdx.x), next_{} {
    const int width = is_gated(p.activation.kind) ? cols / 2 : cols;
    column_tiles_ = (static_cast<unsigned>(p.n) + width - 1) / width;
    row_tiles_ = tiles_.data[0].count;
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
  __device__ void read_ahead() {
    const unsigned group = tiles_.group;
    const unsigned first = number_ / (group * column_tiles_) * group;
    const unsigned in_group = number_ - first * column_tiles_;
    unsigned height = group;
    // Groups of one don't wait for the count.
    if (group > 1 && first < row_tiles_ && row_tiles_ - first < group) height = row_tiles_ - first;
    const unsigned row_tile = first + in_group % height;
    if (row_tile >= static_cast<unsigned>(tiles_.most)) return;
    const RowTile rows = tiles_.data[1 + row_tile];
    next_ = {rows.expert, rows.begin, rows.count, static_cast<int>(in_group / height)};
  }

  const RowTiles& tiles_;
  unsigned column_tiles_, row_tiles_;
  unsigned number_;
  Item next_;
};

}  // namespace simple_moe::cuda
