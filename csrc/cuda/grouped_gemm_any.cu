// grouped_gemm's kernel for what grouped_gemm.cuh can't take: any alignment and size, b with k as
// its slow axis, float32 operands, an output of another 16-bit dtype.
//
// Schedule: a persistent block walks its items. All 4 warps load and multiply (mma_tile.cuh), then
// the accumulators pass through shared memory, so that the epilogue is a small rolled loop and the
// rows are written 16 bytes a thread. Where the activation is gated, a tile's columns are half
// gates and half ups of the same output columns: the first product never reaches memory.
#include <algorithm>

#include "device.h"
#include "epilogue.cuh"
#include "items.cuh"
#include "launch.h"
#include "mma_tile.cuh"
#include "shapes.h"

namespace simple_moe::cuda {
namespace {

// `kAlongK`: b's rows are contiguous along k, not along n (a transposed view).
template <typename Shape, bool kAlongK>
__global__ void __launch_bounds__(kMmaThreads, 2)
    grouped_gemm_any_kernel(const GroupedGemm p, const Divisor column_tiles) {
  using T = typename Shape::T;
  using Tile = MmaTile<Shape, true, kAlongK>;
  ptx::follow_earlier_kernels();
  unsigned char* const smem = ptx::dynamic_smem();
  const bool gated = is_gated(p.activation.kind);
  const int width = gated ? Shape::kCols / 2 : Shape::kCols;  // columns of out
  const Items items(p, column_tiles);
  for (unsigned number = blockIdx.x;; number += gridDim.x) {
    Item item = items.find(number, items.look(number));
    const int end = item.row_begin + item.row_count;
    if (item.row_count == 0) break;
    const int64_t first_column = static_cast<int64_t>(item.column_tile) * width;
    const auto row_of_a = [&](int i) -> const T* {
      if (i >= item.row_count) return nullptr;
      const int64_t row = item.row_begin + i;
      return static_cast<const T*>(p.a) + (p.source_rows ? p.source_rows[row] : row) * p.a_stride;
    };
    // Behind a column of the tile is a row of the weights.
    const T* const weights = static_cast<const T*>(p.b) + item.expert * p.b_expert_stride;
    const auto column_of_b = [&](int column) -> const T* {
      const int64_t output = first_column + column % width;
      if (output >= p.n) return nullptr;
      return weights + (gated ? branch_row(p, output, column >= width) : output) * p.b_row_stride;
    };
    // It may be higher than the tile: it is taken in pieces.
    for (; item.row_begin < end; item.row_begin += Shape::kRows) {
      item.row_count = static_cast<int16_t>(min(end - item.row_begin, Shape::kRows));
      const typename Tile::A a(p.k, 1, row_of_a);
      const typename Tile::B b(p.k, kAlongK ? 1 : p.b_col_stride, column_of_b);
      const float* const product = Tile().multiply(a, b, p.k, smem);
      finish_rows(p, item.expert, item.row_begin, item.row_count, first_column, width,
                  [&](int row, int column, bool up) {
                    return product[row * Shape::kPitch + (up ? width : 0) + column];
                  });
    }
  }
}

template <typename Shape>
void launch_shape(const GroupedGemm& p, cudaStream_t stream) {
  const DeviceInfo& device = device_info();
  const int64_t fit = static_cast<int64_t>(device.smem_per_sm / (Shape::kBytes + 1024));
  const int64_t resident = device.sm_count * std::max<int64_t>(fit, 1);
  const int64_t columns = column_tiles(p, Shape::kCols);
  launch<Start::kEarly>(p.b_col_stride == 1 ? grouped_gemm_any_kernel<Shape, true>
                                            : grouped_gemm_any_kernel<Shape, false>,
                        std::min(p.row_tiles.most * columns, resident), kMmaThreads, Shape::kBytes,
                        stream, p, Divisor(columns));
}

}  // namespace

void launch_any(const GroupedGemm& p, cudaStream_t stream) {
  const int height = p.row_tiles.height;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    // rows, columns, bytes of a line and stages of a tile; rows of warps
    if (std::is_same_v<T, float> || (16 < height && height <= 64)) {
      launch_shape<TileShape<T, 64, 128, 64, 4, 2>>(p, stream);
    } else if constexpr (!std::is_same_v<T, float>) {
      height <= 16 ? launch_shape<TileShape<T, 16, 128, 128, 4, 1>>(p, stream)
                   : launch_shape<TileShape<T, 128, 128, 64, 4, 2>>(p, stream);
    }
  });
}

}  // namespace simple_moe::cuda
