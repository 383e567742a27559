// The experts' row tiles from their offsets, by one block: no host ever learns the routing.
//
// Schedule: a thread takes an expert. Two scans over the block, of the offsets' running maximum and
// of the experts' numbers of tiles, then a warp takes an expert and writes its tiles, a lane each.
// More experts than threads come in windows, one after another.
#pragma once

#include "block_scan.cuh"
#include "params.h"

namespace simple_moe {

// Tile `number` of an expert with so many rows. Its tiles are cut into groups as equal as can be.
__device__ __forceinline__ RowTile row_tile_of(const RowTiles& tiles, int expert, int begin,
                                               int rows, int number) {
  const int count = (rows + tiles.height - 1) / tiles.height;
  const int groups = (count + tiles.group - 1) / tiles.group;
  const int most = (count + groups - 1) / groups, place = number % most, first = number - place;
  const int in_group = count - first < most ? count - first : most;
  const int left = rows - first * tiles.height, all = in_group * tiles.height;
  return {expert, begin + first * tiles.height, left < all ? left : all,
          static_cast<uint16_t>(place), static_cast<uint16_t>(in_group)};
}

template <int kThreads>
struct RowTilesStorage {
  int begin[kThreads], end[kThreads];  // rows of an expert of this window
  int tiles_before[kThreads];          // in this window
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
    s.begin[thread] = begin;
    s.tiles_before[thread] = block_scan(count, Sum(), s.warp_totals, window_tiles) - count;
    __syncthreads();
    for (int e = thread / 32; e < kThreads && first + e < experts; e += kThreads / 32) {
      const int rows_of_e = s.end[e] - s.begin[e];
      for (int tile = thread % 32; tile * int64_t{height} < rows_of_e; tile += 32) {
        tiles.data()[tiles_before + s.tiles_before[e] + tile] =
            row_tile_of(tiles, static_cast<int>(first + e), s.begin[e], rows_of_e, tile);
      }
    }
    reached = Max()(reached, window_end);
    tiles_before += window_tiles;
  }
  if (thread == 0) *tiles.head = {tiles_before, {}};
}

}  // namespace simple_moe
