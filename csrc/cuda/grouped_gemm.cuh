// grouped_gemm's kernel for rows of whole 16-byte vectors: gather, product, bias, activation,
// routing weight, one rounding.
//
// Schedule, for a persistent block: it claims output tiles (ItemQueue), and its threads copy
// both operands, kDepth of k at a time, into a ring of kStages slots with cp.async. The copies run
// kStages - 1 slots ahead of the product and on across tiles, so that memory never idles while a
// tile is finished. The one barrier of a step comes when everybody holds the slot's last fragments
// in registers; the slot is refilled during the next step, piece by piece between its products.
// Fragments of the next 16 of k are read while these are multiplied. In flight:
// (kStages - 1) * (kRows + kCols) * kDepth * 2 bytes a block.
//
// Every accumulator adds its products in ascending k, 16 at a time, in every shape: the bits don't
// depend on the shape chosen.
//
// Shared memory holds 16-byte vectors, permuted (XOR) so that the 8 rows of one ldmatrix lie in
// different banks. Where the activation is gated, 8 columns of gates and their 8 columns of ups
// take turns in a tile: a thread holds both branches of an output, and the first product never
// reaches memory.
#pragma once

#include <stdexcept>

#include "device.h"
#include "epilogue.cuh"
#include "items.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "shapes.h"

namespace simple_moe::cuda {

// What follows from a shape.
template <GemmTile kShape>
struct GemmShape {
  static constexpr int kRows = kShape.rows, kCols = kShape.cols, kDepth = kShape.depth;
  static constexpr int kStages = kShape.stages, kWarpRows = kShape.warp_rows;
  static constexpr int kWarpCols = kShape.warp_cols, kThreads = 32 * kShape.warps();
  static constexpr int kBlocks = kShape.blocks, kBytes = kShape.bytes(), kQueue = kShape.queue();
  static constexpr int kRowsOfWarp = kRows / kWarpRows, kColsOfWarp = kCols / kWarpCols;
  static constexpr int kI = kRowsOfWarp / 16, kJ = kColsOfWarp / 8;  // accumulators of 16 x 8
  static constexpr int kVectors = kDepth / kVector;                  // of a line
  static constexpr int kLineBytes = kDepth * 2;
  static constexpr int kABytes = kRows * kLineBytes, kSlotBytes = kShape.slot_bytes();
  // Lines that all threads copy at once.
  static constexpr int kPass = kThreads / kVectors;
  static constexpr int kPassesA = (kRows + kPass - 1) / kPass, kPassesB = kCols / kPass;
  static constexpr int kStagedRows = kShape.staged_rows(), kStagedBytes = kShape.staged_bytes();
  static constexpr int kStagedPitch = kColsOfWarp + 4;  // floats
  static constexpr int kStagedAt = kStages * kSlotBytes;
  static constexpr int kQueueAt = kStagedAt + kShape.warps() * kStagedBytes;
  static_assert(kRowsOfWarp % 16 == 0 && kColsOfWarp % 16 == 0, "fragments are 16 x 16");
  static_assert(kPass % 16 == 0 && kCols % kPass == 0, "a thread copies gates or ups, not both");
  static_assert(kDepth % 32 == 0, "fragments of b take turns in two sets of registers");

  // Where vector `vector` of a line lies. Lines 8 apart are permuted alike, so that fragments of
  // further lines lie at a fixed distance, and of the next 16 of k at a fixed XOR.
  __device__ static uint32_t place(int line, int vector) {
    constexpr int kLinesOf128Bytes = kVectors < 8 ? 8 / kVectors : 1;
    return line * kLineBytes + ((vector ^ (line / kLinesOf128Bytes % (8 / kLinesOf128Bytes))) << 4);
  }
};

// The output column that a tile's line is for: 8 gates and their 8 ups take turns.
template <typename Shape>
__device__ __forceinline__ int column_of_line(const GroupedGemm& p, const Item& item, int line) {
  return is_gated(p.activation.kind)
             ? item.column_tile * (Shape::kCols / 2) + line / 16 * 8 + line % 8
             : item.column_tile * Shape::kCols + line;
}

// The row of b behind a tile's line. There is none past the last column.
template <typename Shape>
__device__ __forceinline__ int64_t row_of_line(const GroupedGemm& p, const Item& item, int line) {
  const int column = column_of_line<Shape>(p, item, line);
  return is_gated(p.activation.kind) ? branch_row(p, column, line % 16 >= 8) : column;
}

template <typename Shape>
using Queue = ItemQueue<Shape::kCols, Shape::kQueue>;

// Copies the operands of a block's items into the ring, step by step: a thread takes one vector of
// every kPass-th line.
template <typename Shape>
class Copier {
 public:
  static constexpr int kPasses = Shape::kPassesA + Shape::kPassesB;

  __device__ Copier(const GroupedGemm& p, Queue<Shape>& queue)
      : p_(p), queue_(queue), a_stride_(static_cast<uint32_t>(p.a_stride) * 2) {
    begin_item();
  }

