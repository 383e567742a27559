// sort_by_expert: checks, outputs, scratch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "tensors.h"

namespace simple_moe {
namespace {

std::tuple<Tensor, Tensor> sort_by_expert(const Tensor& topk_ids, int64_t num_experts,
                                          int64_t expert_offset) {
  const Checks check("sort_by_expert", "topk_ids", topk_ids);
  check.dims("topk_ids", topk_ids, 2, "(T, K)");
  const bool ids_are_int64 = check.int32_or_int64("topk_ids", topk_ids);
  const int64_t slots = topk_ids.numel();
  check.countable("topk_ids", topk_ids, slots, "T * K");
  check.that(num_experts >= 1 && num_experts < (int64_t{1} << 31) - 1, "num_experts is ",
             num_experts, ", expected 1 to 2**31 - 2");

  const Place place(check);
  const Tensor expert_offsets = empty(topk_ids, {num_experts + 1}, ScalarType::Int);
  const Tensor sorted_slots = empty(topk_ids, {slots}, ScalarType::Int);
  const Tensor counts =
      empty(topk_ids, {place.sort_by_expert_counts(slots, num_experts)}, ScalarType::Int);
  const Tensor ids = contiguous_of(topk_ids);
  const SortByExpert p{
      .ids = {ids.const_data_ptr(), ids_are_int64, num_experts, expert_offset},
      .slots = slots,
      .expert_offsets = int32_data(expert_offsets),
      .sorted_slots = int32_data(sorted_slots),
      .topk = 0,
      .topk_weights = {},
      .source_rows = nullptr,
      .row_weights = nullptr,
      .counts = int32_data(counts),
      .row_tiles = {},
  };
  place.sort_by_expert(p);
  return {expert_offsets, sorted_slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simple_moe, CPU, m) {
  m.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
}
STABLE_TORCH_LIBRARY_IMPL(simple_moe, CUDA, m) {
  m.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
}

}  // namespace simple_moe
