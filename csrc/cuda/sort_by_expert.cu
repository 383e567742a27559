// sort_by_expert: a stable counting sort of the slots by local expert.
//
// The slots are cut into chunks, in order; one warp takes one chunk:
//   count    warp: how many slots of its chunk each expert gets
//   sum      over the chunks of each expert, then over the experts: where each begins
//   scatter  warp: 32 slots at a time, in order; lanes of one expert take consecutive places
// The bin after the last expert takes the slots whose expert is not held here. Whoever sums lays
// the row tiles out too, where they are wanted.
//
// Few slots: all three in one kernel, everything between them in registers and shared memory, so
// that the latency of memory is paid once. Its blocks all count and sum the same, and each scatters
// some of the chunks: those stores, a sector each, are what takes a multiprocessor's time. Many: a
// kernel each, counts in global memory [bins][chunks]; one block sums, a warp a bin.
#include "block_scan.cuh"
#include "device.h"
#include "floats.cuh"
#include "launch.h"
#include "primitives.h"
#include "row_tiles.cuh"

namespace simple_moe::cuda {
namespace {

constexpr int kBlock = 1024;  // threads of a block that sums
constexpr int kMaxWarps = kBlock / 32;
constexpr int kWarpsAtOnce = 4;  // warps of a block that only counts or scatters
constexpr int kMaxChunks = 256;  // of the three kernels; also bounds the scratch
constexpr int kSlotsOfLane = 8;  // in registers, of the one kernel
constexpr int64_t kOneKernelSlots = kBlock * kSlotsOfLane;
constexpr int64_t kSlotsOfBlock = 512;  // that a block of the one kernel scatters
constexpr unsigned kAll = 0xffffffffu;

struct Chunks {
  int count;
  int64_t length;  // slots of each but the last, a multiple of 32
};

__device__ __forceinline__ int64_t end_of_chunk(const SortByExpert& p, Chunks chunks, int chunk) {
  const int64_t end = (chunk + 1) * chunks.length;
  return end < p.slots ? end : p.slots;
}

// A warp's next kSlotsOfLane * 32 slots in registers: their loads are in flight at once.
struct Slots {
  __device__ Slots(const SortByExpert& p, int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < kSlotsOfLane; ++i) {
      const int64_t slot = first + 32 * i + threadIdx.x % 32;
      bin[i] = slot < end ? static_cast<int>(local_expert(p.ids, slot)) : -1;
      weight[i] = slot < end && p.source_rows ? load_float(p.topk_weights, slot) : 0.0f;
    }
  }

  // count(bin), of the warp's own, gets one more for each slot.
  template <typename Count>
  __device__ void add_to(const Count& count) const {
#pragma unroll
    for (int i = 0; i < kSlotsOfLane; ++i) {
      if (bin[i] >= 0) atomicAdd(&count(bin[i]), 1);
    }
  }

  // In order: those of one bin go to consecutive places, from place_of(bin) on, which moves on.
  template <typename Place>
  __device__ void scatter(const SortByExpert& p, int64_t first, int64_t end,
                          const Place& place_of) const {
#pragma unroll
    for (int i = 0; i < kSlotsOfLane; ++i) {
      if (first + 32 * i >= end) break;
      const int64_t slot = first + 32 * i + threadIdx.x % 32;
      const unsigned peers = __match_any_sync(kAll, bin[i]);
      const int rank = __popc(peers & ((1u << threadIdx.x % 32) - 1));
      if (bin[i] >= 0) {
        const int place = place_of(bin[i]) + rank;
        if (p.sorted_slots) p.sorted_slots[place] = static_cast<int32_t>(slot);
        if (p.slot_rows) p.slot_rows[slot] = bin[i] < p.ids.experts ? place : -1;
        if (p.source_rows) {
          p.source_rows[place] = static_cast<int32_t>(slot) / p.topk;
          p.row_weights[place] = weight[i];
        }
      }
      __syncwarp();  // all have read the place
      if (bin[i] >= 0 && rank == 0) place_of(bin[i]) += __popc(peers);
      __syncwarp();
    }
  }

