// Kernels of the emulator's own, small enough to see that it's the emulator that is right.
#pragma once

#include <cstdint>

#include "params.h"

namespace simple_moe {

struct bf16;

namespace toys {

// out[m, n] = a[m, k] @ b, where b is [n, k] or [k, n]. m, n, k: multiples of 16, 8 * 2, 16.
void gemm(const bf16* a, const bf16* b, float* out, int m, int n, int k, bool b_is_k_by_n);

// The inclusive prefix sum of up to 1024 values.
void scan(const int* x, int* out, int n);

// x / divisor, of up to 1024 numbers below 2^31.
void divide(const int* x, int* out, int n, int divisor);

// out[row][column tile]: the expert whose tile it is. Other rows are left alone.
// `row_tiles`: scratch, for rows / 64 + experts + 1 of them.
void tiles(const int* expert_offsets, int* out, int64_t experts, int64_t rows, int column_tiles,
           int group, RowTilesHead* row_tiles);

}  // namespace toys
}  // namespace simple_moe
