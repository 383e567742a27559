// Which tile a product gets: a small model of the machine, from what the host knows. No tuning
// files, no trial runs, and the routing is never read.
//
// An expert's mean number of rows decides the height. Few rows: the product waits for the weights,
// and what counts is bytes in flight and enough tiles for every multiprocessor; padding is free.
// Many rows: it waits for the tensor cores, and what counts is how often a byte that came from L2
// is used, so the largest tile that fits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"
#include "params.h"

namespace simple_moe::cuda {

// rows x cols of output, depth of k a step, a ring of `stages` steps, warps in a grid, blocks a
// multiprocessor.
struct GemmTile {
  int rows, cols, depth, stages, warp_rows, warp_cols, blocks;

  constexpr int warps() const { return warp_rows * warp_cols; }
  constexpr int slot_bytes() const { return (rows + cols) * depth * 2; }
  // 16 rows of a warp's output, padded by 16 bytes against bank conflicts.
  constexpr int staged_bytes() const { return 16 * (cols / warp_cols + 8) * 2; }
  // Items whose copies have begun and whose products have not ended.
  constexpr int queue() const { return stages + 2; }
  constexpr int bytes() const {
    return stages * slot_bytes() + warps() * staged_bytes() + queue() * 16;
  }
};

// Of one height the widest first.
inline constexpr GemmTile kShapes[] = {
    {16, 128, 64, 4, 1, 4, 3},  {16, 64, 64, 6, 1, 4, 3},   {32, 128, 64, 4, 1, 4, 2},
    {32, 64, 64, 5, 1, 4, 3},   {64, 128, 64, 3, 2, 2, 2},  {128, 256, 64, 4, 2, 4, 1},
    {128, 256, 64, 3, 2, 4, 1}, {128, 128, 64, 3, 2, 2, 2}, {128, 128, 32, 4, 2, 2, 1},
};
inline constexpr int kShapeCount = sizeof(kShapes) / sizeof(GemmTile);

// What of a product the choice depends on.
struct ProductSize {
  int64_t rows, experts, n, k;
  bool gated;
};

inline int64_t column_tiles(int64_t n, bool gated, int cols) {
  const int64_t width = gated ? cols / 2 : cols;
  return (n + width - 1) / width;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The height for a layer's products, the least of whose columns are `columns`; the sweeps over
// them.
inline RowTiles plan_row_tiles(int64_t rows, int64_t experts, int64_t columns,
                               const DeviceInfo& device) {
  const int64_t active = rows < experts ? rows : experts, mean = ceil_div(rows, active);
  RowTiles tiles;
  const auto most = [&](int height) { return rows / height + active; };
  tiles.height = mean <= 12 ? 16 : mean <= 24 ? 32 : mean <= 64 ? 64 : 128;
  // Lower ones where there would be too few for the multiprocessors.
  while (tiles.height > 16 &&
         most(tiles.height) * ceil_div(columns, tiles.height > 32 ? 128 : 64) < device.sm_count) {
    tiles.height /= 2;
  }
  // No host knows the routing: every expert may end with a tile of its own.
  tiles.most = static_cast<int>(most(tiles.height));
  // A sweep over the columns takes the tiles of one expert or so, which share its weights; of the
  // high ones a few, whose rows stay in L2.
  const int64_t of_expert = ceil_div(mean, tiles.height);
  tiles.group = static_cast<int>(of_expert < 16 ? of_expert : 16);
  if (tiles.height == 128 && tiles.group < 4) tiles.group = 4;
  return tiles;
}

// The place in kShapes. Every GPU from SM80 on has the 99 KB that one shape of each height needs.
inline int choose_shape(const RowTiles& tiles, const ProductSize& size, const DeviceInfo& device) {
  int chosen = -1;
  for (int i = 0; i < kShapeCount; ++i) {
    const GemmTile& s = kShapes[i];
    if (s.rows != tiles.height || s.bytes() > static_cast<int>(device.smem_per_block)) continue;
    const int64_t fit = device.smem_per_sm / (s.bytes() + 1024);
    const int64_t blocks = device.sm_count * (fit < s.blocks ? fit : s.blocks);
    const int64_t items = tiles.most * column_tiles(size.n, size.gated, s.cols);
    chosen = i;
    if (s.rows <= 32) {
      // Two rounds of the low tiles hide the end of each.
      if (items >= (s.rows == 16 ? 2 * blocks : device.sm_count)) break;
    } else if (s.cols == 256) {
      // One block alone doesn't hide the end of a tile: only where k is long. Where two of the
      // smaller ones don't fit on a multiprocessor, this is still the better one.
      const bool two_smaller_fit = device.smem_per_sm >= 2 * (kShapes[7].bytes() + 1024);
      if (size.k >= 4096 || !two_smaller_fit) break;
    } else {
      break;
    }
  }
  return chosen;
}

}  // namespace simple_moe::cuda
