// How sort_by_expert shares out the slots.
#pragma once

#include <algorithm>

#include "shapes.h"

namespace simple_moe::cuda {

constexpr int kMaxWarps = 32;
constexpr int kSlotsOfLane = 8;  // the most in registers

// ---- Few: one kernel ----

inline size_t few_smem(int64_t experts) {
  return sizeof(int32_t) * static_cast<size_t>(kMaxWarps + 2 * (experts + 1));
}
inline bool are_few(int64_t slots, int64_t experts) {
  return slots <= 32 * kSlotsOfLane * kMaxWarps &&
         few_smem(experts) <= device_info().smem_per_block;
}

// ---- Many: two kernels, chunks ----

constexpr int64_t kBatch = 32 * kSlotsOfLane;
constexpr int kChunksOfBlock = 2;
constexpr int64_t kMaxChunks = 256;

struct SortPlan {
  int chunks, chunks_of_block, blocks;
  int64_t length;  // slots of each chunk but the last, a multiple of 32
  // Where a chunk's slots of each expert go: in shared memory, if they fit there.
  bool places_in_smem;
  size_t smem;
};

inline SortPlan plan_sort(int64_t slots, int64_t experts) {
  // Besides its slots a chunk costs a count of each expert's.
  const int64_t least = std::max(kBatch, experts / 8);
  const int chunks = std::clamp<int64_t>(ceil_div(slots, least), 1, kMaxChunks);
  const int of_block = std::min(chunks, kChunksOfBlock);
  const int blocks = ceil_div(chunks, of_block);
  // No fewer for more slots, or a last, shorter piece of an input would need counts that others
  // don't.
  const size_t totals = kMaxWarps * sizeof(int64_t);
  const size_t smem =
      totals + sizeof(int32_t) * static_cast<size_t>((1 + of_block) * (experts + 1));
  const bool fit = smem <= device_info().smem_per_block;
  const int64_t length = ceil_div(ceil_div(slots, chunks), 32) * 32;
  return {chunks, of_block, blocks, length, fit, fit ? smem : totals};
}

}  // namespace simple_moe::cuda
