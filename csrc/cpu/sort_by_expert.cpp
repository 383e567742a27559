// sort_by_expert on the CPU: a stable counting sort of the slots by local expert.
//
// One thread: two passes over the ids take nanoseconds a slot, the products that follow them
// microseconds.
#include <algorithm>
#include <cstdint>

#include "common.h"
#include "primitives.h"

namespace simple_moe::cpu {
namespace {

template <class Id>
void sort_ids(const SortByExpert& p, const Id* ids) {
  const int64_t experts = p.experts;
  // The local expert of a slot, or -1. Compared before the subtraction, which might overflow.
  const auto local_expert = [&](int64_t slot) -> int64_t {
    const int64_t id = ids[slot];
    if (id < p.expert_offset) return -1;
    const uint64_t local = static_cast<uint64_t>(id) - static_cast<uint64_t>(p.expert_offset);
    return local < static_cast<uint64_t>(experts) ? static_cast<int64_t>(local) : -1;
  };

  int32_t* const cursors = p.expert_offsets;
  std::fill(cursors, cursors + experts + 1, 0);
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const int64_t expert = local_expert(slot);
    if (expert >= 0) ++cursors[expert + 1];
  }
  for (int64_t e = 0; e < experts; ++e) cursors[e + 1] += cursors[e];

  int32_t not_held_row = cursors[experts];
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const int64_t expert = local_expert(slot);
    const int32_t row = expert >= 0 ? cursors[expert]++ : not_held_row++;
    if (p.sorted_slots) p.sorted_slots[row] = static_cast<int32_t>(slot);
    if (p.slot_rows) p.slot_rows[slot] = expert >= 0 ? row : -1;
    if (p.source_rows) {
      p.source_rows[row] = static_cast<int32_t>(slot / p.topk);
      p.row_weights[row] = load(p.topk_weights, slot);
    }
  }
  // Every cursor has moved from its expert's first row to the next expert's.
  std::copy_backward(cursors, cursors + experts, cursors + experts + 1);
  cursors[0] = 0;
}

}  // namespace

void sort_by_expert(const SortByExpert& p) {
  if (p.ids_are_int64) {
    sort_ids(p, static_cast<const int64_t*>(p.topk_ids));
  } else {
    sort_ids(p, static_cast<const int32_t*>(p.topk_ids));
  }
}

}  // namespace simple_moe::cpu
