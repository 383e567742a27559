// What a warpgroup of grouped_gemm's kernel does with the slots of the ring, by wgmma: the tensor
// cores read both operands from shared memory themselves, while the warps copy.
#pragma once

#include "accumulators.cuh"
#include "copier.cuh"

namespace simple_moe::cuda {

// A warpgroup has 64 rows of the tile and all its columns, each of its four warps 16 of the rows.
template <typename T, typename Shape>
class WgmmaTile : public Accumulators<T, Shape> {
  using Base = Accumulators<T, Shape>;
  using Base::acc_;
  static_assert(Base::kI == 1 && Shape::kWarpCols == 1 && Shape::kDepth == 64);

 public:
  // Whether an item has rows for this warpgroup. The same in all its threads, and known to be.
  __device__ static int live(const Item& item) {
    return __shfl_sync(0xffffffffu, item.row_count > first_row(), 0);
  }

  // One item's product, to be settled: each step's is asked for while the one before it is under
  // way.
  __device__ void multiply_item(int steps, int, Copier<Shape>& copier, Cursor<Shape>& cursor) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint64_t a = ptx::wgmma_operand(cursor.slot + first_row() * Shape::kLineBytes);
      const uint64_t b = ptx::wgmma_operand(cursor.slot + Shape::kABytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int k16 = 0; k16 < Shape::kDepth / 16; ++k16) {
        ptx::wgmma<T>(acc_[0], ptx::advance(a, k16 * 32), ptx::advance(b, k16 * 32));
      }
      ptx::wgmma_commit();
      copier.template copy<0, copier.kPasses>(cursor.free);
      next_step(copier, cursor);
    }
  }

  // The sums are there.
  __device__ void settle() {
    ptx::wgmma_wait<0>();
    ptx::wgmma_done(acc_[0]);
  }

 private:
  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 128 * 64; }
};

}  // namespace simple_moe::cuda
