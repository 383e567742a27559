// A tile's sums in its warps' registers, and what becomes of them.
#pragma once

#include "gemm_shape.cuh"
#include "ptx.cuh"

namespace simple_moe::cuda {

// Of a warp's staged sums, rows of so many groups of 8 columns, laid out as Accumulators has them:
// a lane takes four columns, or gates, in whose place the result goes. A call, which shapes share:
// inlined it would be a fifth of what is compiled of a kernel.
template <int kRows, int kGroups, int kPitch, int kOddAt>
static __device__ __noinline__ void activate_staged(Activation kind, ActivationScalars scalars,
                                                    float* floats) {
  constexpr int kFours = kGroups * kRows;  // of the gates, if there are
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < (is_gated(kind) ? kFours : 2 * kFours); i += 32) {
    float* const at = floats + i % kFours / kGroups * kPitch + i % kGroups * 4;
    auto& four = *reinterpret_cast<Vector<float, 4>*>(at + i / kFours * kOddAt);
    auto [values] = four;
    auto [ups] = *reinterpret_cast<const Vector<float, 4>*>(at + kOddAt);
    is_gated(kind) ? activate_gated<4>(kind, scalars, values, ups) : activate<4>(kind, values);
    four = {values[0], values[1], values[2], values[3]};
  }
  __syncwarp();  // The activations are there.
}

// A warp's part of a tile. Lane l has, of each 16 rows and 8 columns, two columns from l % 4 * 2 on
// of rows l / 4 and l / 4 + 8.
template <typename T, typename Shape_>
class Accumulators {
 public:
  using Shape = Shape_;
  static constexpr int kI = Shape::kI, kJ = Shape::kJ;
  // What is finished at a time: kStagedRows rows of kStagedCols columns.
  static constexpr int kPiecesOfRow = Shape::kColsOfWarp / Shape::kStagedCols;
  static constexpr int kPieces = Shape::kRowsOfWarp / Shape::kStagedRows * kPiecesOfRow;

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
  // the next as many while these are written: memory takes longer than a piece.
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

