#include "toys.h"

#include "cuda/block_scan.cuh"
#include "cuda/items.cuh"
#include "cuda/launch.h"
#include "cuda/primitives.h"
#include "cuda/ptx.cuh"

namespace simple_moe::toys {
namespace {

// A block makes 32 x 16 of the output: each of two warps 16 x 16, from two stages of 16 k each.
struct Stage {
  bf16 a[32][16];
  bf16 b[16][16];  // [n][k] or [k][n]
};

__global__ void gemm_kernel(const bf16* a, const bf16* b, float* out, int m, int n, int k,
                            bool b_is_k_by_n) {
  Stage* const stages = reinterpret_cast<Stage*>(ptx::dynamic_smem());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row0 = blockIdx.x / (n / 16) * 32, column0 = blockIdx.x % (n / 16) * 16;
  auto load = [&](int step) {
    Stage& stage = stages[step % 2];
    const int row = thread / 2, column = thread % 2 * 8, k0 = step * 16;
    if (k0 < k) {
      const bool valid = row0 + row < m;
      ptx::cp_async_16(ptx::smem_address(&stage.a[row][column]), a + (row0 + row) * k + k0 + column,
                       valid);
      if (row < 16) {
        const bf16* const source = b_is_k_by_n ? b + (k0 + row) * n + column0 + column
                                               : b + (column0 + row) * k + k0 + column;
        ptx::cp_async_16(ptx::smem_address(&stage.b[row][column]), source, true);
      }
    }
    ptx::cp_async_commit();
  };
  float d[2][4] = {};
  load(0);
  for (int step = 0; step * 16 < k; ++step) {
    load(step + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();  // all threads' copies have landed
    const Stage& stage = stages[step % 2];
    uint32_t fa[4], fb[4];
    ptx::ldmatrix_x4(fa, ptx::smem_address(&stage.a[warp * 16 + lane % 16][lane / 16 * 8]));
    if (b_is_k_by_n) {
      ptx::ldmatrix_x4_trans(fb, ptx::smem_address(&stage.b[lane % 16][lane / 16 * 8]));
    } else {
      ptx::ldmatrix_x4(fb, ptx::smem_address(&stage.b[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]));
    }
    ptx::mma_m16n8k16<bf16>(d[0], fa, fb[0], fb[1]);
    ptx::mma_m16n8k16<bf16>(d[1], fa, fb[2], fb[3]);
    __syncthreads();  // all threads have read the stage
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int column = column0 + half * 8 + lane % 4 * 2 + i % 2;
      if (row < m) out[row * n + column] = d[half][i];
    }
  }
}

__global__ void scan_kernel(const int* x, int* out, int n) {
  int* const warp_totals = reinterpret_cast<int*>(ptx::dynamic_smem());
  const int i = threadIdx.x;
  int value = i < n ? x[i] : 0;
  int total;
  value = block_scan(value, warp_totals, total);
  if (i < n) out[i] = value;
}

constexpr int kTileRows = 64;

__global__ void tiles_kernel(const GroupedGemm p, int* out, const cuda::Divisor column_tiles) {
  const cuda::Items items(p, column_tiles);
  for (unsigned number = blockIdx.x;; number += gridDim.x) {
    const cuda::Item item = items.find(number, items.look(number));
    if (item.row_count == 0) break;
    const int row = threadIdx.x;
    if (row < item.row_count)
      out[(item.row_begin + row) * column_tiles.value + item.column_tile] = item.expert;
  }
}

__global__ void divide_kernel(const int* x, int* out, int n, const cuda::Divisor divisor) {
  const int i = threadIdx.x;
  if (i < n) out[i] = static_cast<int>(divisor.divide(static_cast<unsigned>(x[i])));
}

}  // namespace

void gemm(const bf16* a, const bf16* b, float* out, int m, int n, int k, bool b_is_k_by_n) {
  launch(gemm_kernel, (m + 31) / 32 * (n / 16), 64, 2 * sizeof(Stage), nullptr, a, b, out, m, n, k,
         b_is_k_by_n);
}

void scan(const int* x, int* out, int n) {
  launch(scan_kernel, 1, 1024, 32 * sizeof(int), nullptr, x, out, n);
}

void divide(const int* x, int* out, int n, int divisor) {
  launch(divide_kernel, 1, 1024, 0, nullptr, x, out, n, cuda::Divisor(divisor));
}

void tiles(const int* expert_offsets, int* out, int64_t experts, int64_t rows, int column_tiles,
           int group, RowTilesHead* row_tiles) {
  GroupedGemm p{};
  p.expert_offsets = expert_offsets;
  p.experts = experts;
  p.rows = rows;
  p.n = 16 * column_tiles;
  p.activation.kind = Activation::kIdentity;
  const int most = static_cast<int>(rows / kTileRows + experts);
  p.row_tiles = {kTileRows, 4, group, most, row_tiles};
  cuda::row_tiles(p, nullptr);
  launch(tiles_kernel, device_info().sm_count, kTileRows, 0, nullptr, p, out,
         cuda::Divisor(column_tiles));
}

}  // namespace simple_moe::toys