  int bin[kSlotsOfLane];  // -1 past the end
  float weight[kSlotsOfLane];
};

// ---- few slots ----

// Both sums of a bin at once: slots in the low half, row tiles in the high one.
constexpr int kHalf = 16;
static_assert(kOneKernelSlots < 1 << (kHalf - 1));

// Shared memory: counts [chunks][bins], begin [bins], a block scan's totals.
__global__ void __launch_bounds__(kBlock) sort_kernel(const SortByExpert p, Chunks chunks) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  const int bins = static_cast<int>(p.ids.experts) + 1, lane = threadIdx.x % 32;
  const int chunk = threadIdx.x / 32;
  int32_t* const counts = reinterpret_cast<int32_t*>(ptx::dynamic_smem());
  int32_t* const own = counts + chunk * bins;
  int32_t* const begin = counts + chunks.count * bins;
  int* const totals = begin + bins;
  const int64_t first = chunk * chunks.length;
  const int64_t end = chunk < chunks.count ? end_of_chunk(p, chunks, chunk) : 0;
  const Slots slots(p, first, end);
  if (chunk < chunks.count) {
    for (int b = lane; b < bins; b += 32) own[b] = 0;
    __syncwarp();
    slots.add_to([&](int b) -> int32_t& { return own[b]; });
  }
  __syncthreads();

  int before = 0;  // of the bins before this round's
  const int height = p.row_tiles.height;
  for (int round = 0; round < bins; round += blockDim.x) {
    const int b = round + threadIdx.x;
    int in_bin = 0;
    if (b < bins) {
#pragma unroll 8
      for (int c = 0; c < chunks.count; ++c) {
        const int here = counts[c * bins + b];
        counts[c * bins + b] = in_bin;
        in_bin += here;
      }
    }
    const int tiles = height > 0 && b < p.ids.experts ? (in_bin + height - 1) / height : 0;
    int of_round;
    const int both = tiles << kHalf | in_bin;
    const int upto = before + block_scan(both, Sum(), totals, of_round) - both;
    if (b < bins) begin[b] = upto & ((1 << kHalf) - 1);
    if (b < bins && blockIdx.x == 0) {
      p.expert_offsets[b] = begin[b];
      if (tiles > 0) {
        write_row_tiles(p.row_tiles, b, begin[b], in_bin, p.row_tiles.data() + (upto >> kHalf));
      }
    }
    before += of_round;
  }
  if (height > 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    *p.row_tiles.head = {before >> kHalf, {}};
  }
  __syncthreads();
  if (chunk % gridDim.x != blockIdx.x || chunk >= chunks.count) return;
  for (int b = lane; b < bins; b += 32) own[b] += begin[b];
  __syncwarp();
  slots.scatter(p, first, end, [&](int b) -> int32_t& { return own[b]; });
}

// ---- many slots ----

constexpr int64_t kBatch = 32 * kSlotsOfLane;

// A chunk's counts while its warp works on them: in shared memory, [warps][bins], or in place.
struct Counts {
  __device__ Counts(const SortByExpert& p, Chunks chunks, int chunk, bool in_smem)
      : in_place(p.counts + chunk), chunks(chunks.count), own(in_place), stride(chunks.count) {
    if (!in_smem) return;
    own = reinterpret_cast<int32_t*>(ptx::dynamic_smem()) + threadIdx.x / 32 * (p.ids.experts + 1);
    stride = 1;
  }
  __device__ int32_t& operator()(int64_t bin) const { return own[bin * stride]; }
  __device__ int32_t& global(int64_t bin) const { return in_place[bin * chunks]; }

  int32_t* in_place;
  int64_t chunks;
  int32_t* own;
  int64_t stride;
};

// A warp takes a chunk: kScatter is false, then true.
template <bool kScatter>
__global__ void __launch_bounds__(32 * kWarpsAtOnce)
    chunk_kernel(const SortByExpert p, Chunks chunks, bool in_smem) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  const int chunk = blockIdx.x * kWarpsAtOnce + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (chunk >= chunks.count) return;
  const int64_t bins = p.ids.experts + 1, end = end_of_chunk(p, chunks, chunk);
  const Counts counts(p, chunks, chunk, in_smem);
  for (int64_t bin = lane; bin < bins; bin += 32) {
    counts(bin) = kScatter ? counts.global(bin) + p.expert_offsets[bin] : 0;
  }
  __syncwarp();
  for (int64_t first = chunk * chunks.length; first < end; first += kBatch) {
    const Slots slots(p, first, end);
    kScatter ? slots.scatter(p, first, end, counts) : slots.add_to(counts);
  }
  __syncwarp();
  if constexpr (!kScatter) {
    for (int64_t bin = lane; in_smem && bin < bins; bin += 32) counts.global(bin) = counts(bin);
  }
}

// A warp takes a bin: its counts become the places of the chunks within it.
__device__ __forceinline__ int sum_bin(int32_t* counts, int chunks) {
  const int lane = threadIdx.x % 32;
  int here[kMaxChunks / 32], in_bin = 0;
#pragma unroll
  for (int i = 0; i < kMaxChunks / 32; ++i) {
    here[i] = 32 * i + lane < chunks ? counts[32 * i + lane] : 0;
  }
#pragma unroll
  for (int i = 0; i < kMaxChunks / 32; ++i) {
    if (32 * i >= chunks) break;
    const int upto = warp_scan(here[i], Sum());
    if (32 * i + lane < chunks) counts[32 * i + lane] = in_bin + upto - here[i];
    in_bin += __shfl_sync(kAll, upto, 31);
  }
  return in_bin;
}

