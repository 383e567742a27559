// grouped_gemm and grouped_gemv: which kernel.
#include "cuda_check.h"
#include "device.h"
#include "primitives.h"
#include "shapes.h"

namespace simple_moe {

struct f16;
struct bf16;

namespace cuda {

// The templates are compiled for each dtype in a file of its own: they take the compiler's time.
template <typename T>
void launch_sm80(const GroupedGemm& p, cudaStream_t stream);
template <typename T>
void launch_sm90(const GroupedGemm& p, cudaStream_t stream);
void launch_any(const GroupedGemm& p, cudaStream_t stream);

// Whether both operands are of 16 bits and come in whole vectors, as grouped_gemm.cuh and
// grouped_gemv.cu read them. Strides are 32 bits wide there.
bool reads_whole_vectors(const GroupedGemm& p) {
  return p.dtype != DType::kFloat32 && p.k > 0 && p.k < 1 << 30 && p.k % 8 == 0 && p.n % 8 == 0 &&
         p.a_stride < 1 << 30 && p.b_row_stride < 1 << 24 && p.b_col_stride == 1 &&
         rows_are_aligned(p.a, p.a_stride, p.dtype) &&
         rows_are_aligned(p.b, p.b_row_stride, p.dtype) &&
         rows_are_aligned(p.b, p.b_expert_stride, p.dtype);
}

namespace {

bool is_whole_vectors(const GroupedGemm& p) {
  const bool full = p.out_dtype == DType::kFloat32 && !is_gated(p.activation.kind);
  return reads_whole_vectors(p) && (p.out_dtype == p.dtype || full) && p.out_stride < 1 << 30 &&
         rows_are_aligned(p.out, p.out_stride, p.out_dtype);
}

}  // namespace

void grouped_gemm(const GroupedGemm& p, cudaStream_t stream) {
  if (p.rows == 0 || p.n == 0) return;
  if (p.zero_other_rows) zero_other_rows(p, stream);
  if (is_whole_vectors(p)) {
    return p.dtype == DType::kFloat16 ? launch_sm80<f16>(p, stream) : launch_sm80<bf16>(p, stream);
  }
  launch_any(p, stream);
  // These kernels don't count their columns: all are there when they have ended.
  if (p.row_tiles.progress && !p.is_second) {
    cuda_check(cudaMemsetAsync(p.row_tiles.progress, 0x7F, sizeof(int32_t) * p.rows, stream),
               "cudaMemsetAsync");
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
  if (p.zero_other_rows) zero_other_rows(p, stream);
  p.dtype == DType::kFloat16 ? launch_sm90<f16>(p, stream) : launch_sm90<bf16>(p, stream);
}
#endif

bool grouped_gemv_suits(const GroupedGemm& p) {
  return p.n > 0 && p.topk <= (p.in_order ? kMostSlotsInOrder : 1024) && reads_whole_vectors(p) &&
         p.rows * p.n < int64_t{1} << 33 &&  // blocks of four columns: fewer than 2^31
         slots_go_by_themselves(size_of(p), p.rows / p.topk);
}

}  // namespace cuda
}  // namespace simple_moe
