// A tile's sums in its warps' registers, and what becomes of them.
#pragma once

#include "gemm_shape.cuh"
#include "ptx.cuh"

namespace simple_moe::cuda {

// A lane's four of 16 rows and 8 columns, or gates, by way of any activation but the two SwiGLUs of
// most models. A call, which shapes share: inlined it would be a fifth of what is compiled of a
// kernel.
using Four = Vector<float, 4>;
static __device__ __noinline__ Four activate_four(Activation kind, ActivationScalars scalars,
                                                  Four four, Four ups) {
  is_gated(kind) ? activate_gated<4>(kind, scalars, four.values, ups.values)
                 : activate<4>(kind, four.values);
  return four;
}

// A warp's part of a tile. Lane l has, of each 16 rows and 8 columns, two columns from l % 4 * 2 on
// of rows l / 4 and l / 4 + 8.
template <typename T, typename Shape_>
class Accumulators {
 public:
  using Shape = Shape_;
  static constexpr int kI = Shape::kI, kJ = Shape::kJ;
  // A piece of kStagedCols columns is stored at a time.
  static constexpr int kStagedJ = Shape::kStagedCols / 8, kPiecesOfRow = kJ / kStagedJ;

  // The tile's row where this warp's 16 rows number `i` begin: the warps take turns, so that all
  // have as much to do where the tile has few rows.
  __device__ static int row(int i) {
    const int warp_row = static_cast<int>(threadIdx.x) / 32 / Shape::kWarpCols;
    return (i * Shape::kWarpRows + warp_row) * 16;
  }
  __device__ static int column() {
    return static_cast<int>(threadIdx.x) / 32 % Shape::kWarpCols * Shape::kColsOfWarp;
  }

  // Where a lane's row goes, and its routing weight. A warp looks up two times 16 rows at once, and
  // the next as many while these are stored, for memory takes as long.
  struct Target {
    int row;
    float weight;
  };
  __device__ static Target target_of(const GroupedGemm& p, const Item& item, int i) {
    const int lane = threadIdx.x % 32, row_of_tile = row(i + lane / 16) + lane % 16;
    const int row = item.row_begin + row_of_tile;
    const bool there = row_of_tile < item.row_count;
    return {there && p.out_rows ? p.out_rows[row] : row,
            there && p.row_weights.data ? load_float(p.row_weights, row) : 1.0f};
  }

  // Bias, activation, routing weight, rounding, all in registers; then 16 rows at a time through
  // `staged`, this warp's own, so that a thread stores a vector. All of it is unrolled, and what it
  // needs at hand: two warps of a scheduler can't hide a loop's branches and its look-ups, which
  // took two thirds of the time. `next`: target_of(0).
  __device__ void finish(const GroupedGemm& p, const Item& item, unsigned char* staged,
                         Target next) {
    const Activation kind = p.activation.kind;
    if (p.bias.data && item.part == 0) add_bias(p, item, reinterpret_cast<float*>(staged));
    if (kind == Activation::kSwiglu) {
      activate_all<true>(Activation::kSwiglu, p, item);
    } else if (kind != Activation::kIdentity) {
      kind == Activation::kSwigluOai ? activate_all<true>(Activation::kSwigluOai, p, item)
                                     : activate_all<false>(kind, p, item);
    }
    is_gated(kind)                   ? store<T, true>(p, item, staged, next)
    : p.out_dtype == DType::kFloat32 ? store<float, false>(p, item, staged, next)
                                     : store<T, false>(p, item, staged, next);
  }

 protected:
  float acc_[kI][kJ][4] = {};

