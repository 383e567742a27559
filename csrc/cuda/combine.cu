// combine: every token's expert rows, weighted and summed in float32, k ascending, no atomics on
// floats.
//
// Schedule: a block takes one token and 8 columns a thread. Of 32 of the token's K slots each lane
// looks one up, its row and weight; then each thread reads 16 bytes of every row that is there,
// kAtOnce in flight. The code is kept short: with few tokens it is run through once, and its length
// is time. Where the rows are in sorted order, a small kernel before it finds the slots'.
#include "device.h"
#include "floats.cuh"
#include "launch.h"
#include "primitives.h"

namespace simple_moe::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;  // rows that a thread has in flight

// sorted_slots and expert_offsets may be anybody's: a slot that doesn't exist is skipped, and of
// two rows for one slot the later one counts (an integer maximum: the order doesn't matter).
__global__ void __launch_bounds__(kThreads) fill_slot_rows_kernel(const Combine p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  bool held = false;  // the row lies below some expert's end
  for (int64_t e = 0; e <= p.experts; ++e) held |= p.expert_offsets[e] > row;
  if (row >= p.rows || !held) return;
  const int64_t slot = p.sorted_slots[row];
  if (slot >= 0 && slot < p.tokens * p.topk) atomicMax(&p.slot_rows[slot], static_cast<int>(row));
}

// -1: it isn't there.
__device__ __forceinline__ int row_of_slot(const Combine& p, int64_t slot) {
  if (p.expert_offsets) return p.slot_rows[slot];
  return local_expert(p.ids, slot >> p.split_log2) < p.ids.experts ? static_cast<int>(slot) : -1;
}

// Adds a warp's slots to the sums of a thread's columns, `rows` on: lane i has slot i's row and
// weight. Unless kWhole is true a vector has `count` values, or isn't aligned.
template <bool kWhole, typename T>
__device__ __forceinline__ void add_slots(const T* rows, int64_t stride, int count, int slots,
                                          int row_of_lane, float weight_of_lane,
                                          float (&sums)[kVector]) {
#pragma unroll 1
  for (int first = 0; first < slots; first += kAtOnce) {
    int row[kAtOnce];
    Vector<T> vectors[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      row[i] = __shfl_sync(0xffffffffu, row_of_lane, first + i);
      vectors[i] = {};
      const T* const from = rows + row[i] * stride;
      if constexpr (kWhole) {
        if (row[i] >= 0) vectors[i] = *reinterpret_cast<const Vector<T>*>(from);
      } else {
        for (int j = 0; j < kVector; ++j) {
          if (row[i] >= 0 && j < count) vectors[i].values[j] = from[j];
        }
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = __shfl_sync(0xffffffffu, weight_of_lane, first + i);
      if (row[i] < 0) continue;
      for (int j = 0; j < kVector; ++j) sums[j] += weight * ptx::to_float(vectors[i].values[j]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const Combine p, int column_blocks, bool aligned_in, bool aligned_out) {
  if (!p.only_rows_are_new) ptx::wait_for_earlier_kernels();
  const int64_t token = blockIdx.x / column_blocks;
  const int64_t column = (blockIdx.x % column_blocks * blockDim.x + threadIdx.x) * kVector;
  const int count = static_cast<int>(min(p.hidden - column, int64_t{kVector}));
  const T* const rows = static_cast<const T*>(p.expert_out) + column;
  float sums[kVector] = {};
  for (int window = 0; window < p.topk; window += 32) {
    const int k = window + static_cast<int>(threadIdx.x) % 32;
    const int64_t slot = token * p.topk + k;
    const int row = k < p.topk ? row_of_slot(p, slot) : -1;
    // Not held here: its weight may be anything, NaN too.
    const float weight = row >= 0 && p.weights.data ? load_float(p.weights, slot) : 1.0f;
    if (window == 0 && p.only_rows_are_new) ptx::wait_for_earlier_kernels();
    if (window == 0) ptx::let_next_kernel_start();
    const int slots = p.topk - window < 32 ? p.topk - window : 32;
    // Of all lanes, for they shuffle.
    __all_sync(0xffffffffu, aligned_in && count == kVector)
        ? add_slots<true>(rows, p.expert_out_stride, count, slots, row, weight, sums)
        : add_slots<false>(rows, p.expert_out_stride, count, slots, row, weight, sums);
  }
  if (count > 0)
    store_vector(p.out, p.out_dtype, token * p.hidden + column, count, aligned_out, sums);
}

}  // namespace

void combine(const Combine& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.hidden == 0) return;
  if (p.expert_offsets) {
    // -1 in each.
    cuda_check(cudaMemsetAsync(p.slot_rows, 0xFF, sizeof(int32_t) * p.tokens * p.topk, stream),
               "cudaMemsetAsync");
    launch(fill_slot_rows_kernel, (p.rows + kThreads - 1) / kThreads, kThreads, 0, stream, p);
  }
  const int64_t vectors = (p.hidden + kVector - 1) / kVector;
  const int threads = vectors < kThreads ? static_cast<int>((vectors + 31) / 32 * 32) : kThreads;
  const int64_t column_blocks = (vectors + threads - 1) / threads;
  with_type(p.dtype, [&](auto type) {
    launch<Start::kEarly>(combine_kernel<decltype(type)>, p.tokens * column_blocks, threads, 0,
                          stream, p, static_cast<int>(column_blocks),
                          rows_are_aligned(p.expert_out, p.expert_out_stride, p.dtype),
                          rows_are_aligned(p.out, p.hidden, p.out_dtype));
  });
}

}  // namespace simple_moe::cuda
