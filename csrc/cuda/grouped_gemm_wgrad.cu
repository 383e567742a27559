// grouped_gemm_wgrad: out[e] = a[rows of e].T @ b[rows of e], the gradient of grouped_gemm's b.
//
// Schedule: as grouped_gemm's, but the tiles are known beforehand (experts x rows x columns of out)
// and the rows of the expert are what is summed over: both operands lie with k as the slow axis.
// Experts without rows get zeros.
#include "block_scan.cuh"
#include "device.h"
#include "launch.h"
#include "mma_tile.cuh"
#include "primitives.h"
#include "simt_tile.cuh"

namespace simple_moe::cuda {
namespace {

using Shape16 = TileShape<128, 128, 32, 4, 2>;

struct WgradTile {
  int64_t expert, first_row, rows;  // of a and b
  int64_t m, n;                     // first row and column of out[expert]
};

// The expert's rows: offsets are clamped to [0, rows] and made monotonic by a running maximum.
template <int kThreads>
__device__ __forceinline__ void find_rows(const GroupedGemmWgrad& p, int* warp_totals,
                                          WgradTile& tile) {
  int upto = 0;  // the running maximum before the expert
  for (int64_t e = threadIdx.x; e <= tile.expert; e += kThreads) {
    const int64_t offset = p.expert_offsets[e];
    const int64_t clamped = offset < 0 ? 0 : (offset > p.rows ? p.rows : offset);
    upto = Max()(upto, static_cast<int>(clamped));
  }
  int begin;
  block_scan(upto, Max(), warp_totals, begin);
  const int64_t end = p.expert_offsets[tile.expert + 1];
  tile.first_row = begin;
  tile.rows = (end > p.rows ? p.rows : end) - begin;
  if (tile.rows < 0) tile.rows = 0;
}

template <typename Product, int kThreads, typename Multiply>
__device__ __forceinline__ void for_each_tile(const GroupedGemmWgrad& p, bool out_aligned,
                                              const Multiply& multiply) {
  using Shape = typename Product::Shape;
  unsigned char* const smem = ptx::dynamic_smem();
  int* const warp_totals = reinterpret_cast<int*>(smem + Shape::kBytes);
  const int64_t m_tiles = (p.m + Shape::kRows - 1) / Shape::kRows;
  const int64_t n_tiles = (p.n + Shape::kCols - 1) / Shape::kCols;
  for (int64_t number = blockIdx.x; number < p.experts * m_tiles * n_tiles; number += gridDim.x) {
    WgradTile tile;
    tile.expert = number / (m_tiles * n_tiles);
    tile.m = number % (m_tiles * n_tiles) / n_tiles * Shape::kRows;
    tile.n = number % n_tiles * Shape::kCols;
    find_rows<kThreads>(p, warp_totals, tile);
    Product product;
    multiply(product, tile, smem);
    product.stage(smem, [&](int first, const float* staged) {
      constexpr int kVectors = Shape::kCols / kVector;
#pragma unroll 1
      for (int item = threadIdx.x; item < Shape::kStagedRows * kVectors; item += kThreads) {
        const int row = item / kVectors, j = item % kVectors * kVector;
        const int64_t m = tile.m + first + row, n = tile.n + j;
        if (m >= p.m || n >= p.n) continue;
        const int count = p.n - n < kVector ? static_cast<int>(p.n - n) : kVector;
        float values[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = staged[row * Shape::kPitch + j + i];
        store_vector(p.out, p.out_dtype, (tile.expert * p.m + m) * p.n + n, count, out_aligned,
                     values);
      }
    });
  }
}

template <typename T>
__device__ __forceinline__ auto operand(const void* data, int64_t stride, int64_t width,
                                        int64_t first, const WgradTile& tile, bool aligned) {
  using Operand = LineMajor<T, Shape16::kRows, Shape16::kDepth>;
  const int64_t line = first + Operand::first_line(), left = width - line;
  const int count = left < 0 ? 0 : (left < kVector ? static_cast<int>(left) : kVector);
  return Operand{static_cast<const T*>(data) + tile.first_row * stride + line,
                 stride,
                 1,
                 count,
                 tile.rows,
                 aligned};
}

template <typename T>
__global__ void __launch_bounds__(kMmaThreads)
    grouped_gemm_wgrad_kernel(const GroupedGemmWgrad p, bool a_aligned, bool b_aligned,
                              bool out_aligned) {
  for_each_tile<MmaTile<T, Shape16>, kMmaThreads>(
      p, out_aligned, [&](auto& product, const WgradTile& tile, unsigned char* smem) {
        product.multiply(operand<T>(p.a, p.a_stride, p.m, tile.m, tile, a_aligned),
                         operand<T>(p.b, p.b_stride, p.n, tile.n, tile, b_aligned), tile.rows,
                         smem);
      });
}

__global__ void __launch_bounds__(SimtShape::kThreads)
    grouped_gemm_wgrad_f32_kernel(const GroupedGemmWgrad p, bool out_aligned) {
  for_each_tile<SimtTile, SimtShape::kThreads>(
      p, out_aligned, [&](SimtTile& product, const WgradTile& tile, unsigned char* smem) {
        const float* const a = static_cast<const float*>(p.a) + tile.first_row * p.a_stride;
        const float* const b = static_cast<const float*>(p.b) + tile.first_row * p.b_stride;
        product.multiply(
            [&](int m, int64_t k) {
              return tile.m + m < p.m ? a[k * p.a_stride + tile.m + m] : 0.0f;
            },
            [&](int n, int64_t k) {
              return tile.n + n < p.n ? b[k * p.b_stride + tile.n + n] : 0.0f;
            },
            tile.rows, smem);
      });
}

template <typename Shape, typename Kernel, typename... Args>
void launch_tiles(Kernel kernel, const GroupedGemmWgrad& p, int threads, cudaStream_t stream,
                  Args... args) {
  const int64_t tiles = (p.m + Shape::kRows - 1) / Shape::kRows *
                        ((p.n + Shape::kCols - 1) / Shape::kCols) * p.experts;
  const int64_t resident = 2 * device_info().sm_count;
  launch(kernel, tiles < resident ? tiles : resident, threads, Shape::kBytes + 32 * sizeof(int),
         stream, p, args...);
}

}  // namespace

void grouped_gemm_wgrad(const GroupedGemmWgrad& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  const bool out_aligned = rows_are_aligned(p.out, p.n, p.out_dtype);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, float>) {
      launch_tiles<SimtShape>(grouped_gemm_wgrad_f32_kernel, p, SimtShape::kThreads, stream,
                              out_aligned);
    } else {
      launch_tiles<Shape16>(grouped_gemm_wgrad_kernel<T>, p, kMmaThreads, stream,
                            rows_are_aligned(p.a, p.a_stride, p.dtype),
                            rows_are_aligned(p.b, p.b_stride, p.dtype), out_aligned);
    }
  });
}

}  // namespace simple_moe::cuda
