// sort_by_expert: a stable counting sort of the slots by local expert.
//
//   count    how many slots each expert gets, and how many of them come before one's own
//   sum      over the experts before: where each one's slots begin
//   scatter  32 slots at a time, in order; lanes of one expert take consecutive places
// The bin after the last expert takes the slots whose expert is not held here. The row tiles are
// laid out by the way, where they are wanted.
//
// Few slots: one kernel, everything between in registers and shared memory, so that the latency of
// memory is paid once. Its blocks all count all slots, those before their own apart, and each
// scatters 32. The code is run through once: its length is time too. Many: the slots are cut into
// chunks, in order, one for a warp. One kernel counts each chunk's, in global memory, and the
// blocks of the next sum what it found and scatter their chunks.

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

  // In order: those of one bin go to consecutive places, from where the bin's begin and
  // places[bin] say on, which moves on.
  __device__ void scatter(const SortByExpert& p, int64_t first, int64_t end, const int32_t* begins,
                          int32_t* places) const {
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

// By all threads of a block: begin(bin, place) with each bin's first place, count(bin) slots being
// in one. The first block writes the offsets and the row tiles.
template <typename Sum, typename Count, typename Begin>
__device__ __forceinline__ void begin_bins(const SortByExpert& p, Sum* totals, const Count& count,
                                           const Begin& begin) {
  const int64_t bins = p.ids.experts + 1;
  constexpr int kHalf = 4 * sizeof(Sum);
  Sum before = 0;  // of the bins before this round's: slots, and row tiles in the high half
  const int height = p.row_tiles.height;
  for (int64_t first_bin = 0; first_bin < bins; first_bin += blockDim.x) {
    const int64_t bin = first_bin + threadIdx.x;
    const int in_bin = bin < bins ? count(bin) : 0;
    // Unsigned: there may be nearly 2^31.
    const int tiles = height > 0 && bin < p.ids.experts ? (0u + in_bin + height - 1) / height : 0;
    const Sum both = static_cast<Sum>(tiles) << kHalf | in_bin;
    Sum of_round;
    const Sum upto = before + block_scan(both, totals, of_round) - both;
    const auto place = static_cast<int>(upto & ((Sum{1} << kHalf) - 1));
    before += of_round;
    if (bin >= bins) continue;
    begin(bin, place);
    if (blockIdx.x > 0) continue;
    p.expert_offsets[bin] = place;
    if (tiles > 0) write_row_tiles(p.row_tiles, bin, place, in_bin, tiles, upto >> kHalf);
  }
  if (height > 0 && blockIdx.x + threadIdx.x == 0)
    *p.row_tiles.head = {static_cast<int32_t>(before >> kHalf), {}};
  __syncthreads();
}

// Shared memory: a block scan's totals; counts of the slots before the block's, and of the others,
// in whose place come where bins begin, [2][bins].
template <int kOfLane>
__global__ void __launch_bounds__(32 * kMaxWarps) sort_few_kernel(const SortByExpert p) {
  ptx::follow_earlier_kernels();
  const int bins = static_cast<int>(p.ids.experts) + 1, warp = threadIdx.x / 32;
  const int64_t first = blockIdx.x * 32, end = warp == 0 ? p.slots : 0;
  const Slots<1> own(p, first, end);
  const Slots<kOfLane> all(p, 32 * kOfLane * warp, p.slots);  // a part for each warp
  static_assert(32 * kOfLane * kMaxWarps < 1 << 16, "a sum and the tiles share 32 bits");
  uint32_t* const totals = reinterpret_cast<uint32_t*>(ptx::dynamic_smem());
  int32_t* const before = reinterpret_cast<int32_t*>(totals + kMaxWarps);
  int32_t* const others = before + bins;
  for (int i = threadIdx.x; i < 2 * bins; i += blockDim.x) before[i] = 0;
  __syncthreads();  // the counts are zero
  for (int i = 0; i < kOfLane; ++i) {
    const bool earlier = 32 * (kOfLane * warp + i) < first;
    if (all.bin[i] >= 0) atomicAdd(&(earlier ? before : others)[all.bin[i]], 1);
  }
  __syncthreads();  // all is counted
  begin_bins(
      p, totals, [&](int64_t bin) { return before[bin] + others[bin]; },
      [&](int64_t bin, int place) { others[bin] = place; });
  own.scatter(p, first, end, others, before);
}

// Fills p.counts [chunks][bins], by way of as many places in shared memory as sort_kernel has.
__global__ void __launch_bounds__(32 * kChunksOfBlock, 16)
    count_kernel(const SortByExpert p, const SortPlan plan) {
  ptx::follow_earlier_kernels();
  const int chunk = blockIdx.x * plan.chunks_of_block + threadIdx.x / 32;
  if (chunk >= plan.chunks) return;
  const int64_t bins = p.ids.experts + 1, end = min((chunk + 1) * plan.length, p.slots);
  int32_t* const to = p.counts + chunk * bins;
  int32_t* const smem = reinterpret_cast<int32_t*>(ptx::dynamic_smem()) + threadIdx.x / 32 * bins;
  int32_t* const counts = plan.places_in_smem ? smem : to;
  for (int64_t bin = threadIdx.x % 32; bin < bins; bin += 32) counts[bin] = 0;
  __syncwarp();
  for (int64_t first = chunk * plan.length; first < end; first += kBatch) {
    const Slots<kSlotsOfLane> slots(p, first, end);
    for (const int bin : slots.bin) {
      if (bin >= 0) atomicAdd(&counts[bin], 1);
    }
  }
  __syncwarp();
  for (int64_t bin = threadIdx.x % 32; plan.places_in_smem && bin < bins; bin += 32)
    to[bin] = counts[bin];
}

// Shared memory: a block scan's totals; if they fit, where bins begin and a chunk's places of each
// from there, [1 + chunks_of_block][bins].
__global__ void __launch_bounds__(32 * kMaxWarps)
    sort_kernel(const SortByExpert p, const SortPlan plan) {
  ptx::follow_earlier_kernels();
  const int64_t bins = p.ids.experts + 1;
  const int first_chunk = blockIdx.x * plan.chunks_of_block;
  const int of_block = threadIdx.x / 32, chunk = first_chunk + of_block;
  int64_t* const totals = reinterpret_cast<int64_t*>(ptx::dynamic_smem());
  const int64_t first_row = plan.chunks + blockIdx.x * (1 + plan.chunks_of_block);
  int32_t* const begins = plan.places_in_smem ? reinterpret_cast<int32_t*>(totals + kMaxWarps)
                                              : p.counts + first_row * bins;
  int32_t* const places = begins + bins;
  const auto sum_chunks = [&](int64_t bin) {
    int sum = 0, c = 0;
    const auto sum_upto = [&](int end) {
#pragma unroll 16
      for (; c < end; ++c) sum += p.counts[c * bins + bin];
      return sum;
    };
    for (int row = 0; row < plan.chunks_of_block; ++row)
      places[row * bins + bin] = sum_upto(first_chunk + row);
    return sum_upto(plan.chunks);
  };
  begin_bins(p, totals, sum_chunks, [&](int64_t bin, int place) { begins[bin] = place; });
  const int64_t end = min((chunk + 1) * plan.length, p.slots);
  if (of_block >= plan.chunks_of_block) return;
  for (int64_t first = chunk * plan.length; first < end; first += kBatch) {
    Slots<kSlotsOfLane>(p, first, end).scatter(p, first, end, begins, places + of_block * bins);
  }
}

}  // namespace

