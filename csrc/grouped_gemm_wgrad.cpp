// grouped_gemm_wgrad: checks, layouts, output.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "dispatch.h"
#include "tensors.h"

namespace simple_moe {
namespace {

Tensor grouped_gemm_wgrad(const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                          std::optional<ScalarType> output_dtype) {
  const Checks check("grouped_gemm_wgrad", "a", a);
  check.dims("a", a, 2, "(M, m)");
  const DType dtype = check.floating("a", a);
  const int64_t rows = a.size(0), m = a.size(1);
  check.countable("a", a, rows, "M");
  check.dims("b", b, 2, "(M, n)");
  const int64_t n = b.size(1);
  check.shape("b", b, {rows, n}, "(M, n)");
  check.same_dtype("b", b);
  check.dims("expert_offsets", expert_offsets, 1, "(E + 1)");
  check.int32("expert_offsets", expert_offsets);
  const int64_t experts = expert_offsets.size(0) - 1;
  check.that(experts >= 1, "expert_offsets has shape ", shape_of(expert_offsets),
             ", expected at least one expert (E + 1)");
  const DType out_dtype = check.output_dtype(output_dtype, dtype);

  const Place place(check);
  const Tensor out = empty(a, {experts, m, n}, scalar_type_of(out_dtype));
  if (out.numel() == 0) return out;
  const Rows a_rows = rows_of(a), b_rows = rows_of(b);
  const Tensor offsets = contiguous_of(expert_offsets);
  const GroupedGemmWgrad p{
      .dtype = dtype,
      .out_dtype = out_dtype,
      .a = a_rows.data,
      .b = b_rows.data,
      .a_stride = a_rows.stride,
      .b_stride = b_rows.stride,
      .rows = rows,
      .m = m,
      .n = n,
      .experts = experts,
      .expert_offsets = const_int32_data(offsets),
      .out = out.mutable_data_ptr(),
  };
  place.grouped_gemm_wgrad(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simple_moe, CPU, m) {
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad));
}
STABLE_TORCH_LIBRARY_IMPL(simple_moe, CUDA, m) {
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad));
}

}  // namespace simple_moe
