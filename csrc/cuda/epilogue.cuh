// What happens to a product before it is written: bias, activation, routing weight, one rounding.
#pragma once

#include "activation.h"
#include "floats.cuh"

namespace simple_moe {

// The row of w1 (and element of b1) that holds a branch of output column `column`.
__device__ __forceinline__ int64_t branch_row(const GroupedGemm& p, int64_t column, bool up) {
  switch (p.gate_layout) {
    case GateLayout::kGateUp:
      return up ? p.n + column : column;
    case GateLayout::kUpGate:
      return up ? column : p.n + column;
    default:
      return 2 * column + (up ? 1 : 0);
  }
}

// Writes `rows` rows of one expert from `first_row` on and the columns from `first_column` on.
// product[row * pitch + j] is the product's column j of the tile, `columns` of them; where the
// activation is gated, the first half are gates and the second half ups.
// All threads of the block share the work. 8 columns at a time in a rolled loop: the code of the
// activations stands once.
__device__ __forceinline__ void finish_rows(const GroupedGemm& p, int64_t expert, int64_t first_row,
                                            int rows, int64_t first_column, int columns,
                                            const float* product, int64_t pitch, bool aligned,
                                            bool add_bias) {
  const bool gated = is_gated(p.activation.kind);
  const int width = gated ? columns / 2 : columns;
  const int vectors = width / kVector;
  const ActivationScalars scalars = scalars_of(p.activation, expert);
  const int64_t biases = gated ? 2 * p.n : p.n;
#pragma unroll 1
  for (int item = threadIdx.x; item < rows * vectors; item += blockDim.x) {
    const int row = item / vectors, j = item % vectors * kVector;
    const int64_t column = first_column + j;
    if (column >= p.n) continue;
    const int64_t left = p.n - column;
    const int count = left < kVector ? static_cast<int>(left) : kVector;
    float gate[kVector], up[kVector] = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) gate[i] = product[row * pitch + j + i];
    if (gated) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) up[i] = product[row * pitch + width + j + i];
    }
    if (add_bias && p.bias.data) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i >= count) continue;
        const int64_t at = expert * biases;
        gate[i] += load_float(p.bias, at + (gated ? branch_row(p, column + i, false) : column + i));
        if (gated) up[i] += load_float(p.bias, at + branch_row(p, column + i, true));
      }
    }
    if (gated) {
      activate_gated<kVector>(p.activation.kind, scalars, gate, up);
    } else {
      activate<kVector>(p.activation.kind, gate);
    }
    const int64_t out_row = first_row + row;
    if (p.row_weights.data) {
      const float weight = load_float(p.row_weights, out_row);
#pragma unroll
      for (int i = 0; i < kVector; ++i) gate[i] *= weight;
    }
    store_vector(p.out, p.out_dtype, out_row * p.out_stride + column, count, aligned, gate);
  }
}

}  // namespace simple_moe
