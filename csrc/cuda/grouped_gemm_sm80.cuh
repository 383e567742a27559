// grouped_gemm by mma.sync: the best shape of a tile, on any GPU from SM80 on.
#pragma once

#include <utility>

#include "grouped_gemm.cuh"
#include "warp_tile.cuh"

namespace simple_moe::cuda {

template <typename T, int... kNumbers>
bool launch_shape(const GroupedGemm& p, int number, cudaStream_t stream,
                  std::integer_sequence<int, kNumbers...>) {
  return ((number == kNumbers &&
           (launch_product<WarpTile<T, GemmShape<kShapes[kNumbers]>>>(p, stream), true)) ||
          ...);
}

template <typename T>
void launch_sm80(const GroupedGemm& p, cudaStream_t stream) {
  const ProductSize size{p.rows, p.experts, p.n, p.k, is_gated(p.activation.kind)};
  const int number = choose_shape(p.row_tiles, size, device_info());
  if (!launch_shape<T>(p, number, stream, std::make_integer_sequence<int, kShapeCount>())) {
    cuda_check(cudaErrorInvalidConfiguration, "no tile fits in less than 99 KB of shared memory");
  }
}

}  // namespace simple_moe::cuda
