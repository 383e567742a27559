// grouped_gemm's kernel for what grouped_gemm.cuh can't take: any alignment and size, b with k as
// its slow axis, float32 operands, an output of another 16-bit dtype.
//
// Schedule: a persistent block walks its items. All 4 warps load and multiply (mma_tile.cuh), then
// the accumulators pass through shared memory, so that the epilogue is a small rolled loop and the
// rows are written 16 bytes a thread. Where the activation is gated, a tile's columns are half
// gates and half ups of the same output columns: the first product never reaches memory.
#pragma once

#include "device.h"
#include "epilogue.cuh"
#include "items.cuh"
#include "launch.h"
#include "mma_tile.cuh"
#include "shapes.h"

namespace simple_moe::cuda {

struct Alignment {
  bool a, b, out;  // whether rows can be accessed 16 bytes at a time
};

// The row of b behind a column of a tile, or -1 where there is none.
template <int kCols>
__device__ __forceinline__ int64_t weight_row(const GroupedGemm& p, int column_tile, int column) {
  const bool gated = is_gated(p.activation.kind);
  const int width = gated ? kCols / 2 : kCols;
  const int64_t output = static_cast<int64_t>(column_tile) * width + column % width;
  if (output >= p.n) return -1;
  return gated ? branch_row(p, output, column >= width) : output;
}

// An item's rows of a, gathered.
template <typename Shape>
__device__ __forceinline__ auto rows_of_a(const GroupedGemm& p, const Item& item, bool aligned) {
  using A = KMajor<typename Shape::T, Shape::kRows, Shape::kDepth>;
  A a{.lines = {}, .k = p.k, .aligned = aligned};
  for (int pass = 0; pass < A::kPasses; ++pass) {
    if (A::line(pass) >= item.row_count) continue;
    const int64_t row = item.row_begin + A::line(pass);
    a.lines[pass] = static_cast<const typename Shape::T*>(p.a) +
                    (p.source_rows ? p.source_rows[row] : row) * p.a_stride;
  }
  return a;
}

// `kLineMajorB`: b's rows are contiguous along n, not along k (a transposed view).
template <typename Shape, bool kLineMajorB>
__device__ __forceinline__ auto columns_of_b(const GroupedGemm& p, const Item& item, bool aligned) {
  using T = typename Shape::T;
  const T* const weights = static_cast<const T*>(p.b) + item.expert * p.b_expert_stride;
  if constexpr (kLineMajorB) {
    // A vector's columns of a tile are neighbours in memory, or every other one where gates and ups
    // are interleaved.
    using B = LineMajor<T, Shape::kCols, Shape::kDepth>;
    const bool gated = is_gated(p.activation.kind);
    const int64_t row = weight_row<Shape::kCols>(p, item.column_tile, B::first_line());
    const int width = gated ? Shape::kCols / 2 : Shape::kCols;
    const int64_t count =
        p.n - static_cast<int64_t>(item.column_tile) * width - B::first_line() % width;
    const int64_t stride = gated && p.gate_layout == GateLayout::kInterleaved ? 2 : 1;
    return B{weights + (row < 0 ? 0 : row), p.b_col_stride, stride, count, p.k, aligned};
  } else {
    using B = KMajor<T, Shape::kCols, Shape::kDepth>;
    B b{.lines = {}, .k = p.k, .aligned = aligned};
    for (int pass = 0; pass < B::kPasses; ++pass) {
      const int64_t row = weight_row<Shape::kCols>(p, item.column_tile, B::line(pass));
      b.lines[pass] = row < 0 ? nullptr : weights + row * p.b_row_stride;
    }
    return b;
  }
}

template <typename Shape, bool kLineMajorB>
__global__ void __launch_bounds__(kMmaThreads, 2)
    grouped_gemm_any_kernel(const GroupedGemm p, const Divisor column_tiles, Alignment aligned) {
  ptx::follow_earlier_kernels();
  unsigned char* const smem = ptx::dynamic_smem();
  const Items items(p, column_tiles);
  for (unsigned number = blockIdx.x;; number += gridDim.x) {
    Item item = items.find(number, items.look(number));
    const int end = item.row_begin + item.row_count;
    if (item.row_count == 0) break;
    // It may be higher than the tile: it is taken in pieces.
    for (; item.row_begin < end; item.row_begin += Shape::kRows) {
      item.row_count = static_cast<int16_t>(min(end - item.row_begin, Shape::kRows));
      MmaTile<Shape> product;
      product.multiply(rows_of_a<Shape>(p, item, aligned.a),
                       columns_of_b<Shape, kLineMajorB>(p, item, aligned.b), p.k, smem);
      const int width = is_gated(p.activation.kind) ? Shape::kCols / 2 : Shape::kCols;
      product.stage(smem, [&](int first, const float* staged) {
        finish_rows(p, item.expert, item.row_begin + first,
                    min(item.row_count - first, Shape::kStagedRows),
                    static_cast<int64_t>(item.column_tile) * width, width, aligned.out,
                    [&](int row, int column, bool up) {
                      return staged[row * Shape::kPitch + (up ? width : 0) + column];
                    });
      });
    }
  }
}

template <typename Shape>
void launch_any_shape(const GroupedGemm& p, cudaStream_t stream) {
  const DeviceInfo& device = device_info();
  const int64_t blocks_per_sm = static_cast<int64_t>(device.smem_per_sm / (Shape::kBytes + 1024));
  const int64_t resident = device.sm_count * (blocks_per_sm < 1 ? 1 : blocks_per_sm);
  const int64_t columns = column_tiles(p, Shape::kCols);
  const int64_t items = p.row_tiles.most * columns;
  const bool line_major = p.b_col_stride != 1;
  const bool whole_vectors = !line_major || !is_gated(p.activation.kind) ||
                             (p.n % kVector == 0 && p.gate_layout != GateLayout::kInterleaved);
  const bool b_aligned =
      whole_vectors && rows_are_aligned(p.b, p.b_expert_stride, p.dtype) &&
      rows_are_aligned(p.b, line_major ? p.b_col_stride : p.b_row_stride, p.dtype);
  const Alignment aligned{rows_are_aligned(p.a, p.a_stride, p.dtype), b_aligned,
                          rows_are_aligned(p.out, p.out_stride, p.out_dtype)};
  launch<Start::kEarly>(
      line_major ? grouped_gemm_any_kernel<Shape, true> : grouped_gemm_any_kernel<Shape, false>,
      items < resident ? items : resident, kMmaThreads, Shape::kBytes, stream, p, Divisor(columns),
      aligned);
}

template <typename T>
void launch_any(const GroupedGemm& p, cudaStream_t stream) {
  // rows, columns, bytes of a line and stages of a tile; rows of warps
  using SomeRows = TileShape<T, 64, 128, 64, 4, 2>;
  const int height = p.row_tiles.height;
  if (std::is_same_v<T, float> || (16 < height && height <= 64)) {
    launch_any_shape<SomeRows>(p, stream);
  } else if constexpr (!std::is_same_v<T, float>) {
    height <= 16 ? launch_any_shape<TileShape<T, 16, 128, 128, 4, 1>>(p, stream)
                 : launch_any_shape<TileShape<T, 128, 128, 64, 4, 2>>(p, stream);
  }
}

}  // namespace simple_moe::cuda
