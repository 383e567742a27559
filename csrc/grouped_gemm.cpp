// grouped_gemm: checks, layouts, output.
#include <torch/csrc/stable/library.h>

#include "backends.h"
#include "checks.h"
#include "dispatch.h"
#include "tensors.h"

namespace simple_moe {
namespace {

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                    const std::optional<Tensor>& bias, std::optional<ScalarType> output_dtype,
                    const std::string& backend) {
  const Checks check("grouped_gemm", "a", a);
  check.dims("a", a, 2, "(M, K)");
  const DType dtype = check.floating("a", a);
  const int64_t rows = a.size(0), k = a.size(1);
  check.countable("a", a, rows, "M");
  check.dims("b", b, 3, "(E, N, K)");
  const int64_t experts = b.size(0), n = b.size(1);
  check.shape("b", b, {experts, n, k}, "(E, N, K)");
  check.that(experts >= 1, "b has shape ", shape_of(b), ", expected at least one expert (E, N, K)");
  check.same_dtype("b", b);
  check.shape("expert_offsets", expert_offsets, {experts + 1}, "(E + 1)");
  check.int32("expert_offsets", expert_offsets);
  if (bias) {
    check.shape("bias", *bias, {experts, n}, "(E, N)");
    check.bias_dtype("bias", *bias);
  }
  const DType out_dtype = check.output_dtype(output_dtype, dtype);

  const Place place(check);
  const Backend& chosen = choose_backend(check, place, backend, false);
  const Tensor out = empty(a, {rows, n}, scalar_type_of(out_dtype));
  if (out.numel() == 0) return out;
  const Rows a_rows = rows_of(a);
  const ExpertMatrices b_matrices = expert_matrices_of(b);
  const Tensor offsets = contiguous_of(expert_offsets);
  const auto biases = contiguous_of(bias);
  RowTiles tiles = place.plan_row_tiles(rows, experts, n, n, false, chosen.wgmma);
  const Tensor tiles_memory = empty(a, {tiles.bytes()}, ScalarType::Byte);
  tiles.head = static_cast<RowTilesHead*>(tiles_memory.mutable_data_ptr());
  const GroupedGemm p{
      .dtype = dtype,
      .out_dtype = out_dtype,
      .a = a_rows.data,
      .a_stride = a_rows.stride,
      .rows = rows,
      .n = n,
      .k = k,
      .experts = experts,
      .expert_offsets = const_int32_data(offsets),
      .source_rows = nullptr,
      .out_rows = nullptr,
      .source_count = rows,
      .row_tiles = tiles,
      .is_second = false,
      .b = b_matrices.data,
      .b_expert_stride = b_matrices.expert_stride,
      .b_row_stride = b_matrices.row_stride,
      .b_col_stride = b_matrices.col_stride,
      .bias = floats_of(biases),
      .activation = {},
      .gate_layout = GateLayout::kGateUp,
      .row_weights = {},
      .out = out.mutable_data_ptr(),
      .out_stride = n,
      .zero_other_rows = true,
  };
  place.row_tiles(p);
  chosen.grouped_gemm(p, place.stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simple_moe, CPU, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }
STABLE_TORCH_LIBRARY_IMPL(simple_moe, CUDA, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }

}  // namespace simple_moe