  // Passes kFirst ... kLast - 1 of the next step (or of the item's step `ahead` from there): first
  // those of a, then those of b. Past the last item nothing is copied.
  template <int kFirst, int kLast>
  __device__ void copy(uint32_t slot, int ahead = 0) const {
    const int more = ahead * Shape::kLineBytes;
    const bool valid = k_ + ahead * Shape::kDepth < static_cast<int>(p_.k);
    const uint32_t to = slot + Shape::place(line(), vector());
#pragma unroll
    for (int pass = kFirst; pass < kLast; ++pass) {
      constexpr int kPassBytes = Shape::kPass * Shape::kLineBytes;
      if (pass < Shape::kPassesA) {
        const char* const from = ptx::advance(a_, a_rows_[pass], a_stride_);
        if (pass < a_passes_) ptx::cp_async_16(to + pass * kPassBytes, from + more, valid);
      } else if (const int b_pass = pass - Shape::kPassesA; b_pass < b_passes_) {
        const char* const from = ptx::advance(b_, b_pass, b_pass_stride_);
        ptx::cp_async_16(to + Shape::kABytes + b_pass * kPassBytes, from + more, valid);
      }
    }
  }

  // All of it is copied: goes on to the next.
  __device__ void end_step() {
    ptx::cp_async_commit();  // Empty groups keep the count.
    a_ += Shape::kLineBytes;
    b_ += Shape::kLineBytes;
    k_ += Shape::kDepth;
    if (k_ - vector() * kVector >= static_cast<int>(p_.k)) begin_item();
  }

 private:
  __device__ static int vector() { return threadIdx.x % Shape::kVectors; }
  __device__ static int line() { return threadIdx.x / Shape::kVectors; }

  // Past the last item comes one of no rows.
  __device__ void begin_item() {
    const Item item = queue_[begun_];
    queue_.begin(begun_);
    ++begun_;
    k_ = vector() * kVector;
    a_ = static_cast<const char*>(p_.a) + k_ * 2;
    // Rows and columns only grow from pass to pass.
    const int rows = item.row_count - line();
    a_passes_ = rows > 0 ? (rows + Shape::kPass - 1) / Shape::kPass : 0;
#pragma unroll
    for (int pass = 0; pass < Shape::kPassesA; ++pass) {
      const int row = item.row_begin + line() + pass * Shape::kPass;
      a_rows_[pass] = row;
      if (p_.source_rows && pass < a_passes_) a_rows_[pass] = p_.source_rows[row];
    }
    b_ = static_cast<const char*>(p_.b) +
         (item.expert * p_.b_expert_stride +
          row_of_line<Shape>(p_, item, line()) * p_.b_row_stride + k_) *
             2;
    const bool gated = is_gated(p_.activation.kind);
    const bool alternate = gated && p_.gate_layout == GateLayout::kInterleaved;
    constexpr int kPass = Shape::kPass;
    const int columns_of_pass = gated ? kPass / 2 : kPass;
    b_pass_stride_ = columns_of_pass * (alternate ? 4 : 2) * static_cast<uint32_t>(p_.b_row_stride);
    const int left = static_cast<int>(p_.n) - column_of_line<Shape>(p_, item, line());
    b_passes_ = item.row_count > 0 && left > 0
                    ? (gated ? (left - 1) / (kPass / 2) : (left - 1) / kPass) + 1
                    : 0;
  }

  const GroupedGemm& p_;
  Queue<Shape>& queue_;
  unsigned begun_ = 0;
  int k_;                              // of this thread's vector in the next step
  const char* a_;                      // there, in a's row 0
  const char* b_;                      // there, in the first pass's line
  uint32_t a_rows_[Shape::kPassesA];   // read from memory, not needed before the next step
  uint32_t a_stride_, b_pass_stride_;  // bytes
  int a_passes_, b_passes_;            // that have lines
};

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

// The slot being multiplied, and the one before it: just done with, it is to be filled.
template <typename Shape>
struct Cursor {
  __device__ explicit Cursor(uint32_t ring)
      : begin(ring), slot(ring), free(ring + (Shape::kStages - 1) * Shape::kSlotBytes) {}
  __device__ void advance() {
    free = slot;
    slot += Shape::kSlotBytes;
    if (slot == begin + Shape::kStages * Shape::kSlotBytes) slot = begin;
  }

