// New tensors, and inputs as the kernels read them: a layout they can't read is copied.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "params.h"

namespace simple_moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fresh storage on the device of `like`.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

Tensor contiguous_of(const Tensor& t);
std::optional<Tensor> contiguous_of(const std::optional<Tensor>& t);

// Of a contiguous tensor that is known to be int32.
inline int32_t* int32_data(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }
inline const int32_t* const_int32_data(const Tensor& t) {
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Of a contiguous tensor; null where there is none.
Floats floats_of(const std::optional<Tensor>& t);

// [rows, columns] with contiguous columns. The tensor keeps a copy alive, if one was needed.
struct Rows {
  Tensor tensor;
  const void* data;
  int64_t stride;
};
Rows rows_of(const Tensor& t);

// [experts, rows, columns], each matrix row-major or column-major: w.transpose(1, 2) isn't copied.
struct ExpertMatrices {
  Tensor tensor;
  const void* data;
  int64_t expert_stride, row_stride, col_stride;
};
ExpertMatrices expert_matrices_of(const Tensor& t);

// Whether the rows, or the columns, of a matrix begin past each other's ends, so that every element
// has a place of its own.
bool lie_apart(const Tensor& t);

// Whether some byte may belong to both.
bool overlap(const Tensor& a, const Tensor& b);

}  // namespace simple_moe
