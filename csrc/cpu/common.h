// What the CPU primitives share: 16-bit loads, row ranges, and torch's own products and conversions
// on raw pointers.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "params.h"
#include "shim.h"

namespace simple_moe::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Calls `f` with a null pointer of the C++ type behind `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

inline float load(const Floats& floats, int64_t index) {
  switch (floats.dtype) {
    case DType::kFloat16:
      return static_cast<const Half*>(floats.data)[index];
    case DType::kBFloat16:
      return static_cast<const BFloat16*>(floats.data)[index];
    default:
      return static_cast<const float*>(floats.data)[index];
  }
}

inline const void* offset(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * static_cast<int64_t>(element_size(dtype));
}

inline void* offset(void* data, DType dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * static_cast<int64_t>(element_size(dtype));
}

// Iterations of `work` elements each that are worth a thread of their own.
inline int64_t grain_of(int64_t work) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work));
}

// Hands out the experts' row ranges one after another. Offsets may come from anywhere: clamped to
// [0, rows] and made monotonic by a running maximum, no row lies outside or in two ranges.
class RowRanges {
 public:
  RowRanges(const int32_t* offsets, int64_t rows)
      : next_offset_(offsets), rows_(rows), reached_(0) {
    next();
  }
  // The end of the range that begins where the previous one ended.
  int64_t next() {
    reached_ = std::max(reached_, std::clamp<int64_t>(*next_offset_++, 0, rows_));
    return reached_;
  }
  int64_t reached() const { return reached_; }

 private:
  const int32_t* next_offset_;
  int64_t rows_, reached_;
};

// A matrix somewhere in memory, as torch's operators are to see it.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols, row_stride, col_stride = 1;

  Matrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
  Matrix row_block(int64_t first, int64_t count) const {
    return {offset(data, dtype, first * row_stride), dtype, count, cols, row_stride, col_stride};
  }
  Matrix col_block(int64_t first, int64_t count) const {
    return {offset(data, dtype, first * col_stride), dtype, rows, count, row_stride, col_stride};
  }
};

inline torch::stable::Tensor tensor_of(const Matrix& m) {
  using torch::headeronly::ScalarType;
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  const std::array<int64_t, 2> sizes{m.rows, m.cols}, strides{m.row_stride, m.col_stride};
  return torch::stable::from_blob(m.data, sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  kTypes[static_cast<int>(m.dtype)]);
}

// out = a @ b. The out= form, because autocast rewrites the functional one to 16 bits.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor_of(a)),
                                    torch::stable::detail::from(tensor_of(b)),
                                    torch::stable::detail::from(tensor_of(out))};
  check_shim(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION), "aten::mm");
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // Drops the reference returned.
}

// Copies between dtypes, threaded and with the CPU's vector instructions: this library itself is
// built for any x86-64.
inline void convert(const Matrix& out, const Matrix& in) {
  torch::stable::Tensor target = tensor_of(out);
  torch::stable::copy_(target, tensor_of(in));
}

// A buffer of torch's allocator that grows to the largest size asked for and is reused.
// (Hidden as its tensor is: the compiler warns of anything else.)
class __attribute__((visibility("hidden"))) Scratch {
 public:
  void* reserve(DType dtype, int64_t elements) {
    const int64_t bytes = elements * static_cast<int64_t>(element_size(dtype));
    if (bytes > bytes_) {
      const std::array<int64_t, 1> size{bytes};
      buffer_ = torch::stable::empty(size, torch::headeronly::ScalarType::Byte);
      data_ = buffer_.mutable_data_ptr();
      bytes_ = bytes;
    }
    return data_;
  }
  Matrix matrix(DType dtype, int64_t rows, int64_t cols) {
    return {reserve(dtype, rows * cols), dtype, rows, cols, cols};
  }

 private:
  torch::stable::Tensor buffer_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace simple_moe::cpu
