// grouped_gemv: a layer's product for few tokens, each slot by itself: matrices times vectors,
// which wait for the weights and nothing else. No sort comes before it and no combine after it.
//
// Schedule: a block takes 4 or 8 output columns (gated: 4 gates and their ups) of one slot, or of a
// token whose slots are added up. Its threads share out the vectors of 16 bytes that make up the
// dot products. A thread loads kLoads of the weights, which are read once, straight into registers,
// then those of `a`, which lie in L1, and adds the products in float32; there is no ring, nor a
// barrier in that loop, the other blocks of the multiprocessor load meanwhile. Where only `a` is
// new, the first weights are under way before the kernel that writes it ends. At last the threads'
// sums meet, in their warps and then in shared memory, where a thread a column finishes it. In
// flight: 128 bytes a thread, 128 KB a multiprocessor.
//
// The order of a sum depends on the sizes alone, but it isn't grouped_gemm's. Where it is to be,
// grouped_gemv_in_order_kernel takes this one's place.
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

constexpr int kChunks = kTurn / kVector, kLineBytes = kTurn * 2;

// The same in the order of grouped_gemm and combine, for the bits of any number of tokens.
//
// Schedule: a warp takes 8 lines of weights of one slot. It copies them and the slot's row of `a`,
// kTurn of k at a time, into a ring of its own with cp.async, and multiplies by mma.sync, whose 16
// rows are all the slot's. A second product's block has a warp for each of a token's slots, whose
// results meet in shared memory and are added as by combine; no warp waits for another but there.
// Where a multiprocessor holds its share of a kernel's blocks at once it gets no more, and the next
// kernel's come in one by one as those end, and have their weights under way before the last does.
// In flight: `turns`, 2 or 3, of kTurnBytes a warp.
template <typename T, bool kGated>
__global__ void __launch_bounds__(32 * kMostSlotsInOrder, 2)
    grouped_gemv_in_order_kernel(const GroupedGemm p, const Divisor groups, int turns) {
  constexpr int kColumns = kGated ? kLines / 2 : kLines;
  if (!p.is_second) ptx::follow_earlier_kernels();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int slots = p.is_second ? p.topk : 1, group = (blockIdx.x * warps + warp) / slots;
  const int out_row = groups.divide(group), slot = out_row * slots + warp % slots;
  const int first_column = (group - out_row * static_cast<int>(groups.value)) * kColumns;
  const int64_t expert = slot < p.rows ? local_expert(p.ids, slot) : p.experts;
  const bool held = expert < p.experts;
  const int vectors = held ? static_cast<int>(p.k / kVector) : 0;
  unsigned char* const smem = ptx::dynamic_smem();
  const uint32_t ring = ptx::smem_address(smem) + warp * turns * kTurnBytes;

  // What a lane copies of a turn: a chunk of every other line, and one of `a`.
  const int chunk = lane % kChunks, odd = lane / kChunks;
  const int64_t line = kGated ? branch_row(p, first_column, odd) : first_column + odd;
  const bool alternate = !kGated || p.gate_layout == GateLayout::kInterleaved;
  const uint32_t two_lines = static_cast<uint32_t>(p.b_row_stride * 2) << alternate;
  const uint32_t place = odd * kLineBytes + (chunk ^ odd) * 16;
  const T* const a = static_cast<const T*>(p.a) + (p.is_second ? slot : slot / p.topk) * p.a_stride;
  const T* const b =
      static_cast<const T*>(p.b) + expert * p.b_expert_stride + line * p.b_row_stride;
  const auto copy = [&](int first, uint32_t to, bool weights, bool row) {
    const int vector = first + chunk;
    if (first < vectors && weights) {
      for (int i = 0; i < kLines / 2; ++i) {
        const auto* const from = reinterpret_cast<const char*>(b + vector * kVector);
        ptx::cp_async_16(to + (place ^ i * 32) + i * 2 * kLineBytes,
                         ptx::advance(from, i, two_lines), vector < vectors);
      }
    }
    if (first < vectors && row && odd == 0)
      ptx::cp_async_16(to + kLines * kLineBytes + chunk * 16, a + vector * kVector,
                       vector < vectors);
    if (row) ptx::cp_async_commit();  // Empty groups keep the count.
  };
#pragma unroll 1
  for (int part = p.is_second ? 0 : 1; part < 2; ++part) {
    if (p.is_second && part == 1) ptx::follow_earlier_kernels();
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn)
      copy(turn * kChunks, ring + turn * kTurnBytes, part == 0 || !p.is_second, part == 1);
  }
  const int column = first_column + lane % 4 * (kGated ? 1 : 2);  // of sums[0]
  uint32_t bias[2] = {}, weight = 0;
  for (int i = 0; i < 2 && held && p.bias.data; ++i)
    bias[i] = load_bits(p.bias, bias_at(p, expert, kGated ? column : column + i, i == 1));
  if (held && p.row_weights.data) weight = load_bits(p.row_weights, slot);

  // The 8 rows of a matrix of ldmatrix are the lines, or each the row of `a`.
  const uint32_t of_lines = lane % 8 * kLineBytes + (lane / 8 ^ lane % 8) * 16;
  const uint32_t of_row = kLines * kLineBytes + lane / 16 * 16;
  float sums[4] = {};
  int turn = 0;
