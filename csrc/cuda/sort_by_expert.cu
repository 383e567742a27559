// sort_by_expert: a stable counting sort of the slots by local expert.
//
// The slots are cut into chunks, in order; one warp takes one chunk:
//   count    warp: how many slots of its chunk each expert gets     -> counts[chunk][expert]
//   sum      block: over the chunks of each expert, then over the experts -> expert_offsets;
//            counts[chunk][expert] becomes the chunk's first place within the expert
//   scatter  warp: 32 slots at a time, in order; lanes of one expert take consecutive places
// The bin after the last expert takes the slots whose expert is not held here. Whoever sums lays
// the row tiles out too, where they are wanted. Few slots: all three in one block, counts in shared
// memory. Many: a kernel each, counts in global memory.
#include "block_scan.cuh"
#include "device.h"
#include "floats.cuh"
#include "launch.cuh"
#include "primitives.h"
#include "row_tiles.cuh"

namespace simple_moe::cuda {
namespace {

constexpr int kBlock = 1024;     // threads of a block that sums
constexpr int kWarpsAtOnce = 8;  // warps of a block that only counts or scatters
constexpr int kMaxChunks = 256;  // of the three kernels; also bounds the scratch
constexpr int64_t kOneBlockSlots = 8192;

struct Chunks {
  int count;
  int64_t length;  // slots of each but the last
};

__device__ __forceinline__ int64_t bin_of(const SortByExpert& p, int64_t slot) {
  const int64_t id = p.ids_are_int64 ? static_cast<const int64_t*>(p.topk_ids)[slot]
                                     : static_cast<const int32_t*>(p.topk_ids)[slot];
  // Compared before the subtraction, which might overflow.
  if (id < p.expert_offset) return p.experts;
  const uint64_t local = static_cast<uint64_t>(id) - static_cast<uint64_t>(p.expert_offset);
  return local < static_cast<uint64_t>(p.experts) ? static_cast<int64_t>(local) : p.experts;
}

__device__ __forceinline__ int64_t end_of_chunk(const SortByExpert& p, Chunks chunks, int chunk) {
  const int64_t end = (chunk + 1) * chunks.length;
  return end < p.slots ? end : p.slots;
}

__device__ void count_chunk(const SortByExpert& p, Chunks chunks, int chunk, int32_t* counts) {
  const int lane = threadIdx.x % 32;
  for (int64_t bin = lane; bin <= p.experts; bin += 32) counts[bin] = 0;
  __syncwarp();
  for (int64_t slot = chunk * chunks.length + lane; slot < end_of_chunk(p, chunks, chunk);
       slot += 32) {
    atomicAdd(&counts[bin_of(p, slot)], 1);
  }
}

// All of the block. `counts`: [chunks][experts + 1].
__device__ void sum_counts(const SortByExpert& p, Chunks chunks, int32_t* counts,
                           int* warp_totals) {
  const int64_t bins = p.experts + 1;
  int before = 0;  // slots of the bins before this round's
  for (int64_t first = 0; first < bins; first += kBlock) {
    const int64_t bin = first + threadIdx.x;
    int in_bin = 0;
    if (bin < bins) {
#pragma unroll 8
      for (int chunk = 0; chunk < chunks.count; ++chunk) {
        const int here = counts[chunk * bins + bin];
        counts[chunk * bins + bin] = in_bin;
        in_bin += here;
      }
    }
    int in_round;
    const int upto = block_scan<kBlock>(in_bin, Sum(), warp_totals, in_round);
    if (bin < bins) p.expert_offsets[bin] = before + upto - in_bin;
    before += in_round;
  }
}

// All of the block that wrote the offsets.
__device__ void lay_row_tiles(const SortByExpert& p, int* smem) {
  if (p.row_tiles.height == 0) return;
  __syncthreads();  // the offsets are written, `smem` is free
  lay_row_tiles<kBlock>(p.expert_offsets, p.experts, p.slots, p.row_tiles,
                        *reinterpret_cast<RowTilesStorage<kBlock>*>(smem));
}

__device__ void scatter_chunk(const SortByExpert& p, Chunks chunks, int chunk, int32_t* counts) {
  const int lane = threadIdx.x % 32;
  const int64_t end = end_of_chunk(p, chunks, chunk);
  for (int64_t first = chunk * chunks.length; first < end; first += 32) {
    const int64_t slot = first + lane;
    const bool valid = slot < end;
    const int bin = valid ? static_cast<int>(bin_of(p, slot)) : -1;
    const unsigned peers = __match_any_sync(0xffffffffu, bin);
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (valid) {
      const int place = p.expert_offsets[bin] + counts[bin] + rank;
      if (p.sorted_slots) p.sorted_slots[place] = static_cast<int32_t>(slot);
      if (p.slot_rows) p.slot_rows[slot] = bin < p.experts ? place : -1;
      if (p.source_rows) {
        p.source_rows[place] = static_cast<int32_t>(slot / p.topk);
        p.row_weights[place] = load_float(p.topk_weights, slot);
      }
    }
    __syncwarp();  // all have read the count
    if (valid && rank == 0) counts[bin] += __popc(peers);
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kBlock) sort_kernel(const SortByExpert p, Chunks chunks) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  int* const warp_totals = reinterpret_cast<int*>(ptx::dynamic_smem());
  int32_t* const counts = warp_totals + 32;
  const int chunk = threadIdx.x / 32;
  int32_t* const own = counts + chunk * (p.experts + 1);
  if (chunk < chunks.count) count_chunk(p, chunks, chunk, own);
  __syncthreads();
  sum_counts(p, chunks, counts, warp_totals);
  __syncthreads();
  if (chunk < chunks.count) scatter_chunk(p, chunks, chunk, own);
  lay_row_tiles(p, warp_totals);
}

__global__ void __launch_bounds__(32 * kWarpsAtOnce)
    count_kernel(const SortByExpert p, Chunks chunks) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  const int chunk = blockIdx.x * kWarpsAtOnce + threadIdx.x / 32;
  if (chunk < chunks.count) count_chunk(p, chunks, chunk, p.counts + chunk * (p.experts + 1));
}

__global__ void __launch_bounds__(kBlock) sum_kernel(const SortByExpert p, Chunks chunks) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  int* const smem = reinterpret_cast<int*>(ptx::dynamic_smem());
  sum_counts(p, chunks, p.counts, smem);
  lay_row_tiles(p, smem);
}

