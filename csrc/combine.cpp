// combine: checks, layouts, output, scratch.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "dispatch.h"
#include "tensors.h"

namespace simple_moe {
namespace {

Tensor combine(const Tensor& expert_out, const Tensor& topk_weights, const Tensor& sorted_slots,
               const Tensor& expert_offsets, std::optional<ScalarType> output_dtype) {
  const Checks check("combine", "expert_out", expert_out);
  check.dims("expert_out", expert_out, 2, "(M, H)");
  const DType dtype = check.floating("expert_out", expert_out);
  const int64_t rows = expert_out.size(0), hidden = expert_out.size(1);
  check.countable("expert_out", expert_out, rows, "M");
  check.dims("topk_weights", topk_weights, 2, "(T, K)");
  check.floating("topk_weights", topk_weights);
  const int64_t tokens = topk_weights.size(0), topk = topk_weights.size(1);
  check.that(topk >= 1, "topk_weights has shape ", shape_of(topk_weights),
             ", expected at least one choice (T, K)");
  check.countable("topk_weights", topk_weights, tokens * topk, "T * K");
  check.shape("sorted_slots", sorted_slots, {rows}, "(M)");
  check.int32("sorted_slots", sorted_slots);
  check.dims("expert_offsets", expert_offsets, 1, "(E + 1)");
  check.int32("expert_offsets", expert_offsets);
  const int64_t experts = expert_offsets.size(0) - 1;
  check.that(experts >= 1, "expert_offsets has shape ", shape_of(expert_offsets),
             ", expected at least one expert (E + 1)");
  const DType out_dtype = check.output_dtype(output_dtype, dtype);

  const Place place(check);
  const Tensor out = empty(expert_out, {tokens, hidden}, scalar_type_of(out_dtype));
  if (out.numel() == 0) return out;
  const Rows in = rows_of(expert_out);
  const Tensor slots = contiguous_of(sorted_slots), offsets = contiguous_of(expert_offsets);
  const std::optional<Tensor> weights = contiguous_of(topk_weights);
  const Tensor slot_rows = empty(expert_out, {tokens * topk}, ScalarType::Int);
  const Combine p{
      .dtype = dtype,
      .out_dtype = out_dtype,
      .expert_out = in.data,
      .expert_out_stride = in.stride,
      .tokens = tokens,
      .hidden = hidden,
      .rows = rows,
      .topk = static_cast<int>(topk),
      .weights = floats_of(weights),
      .ids = {},
      .sorted_slots = const_int32_data(slots),
      .expert_offsets = const_int32_data(offsets),
      .experts = experts,
      .slot_rows = int32_data(slot_rows),
      .only_rows_are_new = false,
      .out = out.mutable_data_ptr(),
  };
  place.combine(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simple_moe, CPU, m) { m.impl("combine", TORCH_BOX(&combine)); }
STABLE_TORCH_LIBRARY_IMPL(simple_moe, CUDA, m) { m.impl("combine", TORCH_BOX(&combine)); }

}  // namespace simple_moe