  uint32_t begin, slot, free;
};

// When the next slot has landed for all, and this one is in everybody's registers.
template <typename Shape>
__device__ __forceinline__ void next_step(Copier<Shape>& copier, Cursor<Shape>& cursor) {
  copier.end_step();
  ptx::cp_async_wait<Shape::kStages - 2>();
  __syncthreads();
  cursor.advance();
}

// The copies are spread over the products.
template <bool kAll, int kPair = 0, typename T, typename Shape>
__device__ __forceinline__ void multiply_step(int live, WarpTile<T, Shape>& product,
                                              Copier<Shape>& copier, Cursor<Shape>& cursor) {
  constexpr int kPairs = Shape::kDepth / 32, kParts = 2 * kPairs - 1;
  constexpr auto first_pass = [](int part) { return part * Copier<Shape>::kPasses / kParts; };
  struct Place {
    uint32_t slot;
    int k16;
  };
  product.template multiply<kAll, 0>(
      live, [&] { return Place{cursor.slot, 2 * kPair + 1}; },
      [&] { copier.template copy<first_pass(2 * kPair), first_pass(2 * kPair + 1)>(cursor.free); });
  product.template multiply<kAll, 1>(
      live,
      [&] {
        if constexpr (kPair + 1 < kPairs) return Place{cursor.slot, 2 * kPair + 2};
        next_step(copier, cursor);
        return Place{cursor.slot, 0};
      },
      [&] {
        if constexpr (kPair + 1 < kPairs) {
          copier.template copy<first_pass(2 * kPair + 1), first_pass(2 * kPair + 2)>(cursor.free);
        }
      });
  if constexpr (kPair + 1 < kPairs) {
    multiply_step<kAll, kPair + 1>(live, product, copier, cursor);
  }
}

// One item's product.
template <bool kAll, typename T, typename Shape>
__device__ __forceinline__ void multiply_item(int steps, int live, WarpTile<T, Shape>& product,
                                              Copier<Shape>& copier, Cursor<Shape>& cursor) {
  product.load_first(cursor.slot);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) multiply_step<kAll>(live, product, copier, cursor);
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_gemm_kernel(const GroupedGemm p) {
  if (!p.only_a_is_new) ptx::wait_for_earlier_kernels();
  unsigned char* const smem = ptx::dynamic_smem();
  const uint32_t ring = ptx::keep(ptx::smem_address(smem));
  unsigned char* const staged = smem + Shape::kStagedAt + threadIdx.x / 32 * Shape::kStagedBytes;
  const int steps = static_cast<int>((p.k + Shape::kDepth - 1) / Shape::kDepth);
  Queue<Shape> queue(p, reinterpret_cast<Item*>(smem + Shape::kQueueAt));
  __syncthreads();
  Copier<Shape> copier(p, queue);
  // The weights first: they wait neither for the kernel that writes `a` nor for the rows to be
  // found. Unless the prologue copies more than the first item.
  const bool weights_first = steps >= Shape::kStages;
#pragma unroll 1
  for (int step = 0; weights_first && step < Shape::kStages - 1; ++step) {
    copier.template copy<Shape::kPassesA, copier.kPasses>(ring + step * Shape::kSlotBytes, step);
  }
  if (p.only_a_is_new) ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
#pragma unroll 1
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    const uint32_t slot = ring + step * Shape::kSlotBytes;
    if (!weights_first) copier.template copy<Shape::kPassesA, copier.kPasses>(slot);
    copier.template copy<0, Shape::kPassesA>(slot);
    if (!weights_first) __syncthreads();  // for the queue
    copier.end_step();
  }
  ptx::cp_async_wait<Shape::kStages - 2>();
  __syncthreads();

  Cursor<Shape> cursor(ring);
#pragma unroll 1
  for (unsigned number = 0;; ++number) {
    const Item item = queue[number];
    if (item.row_count == 0) break;
    const int live = WarpTile<T, Shape>::live(item);
    if (live > 0) {
      WarpTile<T, Shape> product;
      product.begin(p, item, staged);
      if (live < Shape::kI) {
        multiply_item<false>(steps, live, product, copier, cursor);
      } else {
        multiply_item<true>(steps, live, product, copier, cursor);
      }
      product.finish(p, item, staged);
    } else {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copier.template copy<0, copier.kPasses>(cursor.free);
        next_step(copier, cursor);
      }
    }
  }
}

template <typename T, GemmTile kShape>
void launch_one(const GroupedGemm& p, cudaStream_t stream) {
  const DeviceInfo& device = device_info();
  const int64_t items =
      p.row_tiles.most * column_tiles(p.n, is_gated(p.activation.kind), kShape.cols);
  const int64_t resident = device.sm_count * resident_blocks(kShape, device);
  launch<Start::kEarly>(grouped_gemm_kernel<T, GemmShape<kShape>>,
                        items < resident ? items : resident, 32 * kShape.warps(), kShape.bytes(),
                        stream, p);
}

template <typename T, int kNumber = 0>
void launch_shape(const GroupedGemm& p, int number, cudaStream_t stream) {
  if constexpr (kNumber < kShapeCount) {
    if (number == kNumber) return launch_one<T, kShapes[kNumber]>(p, stream);
    launch_shape<T, kNumber + 1>(p, number, stream);
  } else {
    throw std::runtime_error("simple_moe: no tile fits this GPU's shared memory, 99 KB are needed");
  }
}

template <typename T>
void launch_best_shape(const GroupedGemm& p, cudaStream_t stream) {
  const ProductSize size{p.rows, p.experts, p.n, p.k, is_gated(p.activation.kind)};
  launch_shape<T>(p, choose_shape(p.row_tiles, size, device_info()), stream);
}

}  // namespace simple_moe::cuda