__global__ void __launch_bounds__(kBlock) sum_kernel(const SortByExpert p, Chunks chunks) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  int* const totals = reinterpret_cast<int*>(ptx::dynamic_smem());
  const int64_t bins = p.ids.experts + 1;
  for (int64_t bin = threadIdx.x / 32; bin < bins; bin += kMaxWarps) {
    const int in_bin = sum_bin(p.counts + bin * chunks.count, chunks.count);
    if (threadIdx.x % 32 == 0) p.expert_offsets[bin] = in_bin;
  }
  __syncthreads();
  int before = 0;  // slots of the bins before this round's
  for (int64_t first = 0; first < bins; first += kBlock) {
    const int64_t bin = first + threadIdx.x;
    const int in_bin = bin < bins ? p.expert_offsets[bin] : 0;
    int in_round;
    const int upto = block_scan(in_bin, Sum(), totals, in_round);
    if (bin < bins) p.expert_offsets[bin] = before + upto - in_bin;
    before += in_round;
  }
  if (p.row_tiles.height == 0) return;
  __syncthreads();  // the offsets are written, the shared memory is free
  lay_row_tiles<kBlock>(p.expert_offsets, p.ids.experts, p.slots, p.row_tiles,
                        *reinterpret_cast<RowTilesStorage<kBlock>*>(totals));
}

// Of equal length, as many as there would be of `least` slots.
Chunks cut(int64_t slots, int64_t least, int64_t max_chunks) {
  const int64_t all = (slots + least - 1) / least;
  const int64_t count = all < 1 ? 1 : (all < max_chunks ? all : max_chunks);
  return {static_cast<int>(count), ((slots + count - 1) / count + 31) / 32 * 32};
}

Chunks cut_few(int64_t slots) { return cut(slots, 32, kMaxWarps); }

// Besides its slots a chunk costs a count of each expert's.
Chunks cut_many(int64_t slots, int64_t experts) {
  return cut(slots, experts < kBatch ? kBatch : experts, kMaxChunks);
}

// Of the one block.
size_t sort_smem(Chunks chunks, int64_t experts) {
  return sizeof(int32_t) * (static_cast<size_t>(chunks.count + 1) * (experts + 1) + kMaxWarps);
}

bool fits_one_kernel(int64_t slots, int64_t experts) {
  return slots <= kOneKernelSlots &&
         sort_smem(cut_few(slots), experts) <= device_info().smem_per_block;
}

}  // namespace

int64_t sort_by_expert_counts(int64_t slots, int64_t experts) {
  return fits_one_kernel(slots, experts) ? 0 : cut_many(slots, experts).count * (experts + 1);
}

void sort_by_expert(const SortByExpert& p, cudaStream_t stream) {
  if (fits_one_kernel(p.slots, p.ids.experts)) {
    const Chunks chunks = cut_few(p.slots);
    // A warp a chunk, and a thread a bin as far as there are threads.
    const int64_t warps_of_bins = (p.ids.experts + 32) / 32;
    const int64_t warps = chunks.count > warps_of_bins ? chunks.count : warps_of_bins;
    const int64_t blocks = p.slots > 0 ? (p.slots + kSlotsOfBlock - 1) / kSlotsOfBlock : 1;
    launch<Start::kEarly>(sort_kernel, blocks,
                          32 * static_cast<int>(warps < kMaxWarps ? warps : kMaxWarps),
                          sort_smem(chunks, p.ids.experts), stream, p, chunks);
    return;
  }
  const Chunks chunks = cut_many(p.slots, p.ids.experts);
  const int blocks = (chunks.count + kWarpsAtOnce - 1) / kWarpsAtOnce;
  const size_t smem = sizeof(int32_t) * kWarpsAtOnce * static_cast<size_t>(p.ids.experts + 1);
  const bool in_smem = smem <= 48 << 10 && smem <= device_info().smem_per_block;
  launch<Start::kEarly>(chunk_kernel<false>, blocks, 32 * kWarpsAtOnce, in_smem ? smem : 0, stream,
                        p, chunks, in_smem);
  launch<Start::kEarly>(sum_kernel, 1, kBlock, sizeof(RowTilesStorage<kBlock>), stream, p, chunks);
  launch<Start::kEarly>(chunk_kernel<true>, blocks, 32 * kWarpsAtOnce, in_smem ? smem : 0, stream,
                        p, chunks, in_smem);
}

}  // namespace simple_moe::cuda
