// What a grouped_gemm may need beside its product: the row tiles, the rows that belong to no
// expert, the end of a product that another library made.
#include "epilogue.cuh"
#include "launch.h"
#include "primitives.h"
#include "row_tiles.cuh"
#include "shapes.h"

namespace simple_moe::cuda {

namespace {

constexpr int kThreads = 128;

// A thread takes an expert, and counts the tiles of those before it; the one past the last says how
// many there are. Malformed offsets are made monotonic by a running maximum, so that no row belongs
// to two experts.
__global__ void __launch_bounds__(kThreads) row_tiles_kernel(const GroupedGemm p, Divisor height) {
  ptx::follow_earlier_kernels();
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (expert > p.experts) return;
  const auto clamped = [&](int64_t e) { return clamped_offset(p.expert_offsets, e, p.rows); };
  int begin = clamped(0), rows = 0, number = 0, count = 0;
  for (int64_t e = 0; e <= expert; ++e) {
    begin += rows;
    number += count;
    rows = e < p.experts ? max(begin, clamped(e + 1)) - begin : 0;
    count = height.divide(rows + height.value - 1);
  }
  if (expert == p.experts) *p.row_tiles.head = {number, {}};
  write_row_tiles(p.row_tiles, static_cast<int>(expert), begin, rows, count, number);
}

// A warp takes a row.
__global__ void __launch_bounds__(kThreads) zero_other_rows_kernel(const GroupedGemm p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  // Malformed offsets are made monotonic by a running maximum: the experts' rows are those from the
  // first offset to the largest.
  bool held = false;
  for (int64_t e = 1; e <= p.experts; ++e) held |= p.expert_offsets[e] > row;
  if (row >= p.rows || (held && p.expert_offsets[0] <= row)) return;
  for (int64_t column = threadIdx.x % 32; column < p.n; column += 32)
    store_vector(p.out, p.out_dtype, row * p.out_stride + column, 1, false, {});
}

// A block takes some rows of one expert.
constexpr int kEpilogueRows = 8;
__global__ void __launch_bounds__(kThreads)
    grouped_gemm_epilogue_kernel(const GroupedGemm p, const float* product, int64_t first_row,
                                 int64_t rows, int64_t expert) {
  const bool gated = is_gated(p.activation.kind);
  const int64_t width = gated ? 2 * p.n : p.n;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kEpilogueRows, left = rows - first;
  const int columns = static_cast<int>((p.n + kVector - 1) / kVector * kVector);
  finish_rows(p, expert, first_row + first,
              left < kEpilogueRows ? static_cast<int>(left) : kEpilogueRows, 0, columns,
              [&](int row, int column, bool up) {
                if (column >= p.n) return 0.0f;
                const int64_t at = gated ? branch_row(p, column, up) : column;
                return product[(first + row) * width + at];
              });
}

}  // namespace

void row_tiles(const GroupedGemm& p, cudaStream_t stream) {
  launch<Start::kEarly>(row_tiles_kernel, ceil_div(p.experts + 1, kThreads), kThreads, 0, stream, p,
                        Divisor(p.row_tiles.height));
}

void zero_other_rows(const GroupedGemm& p, cudaStream_t stream) {
  launch(zero_other_rows_kernel, ceil_div(p.rows, kThreads / 32), kThreads, 0, stream, p);
}

void grouped_gemm_epilogue(const GroupedGemm& p, const float* product, int64_t first_row,
                           int64_t rows, int64_t expert, cudaStream_t stream) {
  launch(grouped_gemm_epilogue_kernel, ceil_div(rows, kEpilogueRows), kThreads, 0, stream, p,
         product, first_row, rows, expert);
}

}  // namespace simple_moe::cuda