#pragma unroll 1
  for (int first = 0; first < vectors; first += kChunks) {
    const uint32_t from = ring + turn * kTurnBytes;
    uint32_t rows[4], lines[4];
    turns == 3 ? ptx::cp_async_wait<2>() : ptx::cp_async_wait<1>();
    __syncwarp();  // The turn has landed for all.
#pragma unroll
    for (int k16 = 0; k16 < kTurn / 16; ++k16) {
      if (k16 % 2 == 0) ptx::ldmatrix_x4(lines, from + (of_lines ^ k16 * 32));
      ptx::ldmatrix_x4(rows, from + of_row + k16 * 32);
      ptx::mma_m16n8k16<T>(sums, rows, lines[k16 % 2 * 2], lines[k16 % 2 * 2 + 1]);
    }
    __syncwarp();  // All have read it.
    copy(first + turns * kChunks, from, true, true);
    turn = turn + 1 < turns ? turn + 1 : 0;
  }

  for (int i = 0; i < 2 && p.bias.data; ++i) sums[i] += float_of(p.bias.dtype, bias[i]);
  float gate[1] = {sums[0]}, up[1] = {sums[1]};
  if (held && kGated)  // Another's expert has no scalars here.
    activate_gated<1>(p.activation.kind, scalars_of(p.activation, expert), gate, up);
  if (!kGated) activate<1>(p.activation.kind, gate), activate<1>(p.activation.kind, up);
  const float by = p.row_weights.data ? float_of(p.row_weights.dtype, weight) : 1.0f;
  float* const results = reinterpret_cast<float*>(smem + warps * turns * kTurnBytes);
  for (int i = 0; i < (kGated ? 1 : 2) && lane < 4; ++i) {
    const float value[kVector] = {(i == 0 ? gate : up)[0] * by};
    if (p.is_second) {
      // Zero where the slot's expert isn't held here.
      results[warp * kLines + 2 * lane + i] = ptx::to_float(ptx::from_float<T>(value[0]));
    } else if (held) {
      store_vector(p.out, p.out_dtype, out_row * p.out_stride + column + i, 1, false, value);
    }
  }
  if (!p.is_second) return;
  __syncthreads();  // the slots' results are there
  if (warp % slots != 0 || lane >= kLines || slot >= p.rows) return;
  float sum[kVector] = {};
  for (int i = 0; i < slots; ++i) sum[0] += results[(warp + i) * kLines + lane];
  store_vector(p.out, p.out_dtype, out_row * p.out_stride + first_column + lane, 1, false, sum);
}

template <typename T>
void launch_in_order(const GroupedGemm& p, cudaStream_t stream) {
  const bool gated = is_gated(p.activation.kind);
  const int64_t slots = p.is_second ? p.topk : 1, groups = p.n / (gated ? kLines / 2 : kLines);
  const InOrderTile tile = choose_in_order_tile(p.rows / slots * groups, slots, p.k, device_info());
  launch<Start::kEarly>(
      gated ? grouped_gemv_in_order_kernel<T, true> : grouped_gemv_in_order_kernel<T, false>,
      tile.blocks, 32 * tile.warps, tile.bytes, stream, p, Divisor(groups), tile.turns);
}

template <typename T>
void launch_gemv(const GroupedGemm& p, cudaStream_t stream) {
  if (p.in_order) return launch_in_order<T>(p, stream);
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
