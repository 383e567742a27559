// sort_by_expert: a stable counting sort of the slots by local expert.
//
// The slots are cut into chunks, in order; one warp takes one chunk:
//   count    how many of its slots each expert gets
//   sum      over the experts and chunks before: where its slots of each expert go
//   scatter  32 slots at a time, in order; lanes of one expert take consecutive places
// The bin after the last expert takes the slots whose expert is not held here. The row tiles are
// laid out by the way, where they are wanted.
//
// Few slots: all three in one kernel, everything between them in registers and shared memory, so
// that the latency of memory is paid once. Its blocks all count and sum the same, and each scatters
// some of the chunks: those stores, a sector each, are what takes a multiprocessor's time. Many: a
// kernel before it counts, in global memory, and the blocks sum what it found.

#include "block_scan.cuh"
#include "device.h"
#include "floats.cuh"
#include "launch.h"
#include "primitives.h"
#include "row_tiles.cuh"
#include "sort_plan.h"

namespace simple_moe::cuda {
namespace {

// A warp's next slots in registers, so many a lane: their loads are in flight at once.
template <int kOfLane>
struct Slots {
  __device__ Slots(const SortByExpert& p, int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int64_t slot = first + 32 * i + threadIdx.x % 32;
      bin[i] = slot < end ? static_cast<int>(local_expert(p.ids, slot)) : -1;
      weight[i] = slot < end && p.source_rows ? load_float(p.topk_weights, slot) : 0.0f;
    }
  }

  __device__ void add_to(int32_t* counts) const {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      if (bin[i] >= 0) atomicAdd(&counts[bin[i]], 1);
    }
  }

  // In order: those of one bin go to consecutive places, from where the bin's begin and
  // places[bin] say on, which moves on.
  __device__ void scatter(const SortByExpert& p, int64_t first, int64_t end, const int32_t* begins,
                          int32_t* places) const {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      if (first + 32 * i >= end) break;
      const auto slot = static_cast<int32_t>(first + 32 * i + threadIdx.x % 32);
      const unsigned peers = __match_any_sync(0xffffffffu, bin[i]);
      const int rank = __popc(peers & ((1u << threadIdx.x % 32) - 1));
      if (bin[i] >= 0) {
        const int place = begins[bin[i]] + places[bin[i]] + rank;
        p.sorted_slots[place] = slot;
        if (p.source_rows) {
          p.source_rows[place] = slot / p.topk;
          p.row_weights[place] = weight[i];
        }
      }
      __syncwarp();  // all have read the place
      if (bin[i] >= 0 && rank == 0) places[bin[i]] += __popc(peers);
      __syncwarp();
    }
  }

  int bin[kOfLane];  // -1 past the end
  float weight[kOfLane];
};

// By one warp, of its own chunk.
__device__ __forceinline__ void clear(int32_t* counts, int64_t bins) {
  for (int64_t bin = threadIdx.x % 32; bin < bins; bin += 32) counts[bin] = 0;
  __syncwarp();
}

__device__ int64_t end_of_chunk(const SortByExpert& p, const SortPlan& plan, int chunk) {
  const int64_t end = (chunk + 1) * plan.length;
  return chunk >= plan.chunks ? 0 : end < p.slots ? end : p.slots;
}

// Fills p.counts [chunks][bins], by way of as many places in shared memory as sort_kernel has.
__global__ void __launch_bounds__(32 * kChunksOfBlock, 16)
    count_kernel(const SortByExpert p, const SortPlan plan) {
  ptx::follow_earlier_kernels();
  const int chunk = blockIdx.x * plan.chunks_of_block + threadIdx.x / 32;
  if (chunk >= plan.chunks) return;
  const int64_t bins = p.ids.experts + 1, end = end_of_chunk(p, plan, chunk);
  int32_t* const to = p.counts + chunk * bins;
  int32_t* const smem = reinterpret_cast<int32_t*>(ptx::dynamic_smem()) + threadIdx.x / 32 * bins;
  int32_t* const counts = plan.places_in_smem ? smem : to;
  clear(counts, bins);
  for (int64_t first = chunk * plan.length; first < end; first += kBatch) {
    Slots<kSlotsOfLane>(p, first, end).add_to(counts);
  }
  __syncwarp();
  for (int64_t bin = threadIdx.x % 32; plan.places_in_smem && bin < bins; bin += 32) {
    to[bin] = counts[bin];
  }
}

