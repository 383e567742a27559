// combine on the CPU: every token's weighted rows are summed in float32, k ascending.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common.h"
#include "primitives.h"

namespace simple_moe::cpu {
namespace {

constexpr int64_t kBlock = 64;  // Columns summed at once: on the stack, and of a constant length.

// slot_rows from sort_by_expert's two outputs, which may be anybody's: a slot that doesn't exist is
// skipped, and of two rows for one slot the later one counts.
void find_slot_rows(const Combine& p) {
  const int64_t slots = p.tokens * p.topk;
  std::fill(p.slot_rows, p.slot_rows + slots, -1);
  RowRanges ranges(p.expert_offsets, p.rows);
  for (int64_t e = 0; e < p.experts; ++e) ranges.next();
  for (int64_t row = 0; row < ranges.reached(); ++row) {
    const int64_t slot = p.sorted_slots[row];
    if (slot >= 0 && slot < slots) p.slot_rows[slot] = static_cast<int32_t>(row);
  }
}

// -1: it isn't there.
int64_t row_of_slot(const Combine& p, int64_t slot) {
  if (p.expert_offsets) return p.slot_rows[slot];
  return local_expert(p.ids, slot) < p.ids.experts ? slot : -1;
}

template <class In, class Out>
void combine_token(const Combine& p, int64_t token) {
  const In* rows = static_cast<const In*>(p.expert_out);
  Out* out = static_cast<Out*>(p.out) + token * p.hidden;
  for (int64_t first = 0; first < p.hidden; first += kBlock) {
    const int64_t count = std::min(kBlock, p.hidden - first);
    float sums[kBlock] = {};
    for (int64_t slot = token * p.topk; slot < (token + 1) * p.topk; ++slot) {
      const int64_t row = row_of_slot(p, slot);
      if (row < 0) continue;  // Not held here: its weight may be anything, NaN too.
      const In* in = rows + row * p.expert_out_stride + first;
      const float weight = p.weights.data ? load(p.weights, slot) : 1.0f;
      if (count == kBlock) {
        for (int64_t i = 0; i < kBlock; ++i) sums[i] += weight * static_cast<float>(in[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) sums[i] += weight * static_cast<float>(in[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<Out>(sums[i]);
  }
}

}  // namespace

void combine(const Combine& p) {
  if (p.expert_offsets) find_slot_rows(p);
  with_type(p.dtype, [&](auto* in) {
    with_type(p.out_dtype, [&](auto* out) {
      using In = std::remove_pointer_t<decltype(in)>;
      using Out = std::remove_pointer_t<decltype(out)>;
      torch::stable::parallel_for(0, p.tokens, grain_of(p.hidden * p.topk),
                                  [&](int64_t begin, int64_t end) {
                                    for (int64_t token = begin; token < end; ++token)
                                      combine_token<In, Out>(p, token);
                                  });
    });
  });
}

}  // namespace simple_moe::cpu
