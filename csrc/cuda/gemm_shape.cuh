// What the parts of grouped_gemm's kernel share: the sizes that follow from a tile's shape, where
// vectors lie in shared memory, which row of b a tile's line is.
#pragma once

#include "epilogue.cuh"
#include "items.cuh"
#include "shapes.h"

namespace simple_moe::cuda {

// What follows from a shape.
template <GemmTile kShape>
struct GemmShape {
  static constexpr GemmTile kTile = kShape;
  static constexpr bool kWgmma = kShape.wgmma, kReadsOn = kShape.reads_on;
  static constexpr bool kClaimsLate = kShape.claims_late();
  static constexpr int kBehind = kShape.behind(), kAhead = kShape.stages - kBehind;
  static constexpr int kRows = kShape.rows, kCols = kShape.cols, kDepth = kShape.depth;
  static constexpr int kStages = kShape.stages, kWarpRows = kShape.warp_rows;
  static constexpr int kWarpCols = kShape.warp_cols, kThreads = 32 * kShape.warps();
  static constexpr int kBlocks = kShape.blocks, kBytes = kShape.bytes(), kQueue = kShape.queue();
  static constexpr int kRowsOfWarp = kRows / kWarpRows, kColsOfWarp = kCols / kWarpCols;
  static constexpr int kI = kRowsOfWarp / 16, kJ = kColsOfWarp / 8;  // accumulators of 16 x 8
  // Vectors of a line; those of them that lanes side by side copy at once; a lane's.
  static constexpr int kVectors = kDepth / kVector, kAcross = kVectors < 8 ? kVectors : 8;
  static constexpr int kPerLine = kVectors / kAcross;
  static constexpr int kLineBytes = kDepth * 2;
  static constexpr int kABytes = kRows * kLineBytes, kSlotBytes = kShape.slot_bytes();
  // Lines that all threads copy at once.
  static constexpr int kPass = kThreads / kAcross, kPassBytes = kPass * kLineBytes;
  static constexpr int kPassesA = (kRows + kPass - 1) / kPass,
                       kPassesB = (kCols + kPass - 1) / kPass;
  static constexpr int kStagedCols = kShape.staged_cols(), kStagedBytes = kShape.staged_bytes();
  static constexpr int kStagedAt = kStages * kSlotBytes;
  static constexpr int kQueueAt = kStagedAt + kShape.staged_beside();
  static_assert(kRowsOfWarp % 16 == 0 && kColsOfWarp % 16 == 0, "fragments are 16 x 16");
  static_assert(kPass % 16 == 0, "a thread copies gates or ups, not both");
  static_assert(!kWgmma || kShape.warps() * kStagedBytes <= kSlotBytes, "staged in a slot");
  static_assert(kDepth % 32 == 0, "fragments of b take turns in two sets of registers");

  // Where vector `vector` of a line lies. Lines 8 apart are permuted alike, so that fragments of
  // further lines lie at a fixed distance, and of the next 16 of k at a fixed XOR.
  __device__ static uint32_t place(int line, int vector) {
    constexpr int kLinesOf128Bytes = kVectors < 8 ? 8 / kVectors : 1;
    return line * kLineBytes + ((vector ^ (line / kLinesOf128Bytes % (8 / kLinesOf128Bytes))) << 4);
  }
};

// The output column that a tile's line is for: 8 gates and their 8 ups take turns.
template <typename Shape>
__device__ __forceinline__ int column_of_line(const GroupedGemm& p, const Item& item, int line) {
  return is_gated(p.activation.kind)
             ? item.column_tile * (Shape::kCols / 2) + line / 16 * 8 + line % 8
             : item.column_tile * Shape::kCols + line;
}

// The row of b behind a tile's line. There is none past the last column.
template <typename Shape>
__device__ __forceinline__ int64_t row_of_line(const GroupedGemm& p, const Item& item, int line) {
  const int column = column_of_line<Shape>(p, item, line);
  return is_gated(p.activation.kind) ? branch_row(p, column, line % 16 >= 8) : column;
}

template <typename Shape>
using Queue = ItemQueue<Shape::kQueue, Shape::kClaimsLate>;

}  // namespace simple_moe::cuda
