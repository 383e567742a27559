// What a warp of grouped_gemm's kernel does with the slots of the ring: products, and the end of a
// tile.
#pragma once

#include "gemm_shape.cuh"
#include "ptx.cuh"

namespace simple_moe::cuda {

// A warp's part of a tile in its accumulators.
template <typename T, typename Shape>
class WarpTile {
 public:
  static constexpr int kI = Shape::kI, kJ = Shape::kJ;
  // Of the rows, that are finished one after another.
  static constexpr int kPieces = Shape::kRowsOfWarp / Shape::kStagedRows;

  // The tile's row where this warp's 16 rows number `i` begin: the warps take turns, so that all
  // have as much to do where the tile has few rows.
  __device__ static int row(int i) {
    const int warp_row = static_cast<int>(threadIdx.x) / 32 / Shape::kWarpCols;
    return (i * Shape::kWarpRows + warp_row) * 16;
  }
  __device__ static int column() {
    return static_cast<int>(threadIdx.x) / 32 % Shape::kWarpCols * Shape::kColsOfWarp;
  }

  // Where the sums begin: at the bias, or at zero. `staged`: as for finish().
  __device__ void begin(const GroupedGemm& p, const Item& item, unsigned char* staged) {
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
      for (int j = 0; j < kJ; ++j)
        acc_[i][j][0] = acc_[i][j][1] = acc_[i][j][2] = acc_[i][j][3] = 0;
    }
    if (!p.bias.data) return;
    float* const bias = reinterpret_cast<float*>(staged);
    const int64_t first = item.expert * (is_gated(p.activation.kind) ? 2 * p.n : p.n);
#pragma unroll 1
    for (int line = threadIdx.x % 32; line < Shape::kColsOfWarp; line += 32) {
      const bool there = column_of_line<Shape>(p, item, column() + line) < p.n;
      bias[line] =
          there ? load_float(p.bias, first + row_of_line<Shape>(p, item, column() + line)) : 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const float value = bias[j * 8 + threadIdx.x % 4 * 2 + q];
#pragma unroll
        for (int i = 0; i < kI; ++i) acc_[i][j][q] = acc_[i][j][q + 2] = value;
      }
    }
    __syncwarp();
  }

  // How many times 16 rows of this warp an item has. The same in all lanes, and known to be.
  __device__ static int live(const Item& item) {
    const int rows = item.row_count - row(0);
    const int live = rows <= 0 ? 0 : (rows + row(1) - row(0) - 1) / (row(1) - row(0));
    return __shfl_sync(0xffffffffu, live, 0);
  }

  // The fragments of a slot's first 16 of k.
  __device__ void load_first(uint32_t slot) {
    load_b<0>(slot, 0);
#pragma unroll
    for (int i = 0; i < kI; ++i) load_a(i, slot, 0);
  }

  // Multiplies 16 of k and reads the fragments of the next: b's into the other of two sets of
  // registers, a's into those just used. `next()` says where they are: a slot, and which 16 of its
  // k; it may wait, for the tensor cores have been given work by then. So they have when `copy()`
  // is called, the fragments are on their way, and nothing waits for its instructions. Unless kAll
  // is true only the first `live` times 16 rows are multiplied.
  template <bool kAll, int kSet, typename Next, typename Copy>
  __device__ void multiply(int live, const Next& next, const Copy& copy) {
    multiply_row<kSet>(0);
    const auto [slot, k16] = next();
    load_b<kSet ^ 1>(slot, k16);
    load_a(0, slot, k16);
    if constexpr (kI == 1) copy();
#pragma unroll
    for (int i = 1; i < kI; ++i) {
      if (kAll || i < live) {
        multiply_row<kSet>(i);
        load_a(i, slot, k16);
      }
      if (i == 1) copy();
    }
  }

  // Activation, routing weight, rounding: a few rows at a time through `staged`, this warp's own,
  // so that a thread gets 8 neighbouring columns and the code of the activations stands once.
  __device__ void finish(const GroupedGemm& p, const Item& item, unsigned char* staged) const {
    // The routing weight of a lane's row of the piece: it has a piece's time to come.
    const auto weight_of = [&](int piece) {
      const int row_of_tile = first_row(piece) + threadIdx.x % Shape::kStagedRows;
      const bool there = p.row_weights.data && row_of_tile < item.row_count;
      return there ? load_float(p.row_weights, item.row_begin + row_of_tile) : 1.0f;
    };
    float next_weight = weight_of(0);
    float* const floats = reinterpret_cast<float*>(staged);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      if (first_row(piece) >= item.row_count) break;
      const float weight = next_weight;
      next_weight = weight_of(piece + 1);
      stage(piece, floats);
      __syncwarp();
      if (is_gated(p.activation.kind)) {
        store<true>(p, item, piece, weight, floats);
      } else {
        store<false>(p, item, piece, weight, floats);
      }
      __syncwarp();
    }
  }

 private:
  template <int kSet>
  __device__ void multiply_row(int i) {
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
      ptx::mma_m16n8k16<T>(acc_[i][j], a_[i], b_[kSet][j / 2][j % 2 * 2],
                           b_[kSet][j / 2][j % 2 * 2 + 1]);
    }
  }
  __device__ void load_a(int i, uint32_t slot, int k16) {
    const int lane = threadIdx.x % 32;
    const uint32_t first = slot + Shape::place(row(0) + lane % 16, lane / 16);
    ptx::ldmatrix_x4(a_[i], (first ^ (k16 * 32)) + i * 16 * Shape::kWarpRows * Shape::kLineBytes);
  }
  template <int kSet>
  __device__ void load_b(uint32_t slot, int k16) {
    const int lane = threadIdx.x % 32;
    const uint32_t first =
        slot + Shape::kABytes + Shape::place(column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int j = 0; j < kJ / 2; ++j) {
      ptx::ldmatrix_x4(b_[kSet][j], (first ^ (k16 * 32)) + j * 16 * Shape::kLineBytes);
    }
  }

  // Where the staged groups of 8 columns lie: the even ones, then the odd ones, shifted by four
  // banks. So gates stand apart from ups, and neither side's accesses meet in a bank more than
  // twice.
  static constexpr int kOddAt = Shape::kColsOfWarp / 2 + 4;

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
        constexpr int kFirst = kPiece * Shape::kStagedRows;
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
          const float* const from = acc_[kFirst / 16][j] + (kFirst + row) % 16 / 8 * 2;
          *reinterpret_cast<float2*>(to + row * Shape::kStagedPitch + j % 2 * kOddAt +
                                     j / 2 * 8) = {from[0], from[1]};
        }
      }
    }
  }

  // The tile's row where a piece begins.
  __device__ static int first_row(int piece) {
    const int first = piece * Shape::kStagedRows;
    return row(first / 16) + first % 16;
  }

  // The staged rows of a piece. `weight` is that of row lane % kStagedRows.
  template <bool kGated>
  __device__ static void store(const GroupedGemm& p, const Item& item, int piece, float weight,
                               const float* floats) {
    constexpr int kVectors = kGated ? kJ / 2 : kJ;  // of a row
    const int first_column = (item.column_tile * Shape::kCols + column()) / (kGated ? 2 : 1);
#pragma unroll 1
    for (int first = 0; first < Shape::kStagedRows * kVectors; first += 32) {
      const int number = first + threadIdx.x % 32;
      const int row_of_piece = number / kVectors, vector = number % kVectors;
      const float of_row = __shfl_sync(0xffffffffu, weight, row_of_piece);
      const int row_of_tile = first_row(piece) + row_of_piece;
      const int column = first_column + vector * kVector;
      if (row_of_piece >= Shape::kStagedRows || row_of_tile >= item.row_count || column >= p.n)
        continue;
      const float* const from = floats + row_of_piece * Shape::kStagedPitch;
      float values[kVector];
      if constexpr (kGated) {
        float ups[kVector];
        load_vector(from + vector * kVector, values);
        load_vector(from + kOddAt + vector * kVector, ups);
        activate_gated<kVector>(p.activation.kind, scalars_of(p.activation, item.expert), values,
                                ups);
      } else {
        load_vector(from + vector % 2 * kOddAt + vector / 2 * kVector, values);
        activate<kVector>(p.activation.kind, values);
      }
      uint4 packed;
      pack(values[0] * of_row, values[1] * of_row, packed.x);
      pack(values[2] * of_row, values[3] * of_row, packed.y);
      pack(values[4] * of_row, values[5] * of_row, packed.z);
      pack(values[6] * of_row, values[7] * of_row, packed.w);
      const int64_t to = (item.row_begin + row_of_tile) * p.out_stride + column;
      *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + to) = packed;
    }
  }

  __device__ static void load_vector(const float* from, float (&values)[kVector]) {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
  __device__ static void pack(float low, float high, uint32_t& to) {
    to = static_cast<uint32_t>(ptx::from_float<T>(high).bits) << 16 | ptx::from_float<T>(low).bits;
  }

  float acc_[kI][kJ][4];
  uint32_t a_[kI][4], b_[2][kJ / 2][4];
};

}  // namespace simple_moe::cuda
