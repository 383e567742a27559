// Inclusive scans over a warp and over a block.
#pragma once

#include "ptx.cuh"

namespace simple_moe {

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

template <typename T, typename Op>
__device__ __forceinline__ T warp_scan(T value, Op op) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, value, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) value = op(value, other);
  }
  return value;
}

// For an `op` whose identity is 0 (non-negative values). All threads of the block must come;
// `warp_totals`, one a warp, is shared memory that nobody else touches meanwhile. `total` gets the
// scan of the whole block, in every thread.
template <typename T, typename Op>
__device__ __forceinline__ T block_scan(T value, Op op, T* warp_totals, T& total) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = warp_scan(value, op);
  __syncthreads();  // the last scan's readers are done
  if (threadIdx.x % 32 == 31) warp_totals[warp] = value;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before = op(before, warp_totals[w]);
    total = op(total, warp_totals[w]);
  }
  return op(before, value);
}

}  // namespace simple_moe
