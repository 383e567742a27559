// Reductions over a warp, inclusive sums over a warp and over a block.
#pragma once

#include "ptx.cuh"

namespace simple_moe {

// Of a value of each lane, in every lane.
template <typename T, typename Two>
__device__ __forceinline__ T warp_reduce(T value, const Two& of_two) {
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value = of_two(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_scan(T value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, value, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) value += other;
  }
  return value;
}

// All threads of the block must come; `warp_totals`, one a warp, is shared memory that nobody else
// touches meanwhile. `total` gets the scan of the whole block, in every thread.
template <typename T>
__device__ __forceinline__ T block_scan(T value, T* warp_totals, T& total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = warp_scan(value);
  __syncthreads();  // the last scan's readers are done
  if (lane == 31) warp_totals[warp] = value;
  __syncthreads();
  const T upto = warp_scan(lane < blockDim.x / 32 ? warp_totals[lane] : T{});
  total = __shfl_sync(0xffffffffu, upto, 31);
  const T before = __shfl_sync(0xffffffffu, upto, warp - 1);
  return warp == 0 ? value : before + value;
}

}  // namespace simple_moe
