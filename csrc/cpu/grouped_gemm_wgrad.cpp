// grouped_gemm_wgrad on the CPU: one float32 product of torch's per expert.
#include <cstdint>
#include <cstring>

#include "common.h"
#include "primitives.h"

namespace simple_moe::cpu {
namespace {

// The matrix itself, or a float32 copy of it.
Matrix as_float32(const Matrix& m, Scratch& scratch) {
  if (m.dtype == DType::kFloat32) return m;
  const Matrix copy = scratch.matrix(DType::kFloat32, m.rows, m.cols);
  convert(copy, m);
  return copy;
}

}  // namespace

void grouped_gemm_wgrad(const GroupedGemmWgrad& p) {
  if (p.m == 0 || p.n == 0) return;
  const Matrix a{const_cast<void*>(p.a), p.dtype, p.rows, p.m, p.a_stride};
  const Matrix b{const_cast<void*>(p.b), p.dtype, p.rows, p.n, p.b_stride};
  Scratch a_scratch, b_scratch, out_scratch;
  RowRanges ranges(p.expert_offsets, p.rows);
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t begin = ranges.reached(), count = ranges.next() - begin;
    const Matrix out{offset(p.out, p.out_dtype, e * p.m * p.n), p.out_dtype, p.m, p.n, p.n};
    if (count == 0) {
      std::memset(out.data, 0, static_cast<size_t>(p.m * p.n) * element_size(p.out_dtype));
      continue;
    }
    const bool in_place = p.out_dtype == DType::kFloat32;
    const Matrix product = in_place ? out : out_scratch.matrix(DType::kFloat32, p.m, p.n);
    multiply(product, as_float32(a.row_block(begin, count), a_scratch).transposed(),
             as_float32(b.row_block(begin, count), b_scratch));
    if (!in_place) convert(out, product);
  }
}

}  // namespace simple_moe::cpu
