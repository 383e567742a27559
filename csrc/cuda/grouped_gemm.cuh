// grouped_gemm's kernel for rows of whole 16-byte vectors: gather, product, bias, activation,
// routing weight, one rounding.
//
// Schedule, for a persistent block: it claims output tiles (ItemQueue), and its threads copy
// both operands, kDepth of k at a time, into a ring of kStages slots with cp.async. The copies run
// kAhead slots ahead of the product and on across tiles, so that memory never idles while a tile is
// finished. In flight: kAhead * (kRows + kCols) * kDepth * 2 bytes a block. The product is one of
// two:
//   WarpTile, mma.sync. The one barrier of a step comes when everybody holds the slot's last
//     fragments in registers; the slot is refilled during the next step, piece by piece between its
//     products. Fragments of the next 16 of k are read while these are multiplied.
//   WgmmaTile, wgmma (sm_90a). Warpgroups ask for a slot's product, copy while the tensor cores
//     read it, and wait for the one before: so theirs is the slot that is refilled in the step
//     after. One step's product is always under way when the barrier comes.
//
// A layer's second product needn't wait for the end of the first: where there are several items a
// block, it waits for its row tile alone. The first counts each tile's columns that it has written
// (publish), an item later, so that it never waits for its own stores. All of its blocks run by the
// time that the second's start, so what these wait for comes.
//
// Where a layer has few tiles k of its second product is split: an item is a part of a tile's k,
// and its sums are written in float32, for combine to add in order.
//
// Every accumulator adds its products in ascending k, 16 at a time, in every shape: the bits don't
// depend on the shape chosen, nor on which of the two (which is measured, not promised by NVIDIA).
//
// Shared memory holds 16-byte vectors, permuted (XOR) so that the 8 rows of one ldmatrix lie in
// different banks; of lines of 128 bytes that is wgmma's own permutation. Where the activation is
// gated, 8 columns of gates and their 8 columns of ups take turns in a tile: a thread holds both
// branches of an output, and the first product never reaches memory.
#pragma once

#include "copier.cuh"
#include "device.h"
#include "launch.h"

namespace simple_moe::cuda {

template <typename Product>
__global__ void __launch_bounds__(Product::Shape::kThreads, Product::Shape::kBlocks)
    grouped_gemm_kernel(const GroupedGemm p, const Divisor column_tiles, const int claim_from) {
  using Shape = typename Product::Shape;
#ifdef __CUDA_ARCH__
  // The compiler's time is not spent where this is never launched.
  if constexpr (Shape::kBytes > most_smem(__CUDA_ARCH__ / 10)) return;
#endif
  if (!p.is_second) ptx::wait_for_earlier_kernels();
  unsigned char* const smem = ptx::dynamic_smem();
  const uint32_t ring = ptx::keep(ptx::smem_address(smem));
  const int steps = static_cast<int>((p.k + Shape::kDepth - 1) / Shape::kDepth);
  Queue<Shape> queue(p, column_tiles, claim_from, reinterpret_cast<Item*>(smem + Shape::kQueueAt));
  __syncthreads();
  Copier<Shape> copier(p, queue);
  // Weights that are copied first: as many as there is time for until `a` has been written, or its
  // rows are found; more would only stand before them in memory's queue. None where the prologue
  // copies more than the first item.
  const int steps_first = steps < Shape::kStages ? 0 : p.is_second ? Shape::kAhead : 2;
#pragma unroll 1
  for (int step = 0; step < steps_first; ++step) {
    copier.copy_b(ring + step * Shape::kSlotBytes, step);
  }
  if (p.is_second && !p.row_tiles.progress) ptx::wait_for_earlier_kernels();
  copier.wait_for_rows(queue[0]);
  ptx::let_next_kernel_start();
#pragma unroll 1
  for (int step = 0; step < Shape::kAhead; ++step) {
    const uint32_t slot = ring + step * Shape::kSlotBytes;
    copier.copy_a(slot);
    if (step >= steps_first) copier.copy_b(slot);
    if (steps < Shape::kStages) __syncthreads();  // for the queue
    copier.end_step();
  }
  meet<Shape>();

  Cursor<Shape> cursor(ring);
  unsigned number = 0;
  for (;; ++number) {
    const Item item = queue[number];
    if (item.row_count == 0) break;
    const int live = Product::live(item);
    // Warps without rows multiply up to 32 of nobody's; a warpgroup would take 64, and doesn't.
    if (!Shape::kWgmma || live > 0) {
      Product product;
      const auto target = product.target_of(p, item, 0);
      product.multiply_item(steps, live, copier, cursor);
      // The one before: its stores have long ended, and nobody waits for them.
      if (number > 0) publish(p, queue[number - 1], Shape::kCols);
      product.settle();
      const uint32_t staged_at = Shape::kWgmma ? cursor.free - ring : Shape::kStagedAt;
      product.finish(p, queue[number], smem + staged_at + threadIdx.x / 32 * Shape::kStagedBytes,
                     target);
    } else if constexpr (Shape::kWgmma) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copier.template copy<0, copier.kPasses>(cursor.free);
        next_step(copier, cursor);
      }
    }
    if constexpr (Shape::kWgmma) __syncthreads();  // The slot of the staged sums is filled next.
  }
  __syncthreads();  // All have written the last item.
  if (number > 0) publish(p, queue[number - 1], Shape::kCols);
  // Whoever waits for this kernel waits for the first product's end too.
  if (p.is_second) ptx::wait_for_earlier_kernels();
}

template <typename Product>
void launch_product(const GroupedGemm& p, cudaStream_t stream) {
  using Shape = typename Product::Shape;
  const DeviceInfo& device = device_info();
  const int64_t columns = column_tiles(p, Shape::kCols);
  const int64_t items = p.row_tiles.most * columns;
  const int64_t resident = device.sm_count * resident_blocks(Shape::kTile, device);
  launch<Start::kEarly>(grouped_gemm_kernel<Product>, items < resident ? items : resident,
                        Shape::kThreads, Shape::kBytes, stream, p, Divisor(columns),
                        static_cast<int>(choose_claim(Shape::kTile, p.k)));
}

}  // namespace simple_moe::cuda
