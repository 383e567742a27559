// grouped_gemv: a layer's product for few tokens, each slot by itself: matrices times vectors,
// which wait for the weights and nothing else. No sort comes before it and no combine after it.
//
// Schedule: a block takes 4 or 8 output columns (gated: 4 gates and their ups) of one slot, or of a
// token whose slots are added up. Its threads share out the vectors of 16 bytes that make up the
// dot products. A thread loads kLoads of the weights straight into registers, which are read once,
// then those of `a`, which lie in L1, and adds the products in float32; there is no ring, nor a
// barrier in that loop, the other blocks of the multiprocessor load meanwhile. Where only `a` is
// new, the first weights are under way before the kernel that writes it ends. At last the threads'
// sums meet, in their warps and then in shared memory, where a thread a column finishes it. In
// flight: 128 bytes a thread, 128 KB a multiprocessor.
//
// The order of a sum depends on the sizes alone, but it isn't grouped_gemm's.
#include "block_scan.cuh"
#include "epilogue.cuh"
#include "launch.h"
#include "primitives.h"
#include "shapes.h"

namespace simple_moe::cuda {
namespace {

constexpr int kLoads = 8;

struct Slot {
  int expert;  // as those held here are numbered; -1: it isn't
  float weight;
};

template <typename T, int kColumns, bool kGated>
__global__ void __launch_bounds__(kMostGemvThreads, 4)
    grouped_gemv_kernel(const GroupedGemm p, const Divisor vectors) {
  constexpr int kRows = kGated ? 2 * kColumns : kColumns;  // of weights, a block
  constexpr int kAtOnce = kLoads / kRows;                  // vectors of each, a thread
  if (!p.is_second) ptx::follow_earlier_kernels();
  const int blocks_of_row = static_cast<int>(p.n / kColumns), out_row = blockIdx.x / blocks_of_row;
  const int first_column = blockIdx.x % blocks_of_row * kColumns;
  const int slots = p.is_second ? p.topk : 1, first_slot = out_row * slots;
  Slot* const table = reinterpret_cast<Slot*>(ptx::dynamic_smem());
  float* const of_warps = reinterpret_cast<float*>(table + slots);  // [warps][kRows]
  for (int i = threadIdx.x; i < slots; i += blockDim.x) {
    const int64_t expert = local_expert(p.ids, first_slot + i);
    const bool held = expert < p.experts;
    table[i] = {held ? static_cast<int>(expert) : -1,
                p.row_weights.data ? load_float(p.row_weights, first_slot + i) : 1.0f};
  }
  __syncthreads();  // the table is there
  const T* const b = static_cast<const T*>(p.b);
  const int64_t first_gate = kGated ? branch_row(p, first_column, false) : first_column;
  const T* const gates = b + first_gate * p.b_row_stride;
  const T* const ups = b + branch_row(p, first_column, true) * p.b_row_stride;  // kGated
  const bool alternate = kGated && p.gate_layout == GateLayout::kInterleaved;
  const uint32_t row_bytes = static_cast<uint32_t>(p.b_row_stride * 2) << alternate;
  const T* const a =
      static_cast<const T*>(p.a) + (p.is_second ? first_slot : out_row / p.topk) * p.a_stride;
  // Biases, asked for before the weights: memory takes as long for one.
  const int biases = p.bias.data ? slots * kRows : 0;
  const auto bias_of = [&](int i) {
    const int expert = table[i / kRows].expert, row = i % kRows;
    if (expert < 0) return 0u;
    return load_bits(p.bias, bias_at(p, expert, first_column + row % kColumns, row >= kColumns));
  };
  const uint32_t bias = threadIdx.x < biases ? bias_of(threadIdx.x) : 0;
  float sums[kRows] = {};
#pragma unroll 1
  for (int first = 0, all = slots * vectors.value; first < all; first += kAtOnce * blockDim.x) {
    Vector<T> weights[kAtOnce][kRows];
    const T* of_a[kAtOnce];
    Slot slot[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      const int vector = first + i * blockDim.x + threadIdx.x;
      const int number = slots > 1 ? vectors.divide(vector) : 0;
      const int at = (vector - number * vectors.value) * kVector;
      slot[i] = vector < all ? table[number] : Slot{-1, 0.0f};
      of_a[i] = a + number * p.a_stride + at;
      const int64_t offset = slot[i].expert * p.b_expert_stride + at;
      for (int j = 0; j < kRows; ++j) {
        const auto* const row =
            reinterpret_cast<const char*>((j < kColumns ? gates : ups) + offset);
        const char* const from = ptx::advance(row, j % kColumns, row_bytes);
        auto& to = reinterpret_cast<uint4&>(weights[i][j]);
        if (slot[i].expert >= 0) to = __ldcs(reinterpret_cast<const uint4*>(from));
      }
    }
    if (first == 0 && p.is_second) ptx::follow_earlier_kernels();
    for (int i = 0; i < kAtOnce; ++i) {
      if (slot[i].expert < 0) continue;  // Its row of `a` may be NaN.
      const auto of_row = *reinterpret_cast<const Vector<T>*>(of_a[i]);
      for (int j = 0; j < kRows; ++j) {
        float sum = 0.0f;
        for (int v = 0; v < kVector; ++v) {
          sum = fmaf(ptx::to_float(of_row.values[v]), ptx::to_float(weights[i][j].values[v]), sum);
        }
        sums[j] = fmaf(slot[i].weight, sum, sums[j]);
      }
    }
  }

  for (int j = 0; j < kRows; ++j) {
    sums[j] = warp_reduce(sums[j], [](float a, float b) { return a + b; });
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32 * kRows + j] = sums[j];
  }
  // As one more warp for each slot.
  for (int i = threadIdx.x; i < biases; i += blockDim.x) {
    const float x = float_of(p.bias.dtype, i == threadIdx.x ? bias : bias_of(i));
    const auto [expert, weight] = table[i / kRows];
    of_warps[blockDim.x / 32 * kRows + i] = expert < 0 ? 0.0f : weight * x;
  }
  __syncthreads();  // the warps' sums are there
  if (threadIdx.x >= kColumns) return;
  float gate[1] = {}, up[1] = {};
  for (unsigned at = threadIdx.x; at < blockDim.x / 32 * kRows + biases; at += kRows) {
    gate[0] += of_warps[at];
    if (kGated) up[0] += of_warps[at + kColumns];
  }
  // A second product has no activation.
  const int expert = table[0].expert;
  if (kGated && expert < 0) return;
  kGated ? activate_gated<1>(p.activation.kind, scalars_of(p.activation, expert), gate, up)
         : activate<1>(p.activation.kind, gate);
  const int column = first_column + threadIdx.x;
  const float values[kVector] = {gate[0]};
  store_vector(p.out, p.out_dtype, out_row * p.out_stride + column, 1, false, values);
}

template <typename T>
void launch_gemv(const GroupedGemm& p, cudaStream_t stream) {
  const bool gated = is_gated(p.activation.kind);
  const int64_t out_rows = p.is_second ? p.rows / p.topk : p.rows, vectors = p.k / kVector;
  const GemvTile tile =
      choose_gemv_tile(out_rows, p.n, p.rows / out_rows * vectors, gated, device_info());
  launch<Start::kEarly>(gated            ? grouped_gemv_kernel<T, 4, true>
                        : tile.cols == 4 ? grouped_gemv_kernel<T, 4, false>
                                         : grouped_gemv_kernel<T, 8, false>,
                        out_rows * (p.n / tile.cols), tile.threads,
                        tile.threads / 32 * 32 + p.topk * (sizeof(Slot) + 32), stream, p,
                        Divisor(vectors));
}

}  // namespace

void grouped_gemv(const GroupedGemm& p, cudaStream_t stream) {
  p.dtype == DType::kFloat16 ? launch_gemv<f16>(p, stream) : launch_gemv<bf16>(p, stream);
}

}  // namespace simple_moe::cuda
