// An expert's row tiles: no host ever learns the routing.
#pragma once

#include "params.h"

namespace simple_moe {

// An expert's offset from outside, clamped to [0, rows], so that no row is read out of bounds.
__device__ __forceinline__ int clamped_offset(const int32_t* offsets, int64_t e, int64_t rows) {
  const int64_t offset = offsets[e];
  return static_cast<int>(offset < 0 ? 0 : (offset > rows ? rows : offset));
}

// Writes the tiles of an expert with so many rows, in groups as equal as can be. By one thread: a
// tile takes a few cycles here, and thousands in the products.
__device__ __forceinline__ void write_row_tiles(const RowTiles& tiles, int expert, int begin,
                                                int rows, RowTile* to) {
  const int count = rows / tiles.height + (rows % tiles.height != 0);
  const int groups = (count + tiles.group - 1) / tiles.group;
  const int most = groups > 1 ? (count + groups - 1) / groups : count;
  for (int first = 0; first < count; first += most) {
    const int in_group = count - first < most ? count - first : most;
    const int left = rows - first * tiles.height, all = in_group * tiles.height;
    for (int place = 0; place < in_group; ++place) {
      if (tiles.progress) tiles.progress[begin + (first + place) * tiles.height] = 0;
      to[first + place] = {expert, begin + first * tiles.height, left < all ? left : all,
                           static_cast<uint16_t>(place), static_cast<uint16_t>(in_group)};
    }
  }
}

}  // namespace simple_moe