  // Bias, activation, routing weight, rounding: a few rows at a time through `staged`, this warp's
  // own, so that a thread gets 8 neighbouring columns. SwiGLU is made of them on the way; any other
  // activation, as a bias, has a pass of its own over what is staged, which is less code: in the
  // loops of store() they would be a third of a kernel. `next`: target_of(0).
  __device__ void finish(const GroupedGemm& p, const Item& item, unsigned char* staged,
                         Target next) const {
    float* const floats = reinterpret_cast<float*>(staged);
    Target target{};
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      if (first_row(piece) >= item.row_count) break;
      constexpr int kPiecesOfTarget = 32 / Shape::kStagedRows * kPiecesOfRow;
      if (piece % kPiecesOfTarget == 0) {
        target = next;
        next = target_of(p, item, piece / kPiecesOfTarget * 2 + 2);
      }
      stage(piece, floats);
      __syncwarp();
      if (p.bias.data && item.part == 0) add_staged_bias(p, item, piece, floats);
      const Activation kind = p.activation.kind;
      if (kind != Activation::kSwiglu && kind != Activation::kIdentity) {
        activate_staged<Shape::kStagedRows, kStagedJ, Shape::kStagedPitch, kOddAt>(
            kind, scalars_of(p.activation, item.expert), floats);
      }
      kind == Activation::kSwiglu      ? store<T, true, true>(p, item, piece, target, floats)
      : is_gated(kind)                 ? store<T, true, false>(p, item, piece, target, floats)
      : p.out_dtype == DType::kFloat32 ? store<float, false, false>(p, item, piece, target, floats)
                                       : store<T, false, false>(p, item, piece, target, floats);
      __syncwarp();
    }
  }

 protected:
  float acc_[kI][kJ][4] = {};

 private:
  static constexpr int kStagedJ = Shape::kStagedCols / 8;
  // Where the staged groups of 8 columns lie: the even ones, then the odd ones, shifted by four
  // banks. So gates stand apart from ups, and neither side's accesses meet in a bank more than
  // twice.
  static constexpr int kOddAt = Shape::kStagedCols / 2 + 4;

  // A branch for each, or the accumulators would have to be chosen one by one: no index of an array
  // in registers may be a variable.
  template <int kPiece = 0>
  __device__ void stage(int piece, float* floats) const {
    if constexpr (kPiece < kPieces) {
      if (piece != kPiece) return stage<kPiece + 1>(piece, floats);
      const int lane = threadIdx.x % 32;
      float* const to = floats + lane / 4 * Shape::kStagedPitch + lane % 4 * 2;
#pragma unroll
      for (int row = 0; row < Shape::kStagedRows; row += 8) {
        constexpr int kFirst = kPiece / kPiecesOfRow * Shape::kStagedRows;
#pragma unroll
        for (int j = 0; j < kStagedJ; ++j) {
          const int of_warp = kPiece % kPiecesOfRow * kStagedJ + j;
          const float* const from = acc_[kFirst / 16][of_warp] + (kFirst + row) % 16 / 8 * 2;
          *reinterpret_cast<float2*>(to + row * Shape::kStagedPitch + j % 2 * kOddAt +
                                     j / 2 * 8) = {from[0], from[1]};
        }
      }
    }
  }

  // A lane a column. Apart from the loops that store: most layers have no bias.
  __device__ static void add_staged_bias(const GroupedGemm& p, const Item& item, int piece,
                                         float* floats) {
    const int64_t first = item.expert * (is_gated(p.activation.kind) ? 2 * p.n : p.n);
#pragma unroll 1
    for (int column = threadIdx.x % 32; column < Shape::kStagedCols; column += 32) {
      const int line = column_of_piece(piece) + column;
      if (column_of_line<Shape>(p, item, line) >= p.n) continue;
      const float bias = load_float(p.bias, first + row_of_line<Shape>(p, item, line));
      float* const to = floats + column / 8 % 2 * kOddAt + column / 16 * 8 + column % 8;
      for (int row = 0; row < Shape::kStagedRows; ++row) to[row * Shape::kStagedPitch] += bias;
    }
    __syncwarp();  // The bias is there.
  }

  __device__ static int column_of_piece(int piece) {
    return column() + piece % kPiecesOfRow * Shape::kStagedCols;
  }
  // The tile's row where a piece begins.
  __device__ static int first_row(int piece) {
    const int first = piece / kPiecesOfRow * Shape::kStagedRows;
    return row(first / 16) + first % 16;
  }

  // The staged rows of a piece, some at once, a lane a vector: all columns, or those of the gates,
  // by way of kSwiglu.
  template <typename Out, bool kGated, bool kSwiglu>
  __device__ static void store(const GroupedGemm& p, const Item& item, int piece, Target target,
                               const float* floats) {
    constexpr int kVectors = kGated ? kStagedJ / 2 : kStagedJ;  // of a row
    constexpr int kAtOnce = 32 / kVectors;
    const int lane = threadIdx.x % 32, vector = lane % kVectors;
    const int line = item.column_tile * Shape::kCols + column_of_piece(piece);
    const int column = line / (kGated ? 2 : 1) + vector * kVector;
    const bool there = lane < kAtOnce * kVectors && column < p.n;
    const int rows = min(Shape::kStagedRows, item.row_count - first_row(piece));
#pragma unroll(Shape::kWgmma ? 2 : 1)
    for (int row = lane / kVectors; row - lane / kVectors < Shape::kStagedRows; row += kAtOnce) {
      const int of_target = (piece / kPiecesOfRow * Shape::kStagedRows + row) % 32;
      const int64_t to_row = __shfl_sync(0xffffffffu, target.row, of_target);
      const float weight = __shfl_sync(0xffffffffu, target.weight, of_target);
      if (there && row < rows) {
        const float* const from = floats + row * Shape::kStagedPitch;
        const int at = kGated ? vector * kVector : vector % 2 * kOddAt + vector / 2 * kVector;
        auto [values] = *reinterpret_cast<const Vector<float>*>(from + at);
        if constexpr (kSwiglu) {
          const auto [ups] = *reinterpret_cast<const Vector<float>*>(from + at + kOddAt);
          activate_gated<kVector>(Activation::kSwiglu, {}, values, ups);
        }
        for (float& value : values) value *= weight;
        const int64_t to = to_row * p.out_stride + item.part * p.n + column;
        store_vector(static_cast<Out*>(p.out) + to, kVector, true, values, p.keep_out);
      }
    }
  }
};

}  // namespace simple_moe::cuda