__global__ void __launch_bounds__(32 * kWarpsAtOnce)
    scatter_kernel(const SortByExpert p, Chunks chunks) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  const int chunk = blockIdx.x * kWarpsAtOnce + threadIdx.x / 32;
  if (chunk < chunks.count) scatter_chunk(p, chunks, chunk, p.counts + chunk * (p.experts + 1));
}

Chunks cut(int64_t slots, int64_t max_chunks) {
  const int64_t warps = (slots + 31) / 32;
  const int64_t count = warps < 1 ? 1 : (warps < max_chunks ? warps : max_chunks);
  return {static_cast<int>(count), ((slots + count - 1) / count + 31) / 32 * 32};
}

size_t one_block_smem(Chunks chunks, int64_t experts) {
  const size_t counts = sizeof(int32_t) * (32 + chunks.count * static_cast<size_t>(experts + 1));
  return counts > sizeof(RowTilesStorage<kBlock>) ? counts : sizeof(RowTilesStorage<kBlock>);
}

bool fits_one_block(int64_t slots, int64_t experts) {
  return slots <= kOneBlockSlots &&
         one_block_smem(cut(slots, kBlock / 32), experts) <= device_info().smem_per_block;
}

}  // namespace

int64_t sort_by_expert_counts(int64_t slots, int64_t experts) {
  return fits_one_block(slots, experts) ? 0 : cut(slots, kMaxChunks).count * (experts + 1);
}

void sort_by_expert(const SortByExpert& p, cudaStream_t stream) {
  if (fits_one_block(p.slots, p.experts)) {
    const Chunks chunks = cut(p.slots, kBlock / 32);
    launch<Start::kEarly>(sort_kernel, 1, kBlock, one_block_smem(chunks, p.experts), stream, p,
                          chunks);
    return;
  }
  const Chunks chunks = cut(p.slots, kMaxChunks);
  const int blocks = (chunks.count + kWarpsAtOnce - 1) / kWarpsAtOnce;
  launch<Start::kEarly>(count_kernel, blocks, 32 * kWarpsAtOnce, 0, stream, p, chunks);
  launch<Start::kEarly>(sum_kernel, 1, kBlock, sizeof(RowTilesStorage<kBlock>), stream, p, chunks);
  launch<Start::kEarly>(scatter_kernel, blocks, 32 * kWarpsAtOnce, 0, stream, p, chunks);
}

}  // namespace simple_moe::cuda