int64_t sort_by_expert_counts(int64_t slots, int64_t experts) {
  if (are_few(slots, experts)) return 0;
  const SortPlan plan = plan_sort(slots, experts);
  const int64_t rows = plan.places_in_smem ? 0 : plan.blocks * (plan.chunks_of_block + 1);
  return (plan.chunks + rows) * (experts + 1);
}

void sort_by_expert(const SortByExpert& p, cudaStream_t stream) {
  // A thread a bin as far as there are threads, and of few slots one for each, or for so many.
  const bool few = are_few(p.slots, p.ids.experts);
  const SortPlan plan = plan_sort(p.slots, p.ids.experts);
  const int64_t least = few ? ceil_div(p.slots, 32) : plan.chunks_of_block;
  const int64_t warps =
      std::min<int64_t>(std::max(least, ceil_div(p.ids.experts + 1, 32)), kMaxWarps);
  if (few) {
    const int64_t of_lane = ceil_div(p.slots, 32 * kMaxWarps);
    return launch<Start::kEarly>(of_lane <= 1   ? sort_few_kernel<1>
                                 : of_lane <= 4 ? sort_few_kernel<4>
                                                : sort_few_kernel<kSlotsOfLane>,
                                 std::max<int64_t>(ceil_div(p.slots, 32), 1), 32 * warps,
                                 few_smem(p.ids.experts), stream, p);
  }
  launch<Start::kEarly>(count_kernel, plan.blocks, 32 * plan.chunks_of_block, plan.smem, stream, p,
                        plan);
  launch<Start::kEarly>(sort_kernel, plan.blocks, 32 * warps, plan.smem, stream, p, plan);
}

}  // namespace simple_moe::cuda
