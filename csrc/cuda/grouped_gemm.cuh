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

#include <utility>

#include "copier.cuh"
#include "device.h"
#include "launch.h"
#include "warp_tile.cuh"

namespace simple_moe::cuda {

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
__device__ __forceinline__ void multiply_items(const GroupedGemm& p, const Divisor& column_tiles) {
  if (!p.only_a_is_new) ptx::wait_for_earlier_kernels();
  unsigned char* const smem = ptx::dynamic_smem();
  const uint32_t ring = ptx::keep(ptx::smem_address(smem));
  unsigned char* const staged = smem + Shape::kStagedAt + threadIdx.x / 32 * Shape::kStagedBytes;
  const int steps = static_cast<int>((p.k + Shape::kDepth - 1) / Shape::kDepth);
  Queue<Shape> queue(p, column_tiles, reinterpret_cast<Item*>(smem + Shape::kQueueAt));
  __syncthreads();
  Copier<Shape> copier(p, queue);
  // Weights that are copied first: as many as there is time for until `a` has been written, or its
  // rows are found; more would only stand before them in memory's queue. None where the prologue
  // copies more than the first item.
  const int steps_first = steps < Shape::kStages ? 0
                          : p.only_a_is_new      ? Shape::kStages - 1
                          : p.source_rows        ? 2
                                                 : 0;
#pragma unroll 1
  for (int step = 0; step < steps_first; ++step) {
    copier.template copy<Shape::kPassesA, copier.kPasses>(ring + step * Shape::kSlotBytes, step);
  }
  if (p.only_a_is_new) ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
#pragma unroll 1
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    const uint32_t slot = ring + step * Shape::kSlotBytes;
    copier.template copy<0, Shape::kPassesA>(slot);
    if (step >= steps_first) copier.template copy<Shape::kPassesA, copier.kPasses>(slot);
    if (steps < Shape::kStages) __syncthreads();  // for the queue
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
      // A loop of its own pays where there is much to leave out.
      if (Shape::kI > 2 && live < Shape::kI) {
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

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_gemm_kernel(const GroupedGemm p, const Divisor column_tiles) {
#ifdef __CUDA_ARCH__
  // The compiler's time is not spent where this is never launched.
  if constexpr (Shape::kBytes > most_smem(__CUDA_ARCH__ / 10)) return;
#endif
  multiply_items<T, Shape>(p, column_tiles);
}

template <typename T, GemmTile kShape>
void launch_one(const GroupedGemm& p, cudaStream_t stream) {
  const DeviceInfo& device = device_info();
  const int64_t columns = column_tiles(p.n, is_gated(p.activation.kind), kShape.cols);
  const int64_t items = p.row_tiles.most * columns;
  const int64_t resident = device.sm_count * resident_blocks(kShape, device);
  launch<Start::kEarly>(grouped_gemm_kernel<T, GemmShape<kShape>>,
                        items < resident ? items : resident, 32 * kShape.warps(), kShape.bytes(),
                        stream, p, Divisor(columns));
}

template <typename T, int... kNumbers>
bool launch_shape(const GroupedGemm& p, int number, cudaStream_t stream,
                  std::integer_sequence<int, kNumbers...>) {
  return ((number == kNumbers && (launch_one<T, kShapes[kNumbers]>(p, stream), true)) || ...);
}

template <typename T>
void launch_best_shape(const GroupedGemm& p, cudaStream_t stream) {
  const ProductSize size{p.rows, p.experts, p.n, p.k, is_gated(p.activation.kind)};
  const int number = choose_shape(p.row_tiles, size, device_info());
  if (!launch_shape<T>(p, number, stream, std::make_integer_sequence<int, kShapeCount>())) {
    cuda_check(cudaErrorInvalidConfiguration, "no tile fits in less than 99 KB of shared memory");
  }
}

}  // namespace simple_moe::cuda
