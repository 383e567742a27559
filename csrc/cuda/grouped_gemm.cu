// grouped_gemm: which kernel, and the rows that belong to no expert.
#include "epilogue.cuh"
#include "launch.h"
#include "primitives.h"
#include "row_tiles.cuh"
#include "shapes.h"

namespace simple_moe::cuda {

// Each for each dtype in a file of its own: they take the compiler's time.
template <typename T>
void launch_sm80(const GroupedGemm& p, cudaStream_t stream);
template <typename T>
void launch_sm90(const GroupedGemm& p, cudaStream_t stream);
template <typename T>
void launch_any(const GroupedGemm& p, cudaStream_t stream);

namespace {

constexpr int kThreads = 128;
constexpr int kRowTilesThreads = 1024;

__global__ void __launch_bounds__(kRowTilesThreads) row_tiles_kernel(const GroupedGemm p) {
  ptx::wait_for_earlier_kernels();
  ptx::let_next_kernel_start();
  using Storage = RowTilesStorage<kRowTilesThreads>;
  lay_row_tiles<kRowTilesThreads>(p.expert_offsets, p.experts, p.rows, p.row_tiles,
                                  *reinterpret_cast<Storage*>(ptx::dynamic_smem()));
}

// A warp takes a row.
__global__ void __launch_bounds__(kThreads) zero_other_rows_kernel(const GroupedGemm p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  // Malformed offsets are made monotonic by a running maximum: the experts' rows are those from the
  // first offset to the largest.
  bool held = false;
  for (int64_t e = 1; e <= p.experts; ++e) held |= p.expert_offsets[e] > row;
  if (row >= p.rows || (held && p.expert_offsets[0] <= row)) return;
  const float zeros[kVector] = {};
  for (int64_t column = threadIdx.x % 32; column < p.n; column += 32) {
    store_vector(p.out, p.out_dtype, row * p.out_stride + column, 1, false, zeros);
  }
}

// A block takes some rows of one expert.
constexpr int kEpilogueRows = 8;
__global__ void __launch_bounds__(kThreads)
    grouped_gemm_epilogue_kernel(const GroupedGemm p, const float* product, int64_t first_row,
                                 int64_t rows, int64_t expert, bool aligned) {
  const bool gated = is_gated(p.activation.kind);
  const int64_t width = gated ? 2 * p.n : p.n;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kEpilogueRows, left = rows - first;
  const int columns = static_cast<int>((p.n + kVector - 1) / kVector * kVector);
  finish_rows(p, expert, first_row + first,
              left < kEpilogueRows ? static_cast<int>(left) : kEpilogueRows, 0, columns, aligned,
              [&](int row, int column, bool up) {
                if (column >= p.n) return 0.0f;
                const int64_t at = gated ? branch_row(p, column, up) : column;
                return product[(first + row) * width + at];
              });
}

void zero_other_rows(const GroupedGemm& p, cudaStream_t stream) {
  if (p.zero_other_rows) {
    launch(zero_other_rows_kernel, ceil_div(p.rows, kThreads / 32), kThreads, 0, stream, p);
  }
}

// What grouped_gemm.cuh takes.
bool is_whole_vectors(const GroupedGemm& p) {
  // That kernel's strides are 32 bits wide.
  const bool narrow = p.k < 1 << 30 && p.a_stride < 1 << 30 && p.b_row_stride < 1 << 24;
  return narrow && p.dtype != DType::kFloat32 && p.b_col_stride == 1 && p.out_dtype == p.dtype &&
         p.k >= kVector && p.k % kVector == 0 && p.n % kVector == 0 &&
         rows_are_aligned(p.a, p.a_stride, p.dtype) &&
         rows_are_aligned(p.b, p.b_row_stride, p.dtype) &&
         rows_are_aligned(p.b, p.b_expert_stride, p.dtype) &&
         rows_are_aligned(p.out, p.out_stride, p.out_dtype);
}

}  // namespace

void row_tiles(const GroupedGemm& p, cudaStream_t stream) {
  launch<Start::kEarly>(row_tiles_kernel, 1, kRowTilesThreads,
                        sizeof(RowTilesStorage<kRowTilesThreads>), stream, p);
}

void grouped_gemm(const GroupedGemm& p, cudaStream_t stream) {
  if (p.rows == 0 || p.n == 0) return;
  zero_other_rows(p, stream);
  if (!is_whole_vectors(p)) {
    with_type(p.dtype, [&](auto type) { launch_any<decltype(type)>(p, stream); });
  } else {
    p.dtype == DType::kFloat16 ? launch_sm80<f16>(p, stream) : launch_sm80<bf16>(p, stream);
  }
}

#ifdef SIMPLE_MOE_SM90
bool has_sm90() {
  const DeviceInfo& device = device_info();
  return device.major == 9 && device.minor == 0 && device.smem_per_block >= 227 << 10;
}

void grouped_gemm_sm90(const GroupedGemm& p, cudaStream_t stream) {
  // Few rows wait for memory, and the sm80 backend's tiles suit them better.
  if (p.row_tiles.height < 128 || !is_whole_vectors(p) || p.n == 0) return grouped_gemm(p, stream);
  zero_other_rows(p, stream);
  p.dtype == DType::kFloat16 ? launch_sm90<f16>(p, stream) : launch_sm90<bf16>(p, stream);
}
#endif

void grouped_gemm_epilogue(const GroupedGemm& p, const float* product, int64_t first_row,
                           int64_t rows, int64_t expert, cudaStream_t stream) {
  launch(grouped_gemm_epilogue_kernel, ceil_div(rows, kEpilogueRows), kThreads, 0, stream, p,
         product, first_row, rows, expert, rows_are_aligned(p.out, p.out_stride, p.out_dtype));
}

}  // namespace simple_moe::cuda
