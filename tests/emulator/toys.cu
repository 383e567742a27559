#include "toys.h"

#include "cuda/block_scan.cuh"
#include "cuda/expert_tiles.cuh"
#include "cuda/launch.cuh"
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
      ptx::cp_async_16(&stage.a[row][column], a + (row0 + row) * k + k0 + column, valid);
      if (row < 16) {
        const bf16* const source = b_is_k_by_n ? b + (k0 + row) * n + column0 + column
                                               : b + (column0 + row) * k + k0 + column;
        ptx::cp_async_16(&stage.b[row][column], source, true);
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
    ptx::ldmatrix_x4(fa, &stage.a[warp * 16 + lane % 16][lane / 16 * 8]);
    if (b_is_k_by_n) {
      ptx::ldmatrix_x4_trans(fb, &stage.b[lane % 16][lane / 16 * 8]);
    } else {
      ptx::ldmatrix_x4(fb, &stage.b[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
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
  value = block_scan<1024>(value, Sum(), warp_totals, total);
  if (i < n) out[i] = value;
}

using Tiles = ExpertTiles<64, 16>;

__global__ void tiles_kernel(const int* expert_offsets, int* out, int64_t experts, int64_t rows,
                             int64_t column_tiles) {
  Tiles tiles(reinterpret_cast<Tiles::Storage*>(ptx::dynamic_smem()), expert_offsets, experts, rows,
              column_tiles);
  Tile tile;
  for (int64_t number = blockIdx.x; tiles.find(number, tile); number += gridDim.x) {
    const int row = threadIdx.x;
    if (row < tile.row_count) {
      out[(tile.row_begin + row) * column_tiles + tile.column_tile] = tile.expert;
    }
  }
}

}  // namespace

void gemm(const bf16* a, const bf16* b, float* out, int m, int n, int k, bool b_is_k_by_n) {
  launch(gemm_kernel, (m + 31) / 32 * (n / 16), 64, 2 * sizeof(Stage), nullptr, a, b, out, m, n, k,
         b_is_k_by_n);
}

void scan(const int* x, int* out, int n) {
  launch(scan_kernel, 1, 1024, 32 * sizeof(int), nullptr, x, out, n);
}

void tiles(const int* expert_offsets, int* out, int64_t experts, int64_t rows,
           int64_t column_tiles) {
  launch(tiles_kernel, device_info().sm_count, 64, sizeof(Tiles::Storage), nullptr, expert_offsets,
         out, experts, rows, column_tiles);
}

}  // namespace simple_moe::toys
