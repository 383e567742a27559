// How high a layer's row tiles are, and which tile mma.sync's product gets: a small model of the
// machine, from what the host knows. No tuning files, no trial runs, and the routing is never read.
//
// An expert's mean number of rows decides the height. Few rows: the product waits for the weights,
// and what counts is bytes in flight and enough tiles for every multiprocessor; padding is free.
// Many rows: it waits for the tensor cores, and what counts is how often a byte that came from L2
// is used, so the largest tile that fits; by wgmma the highest where most experts then need one
// tile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device.h"
#include "params.h"

namespace simple_moe::cuda {

// rows x cols of output, depth of k a step, a ring of `stages` steps, warps in a grid, blocks a
// multiprocessor.
struct GemmTile {
  int rows, cols, depth, stages, warp_rows, warp_cols, blocks;
  bool wgmma = false;    // else mma.sync
  bool reads_on = true;  // L2 fetches 256 bytes where 128 are asked for

  constexpr int warps() const { return warp_rows * warp_cols; }
  constexpr int slot_bytes() const { return (rows + cols) * depth * 2; }
  // 16 rows of a warp's results, up to 64 columns of them, padded by 16 bytes against bank
  // conflicts. wgmma's go into the ring: its tiles leave no room for all of them beside it.
  constexpr int staged_cols() const { return cols / warp_cols < 64 ? cols / warp_cols : 64; }
  constexpr int staged_bytes() const { return 16 * (staged_cols() * 2 + 16); }
  constexpr int staged_beside() const { return wgmma ? 0 : warps() * staged_bytes(); }
  // Items whose copies have begun and whose products have not ended, and the next.
  constexpr int queue() const { return stages + 3; }
  // So many steps after its product was begun a slot is filled again: wgmma's ends a step later.
  constexpr int behind() const { return wgmma ? 2 : 1; }
  // Whether items may be claimed in the last steps of those before: several tiles share a weight
  // where an expert has many rows, and for these are the high ones.
  constexpr bool claims_late() const { return rows >= 128; }
  constexpr int bytes() const { return stages * slot_bytes() + staged_beside() + queue() * 16; }
};

constexpr GemmTile without_reading_on(GemmTile tile) {
  tile.reads_on = false;
  return tile;
}

// Of one height the best first, where it fits and there is enough to do.
inline constexpr GemmTile kShapes[] = {
    {160, 256, 64, 4, 2, 4, 1},
    {160, 256, 64, 3, 2, 4, 1},
    {160, 128, 64, 5, 2, 4, 1},
    {128, 256, 64, 3, 2, 4, 1},
    {128, 128, 32, 4, 2, 2, 2},
    without_reading_on({64, 128, 64, 4, 1, 4, 2}),
    {64, 128, 64, 4, 1, 4, 2},
    {64, 128, 64, 3, 1, 4, 2},
    without_reading_on({32, 128, 64, 4, 1, 4, 2}),
    {32, 128, 64, 4, 1, 4, 2},
    {32, 64, 64, 5, 1, 4, 3},
    without_reading_on({16, 128, 64, 5, 1, 4, 2}),
    {16, 128, 64, 5, 1, 4, 2},
    without_reading_on({16, 64, 128, 5, 1, 4, 2}),
    {16, 64, 128, 5, 1, 4, 2},
    {16, 64, 64, 6, 1, 4, 3},
};
inline constexpr int kShapeCount = sizeof(kShapes) / sizeof(GemmTile);

// Steps before a tile's end: in the first of them the next is claimed, and so on (ItemQueue).
inline constexpr int kClaimAt = 5, kLookAt = 3, kFindAt = 1;

// The k of a tile from which on the next is claimed late; all of its k, if it is claimed early. A
// short tile's is: the steps of a claim take longer, which would be too great a part of it.
inline int64_t choose_claim(const GemmTile& tile, int64_t k) {
  return tile.claims_late() && k >= 24 * tile.depth ? k - kClaimAt * tile.depth : k;
}

// What of a product the choice depends on.
struct ProductSize {
  int64_t rows, experts, n, k;
  bool gated, is_second;
};

inline ProductSize size_of(const GroupedGemm& p) {
  return {p.rows, p.experts, p.n << p.split_log2, p.k, is_gated(p.activation.kind), p.is_second};
}

inline int64_t column_tiles(int64_t n, bool gated, int cols) {
  const int64_t width = gated ? cols / 2 : cols;
  return (n + width - 1) / width;
}

// Of a product, each part of a split k for itself.
inline int64_t column_tiles(const GroupedGemm& p, int cols) {
  return column_tiles(p.n, is_gated(p.activation.kind), cols) << p.split_log2;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides numbers below 2^31 on the GPU by one that the host knows, with a multiplication and a
// shift: n / d is n * ceil(2^shift / d) >> shift for a 2^shift of 2^31 * d or more.
struct Divisor {
  explicit Divisor(int64_t d) : value(static_cast<uint32_t>(d)) {
    while (uint64_t{1} << shift < uint64_t{value} << 31) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  SIMPLE_MOE_HOST_DEVICE uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * multiplier >> shift);
  }

  uint32_t value, multiplier;
  int shift = 31;
};

// How many of a shape's blocks run on a multiprocessor at once.
inline int64_t resident_blocks(const GemmTile& tile, const DeviceInfo& device) {
  if (tile.bytes() > static_cast<int64_t>(device.smem_per_block)) return 0;
  const int64_t fit = static_cast<int64_t>(device.smem_per_sm) / (tile.bytes() + 1024);
  return fit < tile.blocks ? fit : tile.blocks;
}

// Experts that have rows if any can, and how many each has on average.
inline int64_t active_experts(int64_t rows, int64_t experts) {
  return rows < experts ? rows : experts;
}
inline int64_t mean_rows(int64_t rows, int64_t experts) {
  return ceil_div(rows, active_experts(rows, experts));
}

// The fewest columns of a tile of that height; the highest is wgmma's.
inline int narrowest(int height) {
  int cols = 0;
  for (const GemmTile& tile : kShapes) {
    if (tile.rows == height && (cols == 0 || tile.cols < cols)) cols = tile.cols;
  }
  return cols > 0 ? cols : 192;
}

// Whether a tile of that height fits.
inline bool fits(int height, const DeviceInfo& device) {
  for (const GemmTile& tile : kShapes) {
    if (tile.rows == height && resident_blocks(tile, device) > 0) return true;
  }
  return false;
}

// The height for a layer's two products, of so many columns; the sweeps over them; how k of the
// second, which is the first's columns, is split, if it may be. `wgmma`: for the sm90 backend,
// whose tiles have 64 rows a warpgroup.
inline RowTiles plan_row_tiles(int64_t rows, int64_t experts, int64_t first_n, int64_t second_n,
                               bool may_split, bool wgmma, const DeviceInfo& device) {
  const int64_t active = active_experts(rows, experts), mean = mean_rows(rows, experts);
  RowTiles tiles;
  const auto most = [&](int height) { return rows / height + active; };
  // So much higher than the mean that most experts need one tile, as long as padding is cheap.
  tiles.height = mean <= 12 ? 16 : mean <= 24 ? 32 : mean <= 48 ? 64 : 128;
  if (wgmma) {
    if (mean > 96 && mean <= 176) tiles.height = 192;
  } else if (mean > 48 && fits(160, device)) {
    tiles.height = 160;
  }
  // Where there would be too few for the multiprocessors k is split, in long parts, whose sums in
  // float32 take no more memory than the first product's two branches would. A multiprocessor has
  // room for two low tiles; of the lowest one is enough, whose sums cost more than waiting for
  // memory. Both backends split alike.
  const int low = tiles.height < 64 ? tiles.height : 64;
  const int64_t enough = low > 16 ? 2 * device.sm_count : device.sm_count;
  const auto items = [&](int height) {
    const int64_t columns = second_n << tiles.split_log2;
    return most(height) * ceil_div(columns < first_n ? columns : first_n, narrowest(height));
  };
  while (may_split && items(low) < enough && second_n << (tiles.split_log2 + 1) <= first_n &&
         first_n >> (tiles.split_log2 + 1) >= 256 && (first_n >> tiles.split_log2) % 16 == 0) {
    ++tiles.split_log2;
  }
  // And tiles are lower: high ones, which use a weight more often, where they would leave half of
  // the multiprocessors idle, others where they would leave one.
  while (tiles.height > 16 && (tiles.height > 64 ? 2 : 1) * items(tiles.height) < device.sm_count) {
    tiles.height = tiles.height > 128 ? 128 : tiles.height > 64 ? 64 : tiles.height / 2;
  }
  // What two rows of warps take at once, or a warpgroup; it divides the height.
  tiles.unit_log2 = wgmma && tiles.height >= 128 ? 6 : tiles.height < 32 ? 4 : 5;
  // No host knows the routing: every expert may end with a tile of its own.
  tiles.most = static_cast<int>(most(tiles.height));
  // A sweep over the columns takes all of an expert's tiles, which share its weights, or so many
  // that their rows and a column of each multiprocessor's stay in L2.
  tiles.group = 16;
  // Where most blocks have one item of the second product there is nothing to overlap, and a count
  // through L2 takes longer than the hardware's word.
  tiles.overlap = device.early_launch && items(tiles.height) >= 2 * device.sm_count;
  return tiles;
}

// Whether a product takes less time in tiles of some columns than in others as high, a
// multiprocessor having one: they go over the GPU in few rounds, and the last may leave most of it
// idle. So what counts is the rounds times what one takes, for which its rows count as 64 columns.
inline bool is_faster(const GemmTile& tile, const GemmTile& other, const ProductSize& size,
                      const DeviceInfo& device) {
  const auto time = [&](const GemmTile& of) {
    const int64_t tiles_of_expert = ceil_div(mean_rows(size.rows, size.experts), of.rows);
    const int64_t expected = active_experts(size.rows, size.experts) * tiles_of_expert *
                             column_tiles(size.n, size.gated, of.cols);
    return ceil_div(expected, device.sm_count) * (of.cols + 64);
  };
  return time(tile) < time(other);
}

// Whether a product has enough to do for a shape.
inline bool suits(const GemmTile& tile, const RowTiles& tiles, const ProductSize& size,
                  const DeviceInfo& device) {
  const int64_t blocks = device.sm_count * resident_blocks(tile, device);
  const int64_t items = tiles.most * column_tiles(size.n, size.gated, tile.cols);
  const int least = narrowest(tile.rows);
  if (tile.cols == least) return true;
  // Of the lowest tiles wide ones that fill the GPU: for the second product, and for the first
  // where several tiles may share a weight, and each reads it from L2. (By measurement: NOTES.md.)
  if (tile.rows == 16) {
    return items >= blocks && (size.is_second || mean_rows(size.rows, size.experts) > 8);
  }
  GemmTile narrow = tile;
  narrow.cols = least;
  // Where an expert mostly has one tile its weights come from memory: more in flight.
  if (tile.stages > 3 && mean_rows(size.rows, size.experts) > tile.rows) return false;
  if (tile.rows > 128) return !is_faster(narrow, tile, size, device);
  return items >= device.sm_count;
}

// What a block of grouped_gemv takes: output columns, and threads for them.
struct GemvTile {
  int cols, threads;
};
inline constexpr int kMostGemvThreads = 256;
inline constexpr int kMostSlotsInOrder = 16;  // of a token, a warp each

// Whether few tokens' slots go by themselves. It saves the sort, the combine and some of the
// products' starts and ends, a few microseconds; but a weight that two tokens' slots want is read
// for both. So one token always, whose experts differ; more where few experts coincide and not much
// is read in all.
inline bool slots_go_by_themselves(const ProductSize& size, int64_t tokens) {
  const int64_t read = size.rows * size.n * size.k * (size.gated ? 4 : 2);  // bytes
  return tokens == 1 || (4 * size.rows <= size.experts && read <= int64_t{400} << 20);
}

// The most columns that leave each multiprocessor two blocks, and threads for two rounds of loads
// of the widest.
inline GemvTile choose_gemv_tile(int64_t out_rows, int64_t n, int64_t vectors_of_output, bool gated,
                                 const DeviceInfo& device) {
  const int64_t threads = 32 * ceil_div(vectors_of_output, 64);
  return {!gated && out_rows * n > 16 * device.sm_count ? 8 : 4,
          threads < kMostGemvThreads ? static_cast<int>(threads) : kMostGemvThreads};
}

// In the tiles' order: the lines of weights that a warp takes, which are 8 columns', or 4 columns'
// gates and ups by turns; the k of a turn, and its bytes with the row of `a`.
inline constexpr int kLines = 8, kTurn = 128, kTurnBytes = (kLines + 1) * kTurn * 2;

struct InOrderTile {
  int64_t blocks;
  int warps, turns;  // of a block; in flight, of a warp: 2 or 3
  size_t bytes;
};

// For so many groups of columns, each with a warp for each of its slots. A block has one group; or,
// of one slot each, two, and where those of a multiprocessor don't fit one block, an equal part of
// them. At most half of a warp's turns are in flight, for weights that the second product asks for
// early delay the first's. A block asks for as much memory as its share of a multiprocessor, if its
// turns take less. Else some multiprocessors would get more blocks of a kernel than others, and
// memory would wait for these in the end. (By measurement: NOTES.md.)
inline InOrderTile choose_in_order_tile(int64_t groups, int64_t slots, int64_t k,
                                        const DeviceInfo& device) {
  const int64_t of_sm = ceil_div(groups, device.sm_count), most = kMostSlotsInOrder;
  const int64_t at_once = slots > 1      ? 1
                          : of_sm > most ? ceil_div(of_sm, ceil_div(of_sm, most))
                                         : std::min<int64_t>(of_sm, 2);
  const int64_t warps = at_once * slots, blocks = ceil_div(groups, at_once);
  const auto wanted = [&](int turns) { return warps * (turns * kTurnBytes + kLines * 4); };
  // It is given out 128 bytes at a time, 1 KB of each block's being CUDA's own.
  const auto share = [&](int64_t blocks_of_sm) {
    const int64_t bytes = static_cast<int64_t>(device.smem_per_sm) / blocks_of_sm / 128 * 128;
    return std::min(bytes - 1024, static_cast<int64_t>(device.smem_per_block));
  };
  const int turns = wanted(3) <= share(2) && k >= 2 * 3 * kTurn ? 3 : 2;
  const int64_t bytes = std::max(wanted(turns), share(ceil_div(blocks, device.sm_count)));
  return {blocks, static_cast<int>(warps), turns, static_cast<size_t>(bytes)};
}

// The place in kShapes. Every GPU from SM80 on has the 99 KB that some shape of each height needs.
inline int choose_shape(const RowTiles& tiles, const ProductSize& size, const DeviceInfo& device) {
  int fallback = -1;
  for (int i = 0; i < kShapeCount; ++i) {
    const GemmTile& tile = kShapes[i];
    const int64_t blocks = resident_blocks(tile, device);
    if (tile.rows != tiles.height || blocks == 0) continue;
    // What few rows have asked for keeps even an H200's memory busy, and what L2 asks for besides
    // takes 3 % of its rate. An H100's gains up to 6 % by it, and so do many rows on either, which
    // ask by fits and starts.
    if (!tile.reads_on && device.memory_gbps < 4000) continue;
    const bool all_fit = blocks >= (tile.blocks < 2 ? tile.blocks : 2);
    if (all_fit && suits(tile, tiles, size, device)) return i;
    if (fallback < 0 || !suits(kShapes[fallback], tiles, size, device)) fallback = i;
  }
  return fallback;
}

}  // namespace simple_moe::cuda
