// How sort_by_expert cuts the slots into chunks.
#pragma once

#include <algorithm>

#include "shapes.h"

namespace simple_moe::cuda {

constexpr int kMaxWarps = 32;
constexpr int kSlotsOfLane = 8;  // in registers
constexpr int64_t kBatch = 32 * kSlotsOfLane;
constexpr int64_t kSlotsOfBlock = 128;  // that a block scatters, of few
constexpr int kChunksOfBlock = 2;       // of many
constexpr int64_t kMaxChunks = 256;

struct SortPlan {
  bool few;
  int chunks, chunks_of_block, blocks;
  int64_t length;  // slots of each chunk but the last, a multiple of 32
  // Where a chunk's slots of each expert go: in shared memory, if they fit there.
  bool places_in_smem;
  size_t smem;
};

inline SortPlan cut_slots(int64_t slots, int64_t experts, bool few) {
  // Besides its slots a chunk costs a count of each expert's.
  const int64_t least = few ? 32 : std::max(kBatch, experts / 8);
  const int64_t most = few ? kMaxWarps : kMaxChunks;
  const int chunks = std::clamp<int64_t>(ceil_div(slots, least), 1, most);
  const int of_block = few ? ceil_div(chunks, std::max<int64_t>(ceil_div(slots, kSlotsOfBlock), 1))
                           : std::min(chunks, kChunksOfBlock);
  const int blocks = ceil_div(chunks, of_block);
  // No fewer for more slots, or a last, shorter piece of an input would need counts that others
  // don't.
  const int64_t places = few ? chunks + std::min<int64_t>(chunks, kSlotsOfBlock / 32) : of_block;
  const size_t totals = kMaxWarps * sizeof(int64_t);
  const size_t smem = totals + sizeof(int32_t) * static_cast<size_t>((1 + places) * (experts + 1));
  const bool fit = smem <= device_info().smem_per_block;
  const int64_t length = ceil_div(ceil_div(slots, chunks), 32) * 32;
  return {few, chunks, of_block, blocks, length, fit, fit ? smem : totals};
}

inline SortPlan plan_sort(int64_t slots, int64_t experts) {
  const SortPlan plan = cut_slots(slots, experts, slots <= kMaxWarps * kBatch);
  return plan.few && !plan.places_in_smem ? cut_slots(slots, experts, false) : plan;
}

}  // namespace simple_moe::cuda
