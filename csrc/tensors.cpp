#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "checks.h"

namespace simple_moe {

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

Tensor contiguous_of(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

std::optional<Tensor> contiguous_of(const std::optional<Tensor>& t) {
  return t ? std::optional(contiguous_of(*t)) : std::nullopt;
}

Floats floats_of(const std::optional<Tensor>& t) {
  return t ? Floats{t->const_data_ptr(), dtype_of(*t)} : Floats{};
}

Rows rows_of(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  if (columns > 1 && t.stride(1) != 1) return rows_of(contiguous_of(t));
  // The stride of a single row may be anything; this one is aligned whenever a row's length is.
  return {t, t.const_data_ptr(), rows > 1 ? t.stride(0) : columns};
}

ExpertMatrices expert_matrices_of(const Tensor& t) {
  const int64_t rows = t.size(1), columns = t.size(2);
  // The stride of a size of 1 may be anything, again.
  const int64_t row_stride = rows > 1 ? t.stride(1) : columns;
  const int64_t col_stride = columns > 1 ? t.stride(2) : 1;
  const int64_t expert_stride = t.size(0) > 1 ? t.stride(0) : rows * columns;
  const void* data = t.const_data_ptr();
  if (col_stride == 1 && row_stride >= columns) return {t, data, expert_stride, row_stride, 1};
  // Column-major, where a single row's elements may lie apart too.
  const int64_t inner = rows > 1 ? row_stride : 1;
  if (inner == 1 && col_stride >= rows) return {t, data, expert_stride, 1, col_stride};
  return expert_matrices_of(contiguous_of(t));
}

bool lie_apart(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  // The stride of a size of 1 may be anything: as if it were larger than any other.
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  const int64_t row_stride = rows > 1 ? t.stride(0) : kAny;
  const int64_t col_stride = columns > 1 ? t.stride(1) : kAny;
  return (col_stride > 0 && row_stride > (columns - 1) * col_stride) ||
         (row_stride > 0 && col_stride > (rows - 1) * row_stride);
}

bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto end = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * t.element_size();
  };
  return a.const_data_ptr() < end(b) && b.const_data_ptr() < end(a);
}

}  // namespace simple_moe
