// grouped_gemm in float32: any strides.
#include "grouped_gemm_any.cuh"
#include "simt_tile.cuh"

namespace simple_moe::cuda {

__global__ void __launch_bounds__(SimtShape::kThreads)
    grouped_gemm_f32_kernel(const GroupedGemm p, const Divisor column_tiles, Alignment aligned) {
  for_each_item<SimtTile>(
      p, column_tiles, aligned.out, [&](SimtTile& product, const Item& item, unsigned char* smem) {
        const float* const rows = static_cast<const float*>(p.a);
        const float* const weights =
            static_cast<const float*>(p.b) + item.expert * p.b_expert_stride;
        product.multiply(
            [&](int row, int64_t k) {
              if (row >= item.row_count) return 0.0f;
              return rows[source_row(p, item.row_begin + row) * p.a_stride + k];
            },
            [&](int column, int64_t k) {
              const int64_t row = weight_row<SimtShape::kCols>(p, item.column_tile, column);
              return row < 0 ? 0.0f : weights[row * p.b_row_stride + k * p.b_col_stride];
            },
            p.k, smem);
      });
}

void grouped_gemm_f32(const GroupedGemm& p, cudaStream_t stream) {
  launch_any<SimtShape>(grouped_gemm_f32_kernel, p, SimtShape::kThreads, stream);
}

}  // namespace simple_moe::cuda
