// grouped_gemm by mma.sync: the best shape of a tile, on any GPU from SM80 on.
#pragma once

#include "grouped_gemm.cuh"
#include "warp_tile.cuh"

namespace simple_moe::cuda {

template <typename T, int kNumber = 0>
void launch_shape(const GroupedGemm& p, int number, cudaStream_t stream) {
  if constexpr (kNumber < kShapeCount) {
    if (number != kNumber) return launch_shape<T, kNumber + 1>(p, number, stream);
    launch_product<WarpTile<T, GemmShape<kShapes[kNumber]>>>(p, stream);
  } else {
    cuda_check(cudaErrorInvalidConfiguration, "no tile fits in less than 99 KB of shared memory");
  }
}

template <typename T>
void launch_sm80(const GroupedGemm& p, cudaStream_t stream) {
  launch_shape<T>(p, choose_shape(p.row_tiles, size_of(p), device_info()), stream);
}

}  // namespace simple_moe::cuda
