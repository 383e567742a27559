// sort_by_expert on the CPU: a stable counting sort of the slots by local expert.
//
// One thread: two passes over the ids take nanoseconds a slot, the products that follow them
// microseconds.
#include <algorithm>
#include <cstdint>

#include "common.h"
#include "primitives.h"

namespace simple_moe::cpu {

void sort_by_expert(const SortByExpert& p) {
  const int64_t experts = p.ids.experts;
  int32_t* const cursors = p.expert_offsets;
  std::fill(cursors, cursors + experts + 1, 0);
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const int64_t expert = local_expert(p.ids, slot);
    if (expert < experts) ++cursors[expert + 1];
  }
  for (int64_t e = 0; e < experts; ++e) cursors[e + 1] += cursors[e];

  int32_t not_held_row = cursors[experts];
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const int64_t expert = local_expert(p.ids, slot);
    const int32_t row = expert < experts ? cursors[expert]++ : not_held_row++;
    p.sorted_slots[row] = static_cast<int32_t>(slot);
    if (p.source_rows) {
      p.source_rows[row] = static_cast<int32_t>(slot / p.topk);
      p.row_weights[row] = load(p.topk_weights, slot);
    }
  }
  // Every cursor has moved from its expert's first row to the next expert's.
  std::copy_backward(cursors, cursors + experts, cursors + experts + 1);
  cursors[0] = 0;
}

}  // namespace simple_moe::cpu
