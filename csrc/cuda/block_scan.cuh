// An inclusive scan over a block.
#pragma once

#include "ptx.cuh"

namespace simple_moe {

struct Sum {
  __device__ __forceinline__ int operator()(int a, int b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ int operator()(int a, int b) const { return a > b ? a : b; }
};

// For an `op` whose identity is 0 (non-negative values). All threads must come; `warp_totals`
// [kThreads / 32] is shared memory that nobody else touches meanwhile. `total` gets the scan of the
// whole block, in every thread.
template <int kThreads, typename Op>
__device__ __forceinline__ int block_scan(int value, Op op, int* warp_totals, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value = op(value, other);
  }
  __syncthreads();  // the last scan's readers are done
  if (lane == 31) warp_totals[warp] = value;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before = op(before, warp_totals[w]);
    total = op(total, warp_totals[w]);
  }
  return op(before, value);
}

}  // namespace simple_moe
