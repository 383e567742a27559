// grouped_gemm by wgmma: for row tiles of 128 rows and more, on GPUs of capability 9.0.
//
// Tiles of 192 rows where most experts then need one, the widest otherwise: NOTES.md has those that
// were tried. Of 192 rows fewer columns where the last round would leave most of the GPU idle.
#pragma once

#include "grouped_gemm.cuh"
#include "wgmma_tile.cuh"

namespace simple_moe::cuda {

template <typename T>
void launch_sm90(const GroupedGemm& p, cudaStream_t stream) {
  using High = GemmShape<GemmTile{192, 192, 64, 4, 12, 1, 1, true}>;
  using Narrow = GemmShape<GemmTile{192, 128, 64, 5, 12, 1, 1, true}>;
  using Wide = GemmShape<GemmTile{128, 256, 64, 4, 8, 1, 1, true}>;
  const bool fewer = is_faster(Narrow::kTile, High::kTile, size_of(p), device_info());
  p.row_tiles.height <= 128 ? launch_product<WgmmaTile<T, Wide>>(p, stream)
  : fewer                   ? launch_product<WgmmaTile<T, Narrow>>(p, stream)
                            : launch_product<WgmmaTile<T, High>>(p, stream);
}

}  // namespace simple_moe::cuda
