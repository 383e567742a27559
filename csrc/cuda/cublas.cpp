// The cublas backend: one product per expert through torch's own matmul, then the epilogue.
//
//   a's rows --gather--> [rows, k] --mm--> product [rows, n or 2 n], float32 --epilogue--> out
//
// It reads the offsets on the host, once per call, and so waits for the device.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda_check.h"
#include "primitives.h"
#include "shim.h"

namespace simple_moe::cuda {
namespace {

void refuse_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  cuda_check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusNone) return;
  throw std::runtime_error(
      "simple_moe: backend 'cublas' reads the expert offsets on the host, which a CUDA graph can't "
      "capture: use backend='auto' or 'sm80' there");
}

// Clamped to [0, rows] and monotonic, as all backends take them.
std::vector<int32_t> read_offsets(const GroupedGemm& p, cudaStream_t stream) {
  std::vector<int32_t> offsets(static_cast<size_t>(p.experts) + 1);
  cuda_check(cudaMemcpyAsync(offsets.data(), p.expert_offsets, offsets.size() * sizeof(int32_t),
                             cudaMemcpyDeviceToHost, stream),
             "cudaMemcpyAsync");
  cuda_check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  int32_t reached = 0;
  for (int32_t& offset : offsets) {
    reached = std::max(reached, std::clamp<int32_t>(offset, 0, static_cast<int32_t>(p.rows)));
    offset = reached;
  }
  return offsets;
}

// A matrix on the current device as a tensor; it must outlive the tensor.
Tensor tensor_of(const void* data, ScalarType type, std::array<int64_t, 2> sizes,
                 std::array<int64_t, 2> strides) {
  return torch::stable::from_blob(
      const_cast<void*>(data), sizes, strides,
      {torch::headeronly::DeviceType::CUDA, torch::stable::accelerator::getCurrentDeviceIndex()},
      type);
}

// Of torch's allocator.
Tensor new_tensor(std::array<int64_t, 2> sizes, ScalarType type) {
  return torch::stable::empty(
      sizes, type, std::nullopt,
      torch::stable::Device(torch::headeronly::DeviceType::CUDA,
                            torch::stable::accelerator::getCurrentDeviceIndex()));
}

template <size_t kCount>
Tensor call(const char* op, const char* overload, std::array<StableIValue, kCount> stack) {
  check_shim(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION),
             "torch's matrix product");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a @ b in float32. A form with an `out`, because autocast rewrites the others.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  if (a.scalar_type() == ScalarType::Float) {
    call<3>("aten::mm", "out", {from(a), from(b), from(out)});
  } else {
    call<4>("aten::mm", "dtype_out", {from(a), from(b), from(ScalarType::Float), from(out)});
  }
}

// a's rows in the order of p's rows, `held` of them.
Tensor gather(const GroupedGemm& p, int64_t held) {
  using torch::stable::detail::from;
  const ScalarType type = scalar_type_of(p.dtype);
  if (!p.source_rows) return tensor_of(p.a, type, {held, p.k}, {p.a_stride, 1});
  const Tensor a = tensor_of(p.a, type, {p.source_count, p.k}, {p.a_stride, 1});
  const Tensor rows = tensor_of(p.source_rows, ScalarType::Int, {1, held}, {held, 1});
  const Tensor index = torch::stable::flatten(rows);
  return call<3>("aten::index_select", "", {from(a), from(int64_t{0}), from(index)});
}

void zero_rows(const GroupedGemm& p, int64_t begin, int64_t end, cudaStream_t stream) {
  if (begin >= end) return;
  const size_t element = element_size(p.out_dtype), pitch = p.out_stride * element;
  cuda_check(cudaMemset2DAsync(static_cast<char*>(p.out) + begin * pitch, pitch, 0, p.n * element,
                               end - begin, stream),
             "cudaMemset2DAsync");
}

}  // namespace

void cublas_grouped_gemm(const GroupedGemm& p, cudaStream_t stream) {
  if (p.rows == 0 || p.n == 0) return;
  refuse_capture(stream);
  const std::vector<int32_t> offsets = read_offsets(p, stream);
  if (p.zero_other_rows) {
    zero_rows(p, 0, offsets.front(), stream);
    zero_rows(p, offsets.back(), p.rows, stream);
  }
  int64_t longest = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    longest = std::max<int64_t>(longest, offsets[e + 1] - offsets[e]);
  }
  if (longest == 0) return;
  const int64_t width = is_gated(p.activation.kind) ? 2 * p.n : p.n;
  const Tensor rows_of_a = gather(p, offsets.back());
  const Tensor product = new_tensor({longest, width}, ScalarType::Float);
  float* const product_data = static_cast<float*>(product.mutable_data_ptr());
  const ScalarType type = scalar_type_of(p.dtype);
  const int64_t element = static_cast<int64_t>(element_size(p.dtype));
  const char* const a_data = static_cast<const char*>(rows_of_a.const_data_ptr());
  const int64_t a_stride = rows_of_a.stride(0);
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t begin = offsets[e], count = offsets[e + 1] - begin;
    if (count == 0) continue;
    const char* const weights = static_cast<const char*>(p.b) + e * p.b_expert_stride * element;
    multiply(tensor_of(product_data, ScalarType::Float, {count, width}, {width, 1}),
             tensor_of(a_data + begin * a_stride * element, type, {count, p.k}, {a_stride, 1}),
             tensor_of(weights, type, {p.k, width}, {p.b_col_stride, p.b_row_stride}));
    grouped_gemm_epilogue(p, product_data, begin, count, e, stream);
  }
}

}  // namespace simple_moe::cuda
