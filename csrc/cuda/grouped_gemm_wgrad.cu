// grouped_gemm_wgrad: out[e] = a[rows of e].T @ b[rows of e], the gradient of grouped_gemm's b.
//
// Schedule: as grouped_gemm_any's, but the tiles are known beforehand (experts x rows x columns of
// out) and the rows of the expert are what is summed over: both operands lie with k as the slow
// axis. Experts without rows get zeros.
#include "block_scan.cuh"
#include "device.h"
#include "epilogue.cuh"
#include "launch.h"
#include "mma_tile.cuh"
#include "primitives.h"
#include "row_tiles.cuh"
#include "shapes.h"

namespace simple_moe::cuda {
namespace {

// rows, columns, bytes of a line and stages of a tile; rows of warps
template <typename T>
using WgradShape = TileShape<T, 128, 128, 64, 4, 2>;

// Of a and b: where an expert's rows begin, and how many there are. Offsets are clamped to [0,
// rows] and made monotonic by a running maximum.
__device__ __forceinline__ int2 rows_of(const GroupedGemmWgrad& p, int64_t expert) {
  int upto = 0;  // the running maximum before the expert
  for (int64_t e = threadIdx.x % 32; e <= expert; e += 32)
    upto = max(upto, clamped_offset(p.expert_offsets, e, p.rows));
  const int begin = warp_reduce(upto, [](auto a, auto b) { return max(a, b); });
  const int count = clamped_offset(p.expert_offsets, expert + 1, p.rows) - begin;
  return {begin, count < 0 ? 0 : count};
}

// `out`: all that is needed of a product to be finished, p's experts below one another.
template <typename T>
__global__ void __launch_bounds__(kMmaThreads)
    grouped_gemm_wgrad_kernel(const GroupedGemmWgrad p, const GroupedGemm out) {
  using Shape = WgradShape<T>;
  using Tile = MmaTile<Shape, false, false>;
  unsigned char* const smem = ptx::dynamic_smem();
  const int64_t m_tiles = (p.m + Shape::kRows - 1) / Shape::kRows;
  const int64_t n_tiles = (p.n + Shape::kCols - 1) / Shape::kCols;
  for (int64_t number = blockIdx.x; number < p.experts * m_tiles * n_tiles; number += gridDim.x) {
    const int64_t expert = number / (m_tiles * n_tiles);
    const int64_t m = number % (m_tiles * n_tiles) / n_tiles * Shape::kRows;
    const int64_t n = number % n_tiles * Shape::kCols;
    const auto [begin, rows] = rows_of(p, expert);
    // Columns of a or b from `first` on: the expert's rows are what k is.
    const auto operand = [&](const void* data, int64_t stride, int64_t width, int64_t first) {
      const T* const row = static_cast<const T*>(data) + begin * stride;
      return typename Tile::A(rows, stride, [&](int column) {
        return first + column < width ? row + first + column : nullptr;
      });
    };
    const float* const product = Tile().multiply(operand(p.a, p.a_stride, p.m, m),
                                                 operand(p.b, p.b_stride, p.n, n), rows, smem);
    finish_rows(out, 0, expert * p.m + m, static_cast<int>(min(p.m - m, int64_t{Shape::kRows})), n,
                Shape::kCols,
                [&](int row, int column, bool) { return product[row * Shape::kPitch + column]; });
  }
}

}  // namespace

void grouped_gemm_wgrad(const GroupedGemmWgrad& p, cudaStream_t stream) {
  GroupedGemm out{};
  out.n = out.out_stride = p.n;
  out.out = p.out;
  out.out_dtype = p.out_dtype;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    using Shape = WgradShape<T>;
    const int64_t tiles = ceil_div(p.m, Shape::kRows) * ceil_div(p.n, Shape::kCols) * p.experts;
    const int64_t resident = 2 * device_info().sm_count;
    launch(grouped_gemm_wgrad_kernel<T>, tiles < resident ? tiles : resident, kMmaThreads,
           Shape::kBytes, stream, p, out);
  });
}

}  // namespace simple_moe::cuda