// Shared memory: a block scan's totals, where bins begin and a chunk's places of each from there,
// [1 + chunks_of_block][bins], if they fit and, of few slots, counts [chunks][bins].
template <bool kFew, int kOfLane>
__global__ void __launch_bounds__(32 * kMaxWarps)
    sort_kernel(const SortByExpert p, const SortPlan plan) {
  ptx::follow_earlier_kernels();
  const int64_t bins = p.ids.experts + 1;
  const int first_chunk = blockIdx.x * plan.chunks_of_block;
  const int chunk = (kFew ? 0 : first_chunk) + threadIdx.x / 32;
  int64_t* const totals = reinterpret_cast<int64_t*>(ptx::dynamic_smem());
  int32_t* const smem = reinterpret_cast<int32_t*>(totals + kMaxWarps);
  const int64_t first_row = plan.chunks + blockIdx.x * (1 + plan.chunks_of_block);
  int32_t* const begins = kFew || plan.places_in_smem ? smem : p.counts + first_row * bins;
  int32_t* const places = begins + bins;
  int32_t* const counts = kFew ? places + plan.chunks_of_block * bins : p.counts;
  const int64_t end = end_of_chunk(p, plan, chunk);
  int64_t first = chunk * plan.length;
  Slots<kOfLane> slots(p, first, kFew ? end : 0);
  if constexpr (kFew) {
    if (chunk < plan.chunks) {
      clear(counts + chunk * bins, bins);
      slots.add_to(counts + chunk * bins);
    }
    __syncthreads();
  }

  constexpr int kAtOnce = kFew ? 4 : 16;  // counts that a thread has in flight
  int64_t before = 0;  // of the bins before this round's: slots, and row tiles in the high half
  const int height = p.row_tiles.height;
  for (int64_t first_bin = 0; first_bin < bins; first_bin += blockDim.x) {
    const int64_t bin = first_bin + threadIdx.x;
    int in_bin = 0;
    for (int c = 0; bin < bins && c < plan.chunks; c += kAtOnce) {
      int here[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        here[i] = c + i < plan.chunks ? counts[(c + i) * bins + bin] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int of_block = c + i - first_chunk;
        if (0 <= of_block && of_block < plan.chunks_of_block)
          places[of_block * bins + bin] = in_bin;
        in_bin += here[i];
      }
    }
    // Unsigned: there may be nearly 2^31.
    const int tiles = height > 0 && bin < p.ids.experts ? (0u + in_bin + height - 1) / height : 0;
    const int64_t both = int64_t{tiles} << 32 | in_bin;
    int64_t of_round;
    const int64_t upto = before + block_scan(both, totals, of_round) - both;
    const auto begin = static_cast<int32_t>(upto);
    before += of_round;
    if (bin >= bins) continue;
    begins[bin] = begin;
    if (blockIdx.x > 0) continue;
    p.expert_offsets[bin] = begin;
    if (tiles > 0) write_row_tiles(p.row_tiles, bin, begin, in_bin, tiles, upto >> 32);
  }
  if (height > 0 && blockIdx.x + threadIdx.x == 0)
    *p.row_tiles.head = {static_cast<int32_t>(before >> 32), {}};
  __syncthreads();
  const int of_block = chunk - first_chunk;
  if (of_block < 0 || of_block >= plan.chunks_of_block) return;
  do {
    if constexpr (!kFew) slots = Slots<kOfLane>(p, first, end);
    slots.scatter(p, first, end, begins, places + of_block * bins);
    first += kBatch;
  } while (!kFew && first < end);
}

}  // namespace

int64_t sort_by_expert_counts(int64_t slots, int64_t experts) {
  const SortPlan plan = plan_sort(slots, experts);
  if (plan.few) return 0;
  const int64_t rows = plan.places_in_smem ? 0 : plan.blocks * (plan.chunks_of_block + 1);
  return (plan.chunks + rows) * (experts + 1);
}

void sort_by_expert(const SortByExpert& p, cudaStream_t stream) {
  const SortPlan plan = plan_sort(p.slots, p.ids.experts);
  // A warp a chunk, and a thread a bin as far as there are threads.
  const int64_t warps = std::clamp<int64_t>(
      ceil_div(p.ids.experts + 1, 32), plan.few ? plan.chunks : plan.chunks_of_block, kMaxWarps);
  if (!plan.few) {
    launch<Start::kEarly>(count_kernel, plan.blocks, 32 * plan.chunks_of_block, plan.smem, stream,
                          p, plan);
  }
  const auto few = plan.length > 32 ? sort_kernel<true, kSlotsOfLane> : sort_kernel<true, 1>;
  launch<Start::kEarly>(plan.few ? few : sort_kernel<false, kSlotsOfLane>, plan.blocks, 32 * warps,
                        plan.smem, stream, p, plan);
}

}  // namespace simple_moe::cuda