 private:
  // Where it is inlined, `kind` is known to the compiler.
  template <bool kInlined>
  __device__ __forceinline__ void activate_all(Activation kind, const GroupedGemm& p,
                                               const Item& item) {
    const ActivationScalars scalars = scalars_of(p.activation, item.expert);
#pragma unroll
    for (int i = 0; i < kI && row(i) < item.row_count; ++i) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        if (j % 2 == 1 && is_gated(kind)) continue;
        auto &x = acc_[i][j], &ups = acc_[i][j ^ 1];
        auto &four = reinterpret_cast<Four&>(x), &of_ups = reinterpret_cast<Four&>(ups);
        if (kInlined) activate_gated<4>(kind, scalars, x, ups);
        if (!kInlined) four = activate_four(kind, scalars, four, of_ups);
      }
    }
  }

  // A column's is looked up by one lane, all before the first is waited for, and passed on through
  // `staged`.
  __device__ void add_bias(const GroupedGemm& p, const Item& item, float* staged) {
    const int64_t first = item.expert * (is_gated(p.activation.kind) ? 2 * p.n : p.n);
    const int lane = threadIdx.x % 32;
    uint32_t bits[(kJ + 3) / 4] = {};
#pragma unroll
    for (int j = 0; j < kJ; j += 4) {
      const int line = column() + j * 8 + lane;
      if (column_of_line<Shape>(p, item, line) < p.n)
        bits[j / 4] = load_bits(p.bias, first + row_of_line<Shape>(p, item, line));
    }
#pragma unroll
    for (int j = 0; j < kJ; j += 4) staged[j * 8 + lane] = float_of(p.bias.dtype, bits[j / 4]);
    __syncwarp();  // The biases are there.
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
      const float2 x = *reinterpret_cast<const float2*>(staged + j * 8 + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < kI; ++i) {
        acc_[i][j][0] += x.x, acc_[i][j][1] += x.y;
        acc_[i][j][2] += x.x, acc_[i][j][3] += x.y;
      }
    }
    __syncwarp();  // All have read them.
  }

  // All columns, or those of the gates: rounded to shared memory, where a lane has two neighbours
  // of each 8, and from there to `out` by vectors.
  template <typename Out, bool kGated>
  __device__ void store(const GroupedGemm& p, const Item& item, unsigned char* staged,
                        Target next) const {
    // Of the output: what a piece has of it, and what is staged at a time.
    constexpr int kCols = Shape::kStagedCols / (kGated ? 2 : 1), kRows = 32 / sizeof(Out);
    constexpr int kPitch = kCols * sizeof(Out) + 16, kOfVector = 16 / sizeof(Out);
    constexpr int kVectors = kCols / kOfVector, kAtOnce = 32 / kVectors;  // of a row; rows a warp
    const int lane = threadIdx.x % 32, row_count = item.row_count;
    const int first_column = (item.column_tile * Shape::kCols + column()) / (kGated ? 2 : 1) +
                             lane % kVectors * kOfVector;
    char* const out =
        static_cast<char*>(p.out) + (item.part * p.n + first_column) * int64_t{sizeof(Out)};
    const auto stride = static_cast<uint32_t>(p.out_stride) * static_cast<uint32_t>(sizeof(Out));
    unsigned char* const to = staged + lane / 4 * kPitch + lane % 4 * 2 * sizeof(Out);
    const unsigned char* const from =
        staged + lane / kVectors % kRows * kPitch + lane % kVectors * 16;
    const bool keep = p.keep_out;
    Target target{};
#pragma unroll
    for (int i = 0; i < kI; ++i) {
      if (row(i) >= row_count) break;
      if (i % 2 == 0) {
        target = next;
        next = target_of(p, item, i + 2);
      }
#pragma unroll
      for (int first = 0; first < 16 * kPiecesOfRow; first += kRows) {
        const int first_row = first % 16, piece = first / 16;
#pragma unroll
        for (int half = 0; half < kRows; half += 8) {
          const int of_16 = first_row + half;
          const float weight =
              __shfl_sync(0xffffffffu, target.weight, i % 2 * 16 + of_16 + lane / 4);
#pragma unroll
          for (int j = 0; j < kCols / 8; ++j) {
            const float* const sums =
                acc_[i][piece * kStagedJ + (kGated ? 2 * j : j)] + of_16 / 8 * 2;
            const float x = sums[0] * weight, y = sums[1] * weight;
            Out* const pair = reinterpret_cast<Out*>(to + half * kPitch) + j * 8;
            if constexpr (sizeof(Out) == 4) *reinterpret_cast<float2*>(pair) = {x, y};
            if constexpr (sizeof(Out) == 2)
              *reinterpret_cast<uint32_t*>(pair) = ptx::pack<Out>(x, y);
          }
        }
        __syncwarp();  // The rows are there.
#pragma unroll
        for (int n = 0; n < kRows; n += kAtOnce) {
          const int of_16 = first_row + n, column = first_column + piece * kCols;
          const uint4 vector = *reinterpret_cast<const uint4*>(from + n * kPitch);
          const int to_row =
              __shfl_sync(0xffffffffu, target.row, i % 2 * 16 + of_16 + lane / kVectors);
          const bool there = row(i) + of_16 + lane / kVectors < row_count && column < p.n &&
                             (kAtOnce <= kRows || lane / kVectors < kRows);
          ptx::store_16_if(there, ptx::advance(out, to_row, stride) + piece * kCols * sizeof(Out),
                           vector, keep);
        }
        __syncwarp();  // Nobody needs them any more.
      }
    }
  }
};

}  // namespace simple_moe::cuda
