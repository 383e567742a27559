// The experts' row tiles from their offsets, by one block: no host ever learns the routing.
//
// Schedule: a thread takes an expert. Two scans over the block, of the offsets' running maximum and
// of the experts' numbers of tiles, then every thread writes its expert's. More experts than
// threads come in windows, one after another.
#pragma once

#include "block_scan.cuh"
#include "params.h"

namespace simple_moe {

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
      to[first + place] = {expert, begin + first * tiles.height, left < all ? left : all,
                           static_cast<uint16_t>(place), static_cast<uint16_t>(in_group)};
    }
  }
}

template <int kThreads>
struct RowTilesStorage {
  int end[kThreads];  // of an expert of this window
  int warp_totals[kThreads / 32];
};

// All threads of the block. Offsets from outside may be malformed: they are clamped to [0, rows]
// and made monotonic by a running maximum, so that no row is read out of bounds or belongs to two
// experts.
template <int kThreads>
__device__ __forceinline__ void lay_row_tiles(const int32_t* offsets, int64_t experts, int64_t rows,
                                              const RowTiles& tiles, RowTilesStorage<kThreads>& s) {
  const int thread = threadIdx.x, height = tiles.height;
  const auto clamped = [&](int64_t e) {
    const int64_t offset = offsets[e];
    return static_cast<int>(offset < 0 ? 0 : (offset > rows ? rows : offset));
  };
  int reached = clamped(0), tiles_before = 0;  // before this window
  for (int64_t first = 0; first < experts; first += kThreads) {
    const int64_t expert = first + thread;
    int window_end, window_tiles;
    const int offset = expert < experts ? clamped(expert + 1) : 0;
    const int end = Max()(reached, block_scan(offset, Max(), s.warp_totals, window_end));
    s.end[thread] = end;
    __syncthreads();
    const int begin = thread == 0 ? reached : s.end[thread - 1];
    const int rows_here = end - begin;
    const int count = rows_here / height + (rows_here % height != 0);
    const int before = block_scan(count, Sum(), s.warp_totals, window_tiles) - count;
    write_row_tiles(tiles, static_cast<int>(expert), begin, rows_here,
                    tiles.data() + tiles_before + before);
    reached = Max()(reached, window_end);
    tiles_before += window_tiles;
  }
  if (thread == 0) *tiles.head = {tiles_before, {}};
}

}  // namespace simple_moe
