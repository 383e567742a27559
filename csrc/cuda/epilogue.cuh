// What happens to a product before it is written: bias, activation, routing weight, one rounding.
#pragma once

#include "activation.h"
#include "floats.cuh"

namespace simple_moe {

// The row of w1 (and element of b1) that holds a branch of output column `column`.
__device__ __forceinline__ int64_t branch_row(const GroupedGemm& p, int64_t column, bool up) {
  if (p.gate_layout == GateLayout::kInterleaved) return 2 * column + (up ? 1 : 0);
  return (p.gate_layout == GateLayout::kGateUp) == up ? p.n + column : column;
}

// Where the bias of a branch of output column `column` is.
__device__ __forceinline__ int64_t bias_at(const GroupedGemm& p, int64_t expert, int64_t column,
                                           bool up) {
  return is_gated(p.activation.kind) ? expert * 2 * p.n + branch_row(p, column, up)
                                     : expert * p.n + column;
}

// One value: bias and activation. A call, so that their code stands once.
static __device__ __noinline__ float finished(Activation kind, ActivationScalars scalars,
                                              Floats bias, int64_t gate_at, int64_t up_at,
                                              float gate, float up) {
  if (bias.data) {
    gate += load_float(bias, gate_at);
    if (is_gated(kind)) up += load_float(bias, up_at);
  }
  is_gated(kind) ? activate_gated<1>(kind, scalars, &gate, &up) : activate<1>(kind, &gate);
  return gate;
}

// Writes `rows` rows of one expert from `first_row` on, and `columns` columns from `first_column`
// on: those there are. product(row, column, up) is a value of the tile.
// All threads of the block share the work, 8 columns at a time.
template <typename Product>
__device__ __forceinline__ void finish_rows(const GroupedGemm& p, int64_t expert, int64_t first_row,
                                            int rows, int64_t first_column, int columns,
                                            const Product& product) {
  const int vectors = columns / kVector;
  const ActivationScalars scalars = scalars_of(p.activation, expert);
  const Activation kind = p.activation.kind;
  const bool plain = kind == Activation::kIdentity && !p.bias.data;
#pragma unroll 1
  for (int item = threadIdx.x; item < rows * vectors; item += blockDim.x) {
    const int row = item / vectors, j = item % vectors * kVector;
    const int64_t left = p.n - (first_column + j);
    if (left <= 0) continue;
    const int count = left < kVector ? static_cast<int>(left) : kVector;
    const int64_t of_product = first_row + row;
    const int64_t out_row = p.out_rows ? p.out_rows[of_product] : of_product;
    const float weight = p.row_weights.data ? load_float(p.row_weights, of_product) : 1.0f;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // Past the last column the first, whose bias is there.
      const int64_t column = first_column + (i < count ? j + i : 0);
      const auto at = [&](bool up) { return p.bias.data ? bias_at(p, expert, column, up) : 0; };
      const float gate = product(row, j + i, false);
      const float up = is_gated(kind) ? product(row, j + i, true) : 0.0f;
      values[i] = plain ? gate : finished(kind, scalars, p.bias, at(false), at(true), gate, up);
      values[i] *= weight;
    }
    const int64_t at = out_row * p.out_stride + first_column + j;
    const int64_t bytes = p.out_dtype == DType::kFloat32 ? 4 * at : 2 * at;
    const bool aligned = (reinterpret_cast<uintptr_t>(p.out) + bytes) % 16 == 0;
    store_vector(p.out, p.out_dtype, at, count, aligned, values);
  }
}

}  // namespace simple_moe
