// An expert's row tiles: no host ever learns the routing.
#pragma once

#include "params.h"

namespace simple_moe {

// An expert's offset from outside, clamped to [0, rows], so that no row is read out of bounds.
__device__ __forceinline__ int clamped_offset(const int32_t* offsets, int64_t e, int64_t rows) {
  return static_cast<int>(min(max(int64_t{offsets[e]}, int64_t{0}), rows));
}

// Writes the `count` tiles of an expert with so many rows, from that number on, in groups as equal
// as can be. By one thread: a tile takes a few cycles here, and thousands in the products; but a
// division shows where tokens are few, and most experts there need none.
__device__ __forceinline__ void write_row_tiles(const RowTiles& tiles, int expert, int begin,
                                                int rows, int count, int64_t number) {
  const int groups = (count + tiles.group - 1) / tiles.group;
  const int most = count > tiles.group ? (count + groups - 1) / groups : count;
  // Unsigned: there may be nearly 2^31.
  const int all = (0u + rows + (1 << tiles.unit_log2) - 1) >> tiles.unit_log2;
  const int units = count == all ? 1 : count == 1 ? all : all / count, longer = all - count * units;
  // Of the expert's rows, those before a tile.
  const auto before = [&](int i) {
    return i < count ? (i * units + min(i, longer)) << tiles.unit_log2 : rows;
  };
  for (int i = 0, first = 0; i < count; ++i) {
    if (i == first + most) first = i;
    const int end = min(first + most, count);
    RowTile tile{expert, begin + before(first), before(end) - before(first)};
    tile.place = i - first;
    tile.tiles = end - first;
    tile.units = units;
    tile.longer = min(max(longer - first, 0), end - first);
    if (tiles.progress) tiles.progress[begin + before(i)] = 0;
    tiles.data()[number + i] = tile;
  }
}

}  // namespace simple_moe
