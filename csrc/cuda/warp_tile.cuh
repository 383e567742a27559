// What a warp of grouped_gemm's kernel does with the slots of the ring, by mma.sync.
#pragma once

#include "accumulators.cuh"
#include "copier.cuh"

namespace simple_moe::cuda {

template <typename T, typename Shape>
class WarpTile : public Accumulators<T, Shape> {
  using Base = Accumulators<T, Shape>;
  using Base::acc_, Base::column, Base::row, Base::kI, Base::kJ;

 public:
  // How many times 16 rows of this warp an item has. The same in all lanes, and known to be.
  __device__ static int live(const Item& item) {
    const int rows = item.row_count - row(0);
    const int live = rows <= 0 ? 0 : (rows + row(1) - row(0) - 1) / (row(1) - row(0));
    return __shfl_sync(0xffffffffu, live, 0);
  }

  __device__ void settle() {}

  // One item's product.
  __device__ void multiply_item(int steps, int live, Copier<Shape>& copier, Cursor<Shape>& cursor) {
    load_first(cursor.slot);
    multiply_steps<kI>(steps, live, copier, cursor);
  }

 private:
  // Multiplies `live` times 16 rows, or some more: a loop for each number, for branches between the
  // products cost as much as they leave out. For half of them and fewer there is one: all loops
  // share their registers, and 160 x 256 with more of them spills.
  template <int kLive>
  __device__ void multiply_steps(int steps, int live, Copier<Shape>& copier,
                                 Cursor<Shape>& cursor) {
    if constexpr (kLive > 1 && kLive > kI / 2) {
      if (live < kLive) return multiply_steps<kLive - 1>(steps, live, copier, cursor);
    }
    for (int step = 0; step < steps; ++step) multiply_step<kLive>(copier, cursor);
  }

  // The copies are spread over the products.
  template <int kLive, int kPair = 0>
  __device__ void multiply_step(Copier<Shape>& copier, Cursor<Shape>& cursor) {
    constexpr int kPairs = Shape::kDepth / 32, kParts = 2 * kPairs - 1;
    constexpr auto first_pass = [](int part) { return part * Copier<Shape>::kPasses / kParts; };
    multiply<kLive, 0>(
        [&] { return uint2{cursor.slot, 2 * kPair + 1}; },
        [&] {
          copier.template copy<first_pass(2 * kPair), first_pass(2 * kPair + 1)>(cursor.free);
        });
    multiply<kLive, 1>(
        [&] {
          if constexpr (kPair + 1 < kPairs) return uint2{cursor.slot, 2 * kPair + 2};
          next_step(copier, cursor);
          return uint2{cursor.slot, 0};
        },
        [&] {
          if constexpr (kPair + 1 < kPairs) {
            copier.template copy<first_pass(2 * kPair + 1), first_pass(2 * kPair + 2)>(cursor.free);
          }
        });
    if constexpr (kPair + 1 < kPairs) multiply_step<kLive, kPair + 1>(copier, cursor);
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
  // is called, the fragments are on their way, and nothing waits for its instructions. Only the
  // first kLive times 16 rows are multiplied.
  template <int kLive, int kSet, typename Next, typename Copy>
  __device__ void multiply(const Next& next, const Copy& copy) {
    multiply_row<kSet>(0);
    const auto [slot, k16] = next();
    load_b<kSet ^ 1>(slot, k16);
    load_a(0, slot, k16);
    if constexpr (kLive == 1) copy();
#pragma unroll
    for (int i = 1; i < kLive; ++i) {
      multiply_row<kSet>(i);
      load_a(i, slot, k16);
      if (i == 1) copy();
    }
  }

  template <int kSet>
  __device__ void multiply_row(int i) {
#pragma unroll
    for (int n = 0; n < kJ; ++n) {
      // There and back: what of b the last product had, the next row's first has too.
      const int j = i % 2 ? kJ - 1 - n : n;
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

  uint32_t a_[kI][4], b_[2][kJ / 2][4];
};

}  // namespace simple_moe::cuda
