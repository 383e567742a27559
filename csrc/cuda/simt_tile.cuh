// One output tile's product in IEEE float32 on the plain cores: any strides, any sizes.
//
// Schedule: the block loads 16 of k of both operands into shared memory, element by element, waits,
// multiplies, waits. A thread owns 8 x 4 outputs and adds in ascending k.
#pragma once

#include "ptx.cuh"

namespace simple_moe {

struct SimtShape {
  static constexpr int kRows = 64, kCols = 64, kDepth = 16;
  static constexpr int kThreads = 128;
  static constexpr int kPitch = kCols + 8, kStagedRows = kRows;
  static constexpr int kBytes = kRows * kPitch * 4;  // of the staged result; the operands are less
};

class SimtTile {
 public:
  using Shape = SimtShape;

  // a(row, k) and b(column, k) give elements, zero where there are none.
  template <typename A, typename B>
  __device__ void multiply(const A& a, const B& b, int64_t k, unsigned char* smem) {
    // One row or column more, so that a line's elements lie in different banks.
    float* const as = reinterpret_cast<float*>(smem);
    float* const bs = as + Shape::kDepth * (Shape::kRows + 1);
    for (int64_t first_k = 0; first_k < k; first_k += Shape::kDepth) {
      for (int i = threadIdx.x; i < Shape::kRows * Shape::kDepth; i += Shape::kThreads) {
        const int depth = i % Shape::kDepth, line = i / Shape::kDepth;
        const bool valid = first_k + depth < k;
        as[depth * (Shape::kRows + 1) + line] = valid ? a(line, first_k + depth) : 0.0f;
        bs[depth * (Shape::kCols + 1) + line] = valid ? b(line, first_k + depth) : 0.0f;
      }
      __syncthreads();
#pragma unroll 4
      for (int depth = 0; depth < Shape::kDepth; ++depth) {
        float a_values[8], b_values[4];
#pragma unroll
        for (int i = 0; i < 8; ++i) a_values[i] = as[depth * (Shape::kRows + 1) + row(i)];
#pragma unroll
        for (int j = 0; j < 4; ++j) b_values[j] = bs[depth * (Shape::kCols + 1) + column(j)];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc_[i][j] = fmaf(a_values[i], b_values[j], acc_[i][j]);
        }
      }
      __syncthreads();
    }
  }

  // As MmaTile's, in one piece.
  template <typename Finish>
  __device__ void stage(unsigned char* smem, const Finish& finish) const {
    float* const staged = reinterpret_cast<float*>(smem);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) staged[row(i) * Shape::kPitch + column(j)] = acc_[i][j];
    }
    __syncthreads();
    finish(0, staged);
    __syncthreads();
  }

 private:
  static_assert(Shape::kRows == Shape::kCols, "both operands are loaded in one loop");
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / 16 + 8 * i; }
  __device__ static int column(int j) { return static_cast<int>(threadIdx.x) % 16 + 16 * j; }

  float acc_[8][4] = {};
};

}  // namespace simple_moe
