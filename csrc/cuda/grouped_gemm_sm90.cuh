// grouped_gemm by wgmma: for row tiles of 128 rows and more, on GPUs of capability 9.0.
//
// The tiles are as large as the ring of four slots lets them be: what holds the product back is
// what L2 delivers (NOTES.md), (rows + cols) / (rows * cols) of it.
#pragma once

#include "grouped_gemm.cuh"
#include "wgmma_tile.cuh"

namespace simple_moe::cuda {

template <typename T, GemmTile kTile>
void launch_wgmma(const GroupedGemm& p, cudaStream_t stream) {
  launch_product<WgmmaTile<T, GemmShape<kTile>>>(p, stream);
}

template <typename T>
void launch_sm90(const GroupedGemm& p, cudaStream_t stream) {
  p.row_tiles.height > 128 ? launch_wgmma<T, GemmTile{192, 192, 64, 4, 12, 1, 1, true}>(p, stream)
                           : launch_wgmma<T, GemmTile{128, 256, 64, 4, 8, 1, 1, true}>(p, stream);
}

}  // namespace simple_moe::cuda
