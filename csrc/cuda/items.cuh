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

// A block's share of the items of kCols columns: every gridDim.x-th, in sweeps over the columns of
// a group of row tiles, so that the rows and the columns in flight stay in L2. The next one is read
// ahead.
template <int kCols>
class Items {
 public:
  // Where only `a` is new this comes before the kernel waits: the row tiles' writer was waited for
  // by the kernel before, which nothing here has read them ahead of.
  __device__ explicit Items(const GroupedGemm& p)
      : p_(p), row_tiles_(p.row_tiles.data[0].count), number_(blockIdx.x), next_{} {
    read_ahead();
  }

  // False past the last.
  __device__ bool next(Item& item) {
    if (number_ >= row_tiles_ * column_tiles()) return false;
    item = next_;
    number_ += gridDim.x;
    read_ahead();
    return true;
  }

 private:
  __device__ unsigned column_tiles() const {
    const unsigned width = is_gated(p_.activation.kind) ? kCols / 2 : kCols;
    return (static_cast<unsigned>(p_.n) + width - 1) / width;
  }

  __device__ void read_ahead() {
    const RowTiles& tiles = p_.row_tiles;
    const unsigned group = tiles.group, columns = column_tiles();
    const unsigned first = number_ / (group * columns) * group;
    const unsigned in_group = number_ - first * columns;
    unsigned height = group;
    // Groups of one don't wait for the count.
    if (group > 1 && first < row_tiles_ && row_tiles_ - first < group) height = row_tiles_ - first;
    const unsigned row_tile = first + in_group % height;
    if (row_tile >= static_cast<unsigned>(tiles.most)) return;
    const RowTile rows = tiles.data[1 + row_tile];
    next_ = {rows.expert, rows.begin, rows.count, static_cast<int>(in_group / height)};
  }

  const GroupedGemm& p_;
  unsigned row_tiles_, number_;
  Item next_;
};

}  // namespace simple_moe::cuda
