// grouped_gemm on the CPU: one float32 product per expert that has rows, then one pass over it for
// bias, activation and routing weight.
//
//   a's rows --gather--> [rows, k] --product--> [rows, n or 2 n], float32 --epilogue--> out
//
// 16-bit operands are multiplied as they are where dot_products does that well. Elsewhere torch
// multiplies float32 copies of them: its own matmul of 16 bits rounds the sums to 16 bits, before
// the bias is added, and may overflow.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "activation.h"
#include "common.h"
#include "dot_products.h"
#include "primitives.h"

namespace simple_moe::cpu {
namespace {

constexpr int64_t kBlock = 32;                 // Columns the epilogue takes at once.
constexpr int64_t kProductElements = 1 << 22;  // Of scratch, so that long experts go in pieces ...
constexpr int64_t kMinRows = 256;              // ... that still repay converting the weights.
constexpr int64_t kWeightElements = 1 << 19;   // Converted at a time: 2 MiB stay in the cache.

// Compiled for AVX2 as well, with all that it calls, and chosen when the library is loaded: the
// rest of it is for any x86-64.
#if defined(__x86_64__) && defined(__GLIBC__)
#define SIMPLE_MOE_AVX2_TOO __attribute__((target_clones("avx2", "default"), flatten))
#else
#define SIMPLE_MOE_AVX2_TOO
#endif

// `count` of them, `step` apart. A whole block has a length that the compiler knows.
template <class T>
void copy_columns(T* to, const T* from, int64_t step, int64_t count) {
  if (count < kBlock) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
  } else if (step == 1) {
    for (int64_t i = 0; i < kBlock; ++i) to[i] = from[i];
  } else {
    for (int64_t i = 0; i < kBlock; ++i) to[i] = from[2 * i];
  }
}

class GroupedGemmRun {
 public:
  explicit GroupedGemmRun(const GroupedGemm& p)
      : p_(p), width_(is_gated(p.activation.kind) ? 2 * p.n : p.n) {}

  void run_expert(int64_t expert, int64_t begin, int64_t end) {
    const Matrix weights{const_cast<void*>(offset(p_.b, p_.dtype, expert * p_.b_expert_stride)),
                         p_.dtype,
                         width_,
                         p_.k,
                         p_.b_row_stride,
                         p_.b_col_stride};
    const int64_t step = std::max(kMinRows, kProductElements / width_);
    for (int64_t first = begin; first < end; first += step) {
      run_rows(expert, weights, first, std::min(step, end - first));
    }
  }

 private:
  void run_rows(int64_t expert, const Matrix& weights, int64_t first, int64_t count) {
    const Matrix out{offset(p_.out, p_.out_dtype, first * p_.out_stride), p_.out_dtype, count, p_.n,
                     p_.out_stride};
    const bool in_place = p_.out_dtype == DType::kFloat32 && width_ == p_.n && !p_.out_rows;
    const Matrix product = in_place ? out : product_.matrix(DType::kFloat32, count, width_);
    multiply_rows(product, rows_of_a(first, count), weights);
    const bool identity = p_.activation.kind == Activation::kIdentity;
    if (!identity || p_.bias.data || p_.row_weights.data || p_.out_rows) {
      with_type(p_.out_dtype, [&](auto* type) {
        apply_epilogue<std::remove_pointer_t<decltype(type)>>(product, expert, first);
      });
    } else if (!in_place) {
      convert(out, product);
    }
  }

  Matrix rows_of_a(int64_t first, int64_t count) {
    const auto source = [&](int64_t row) {
      const int64_t from = p_.source_rows ? p_.source_rows[row] : row;
      return const_cast<void*>(offset(p_.a, p_.dtype, from * p_.a_stride));
    };
    if (!p_.source_rows || count == 1) {
      return {source(first), p_.dtype, count, p_.k, p_.a_stride};
    }
    const Matrix gathered = gathered_.matrix(p_.dtype, count, p_.k);
    const size_t bytes = static_cast<size_t>(p_.k) * element_size(p_.dtype);
    torch::stable::parallel_for(0, count, grain_of(p_.k), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::memcpy(gathered.row_block(r, 1).data, source(first + r), bytes);
      }
    });
    return gathered;
  }

  // product = a @ weights.T in float32.
  void multiply_rows(const Matrix& product, const Matrix& a, const Matrix& weights) {
    if (p_.k == 0) {
      for (int64_t r = 0; r < product.rows; ++r) {
        std::memset(product.row_block(r, 1).data, 0, static_cast<size_t>(product.cols) * 4);
      }
    } else if (p_.dtype == DType::kFloat32) {
      multiply(product, a, weights.transposed());
    } else if (dot_products_pay(p_.dtype, a.rows)) {
      dot_products(product, a, weights.col_stride == 1 ? weights : transposed_copy(weights));
    } else {
      multiply_converted(product, a, weights);
    }
  }

  // A 16-bit matrix in the other layout. (torch's own copy does this on one thread.)
  Matrix transposed_copy(const Matrix& m) {
    constexpr int64_t kSide = 32;
    const Matrix copy = copy_.matrix(m.dtype, m.rows, m.cols);
    const auto copy_rows = [&](int64_t first, int64_t rows) {
      // By way of a small square: one of the two strides would otherwise strain the cache.
      uint16_t square[kSide][kSide];
      for (int64_t col = 0; col < m.cols; col += kSide) {
        const int64_t cols = std::min(kSide, m.cols - col);
        const auto* from =
            static_cast<const uint16_t*>(m.row_block(first, 1).col_block(col, 1).data);
        for (int64_t c = 0; c < cols; ++c) {
          for (int64_t r = 0; r < rows; ++r)
            square[r][c] = from[r * m.row_stride + c * m.col_stride];
        }
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(square[r], cols,
                      static_cast<uint16_t*>(copy.data) + (first + r) * m.cols + col);
        }
      }
    };
    const int64_t blocks = (m.rows + kSide - 1) / kSide;
    torch::stable::parallel_for(
        0, blocks, grain_of(kSide * m.cols), [&](int64_t block, int64_t end) {
          for (; block < end; ++block) {
            copy_rows(block * kSide, std::min(kSide, m.rows - block * kSide));
          }
        });
    return copy;
  }

  void multiply_converted(const Matrix& product, const Matrix& a, const Matrix& weights) {
    const Matrix a32 = a32_.matrix(DType::kFloat32, a.rows, a.cols);
    convert(a32, a);
    const int64_t step = std::max<int64_t>(64, kWeightElements / p_.k);
    for (int64_t first = 0; first < weights.rows; first += step) {
      const Matrix block = weights.row_block(first, std::min(step, weights.rows - first));
      // In the layout it has: a conversion that transposes is several times slower.
      const bool k_contiguous = weights.col_stride == 1;
      const Matrix block32 =
          k_contiguous ? weights32_.matrix(DType::kFloat32, block.rows, block.cols)
                       : weights32_.matrix(DType::kFloat32, block.cols, block.rows).transposed();
      convert(block32, block);
      multiply(product.col_block(first, block.rows), a32, block32.transposed());
    }
  }

  // Bias, activation, routing weight. p.out may be the product itself.
  template <class Out>
  void apply_epilogue(const Matrix& product, int64_t expert, int64_t first) {
    const float* bias = bias_of(expert);
    const ActivationScalars scalars = scalars_of(p_.activation, expert);
    torch::stable::parallel_for(
        0, product.rows, grain_of(4 * width_), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const float weight = p_.row_weights.data ? load(p_.row_weights, first + r) : 1.0f;
            const int64_t out_row = p_.out_rows ? p_.out_rows[first + r] : first + r;
            finish_row(static_cast<Out*>(p_.out) + out_row * p_.out_stride,
                       static_cast<const float*>(product.data) + r * product.row_stride, bias,
                       scalars, weight);
          }
        });
  }

  // The expert's bias in float32, or null.
  const float* bias_of(int64_t expert) {
    if (!p_.bias.data) return nullptr;
    float* const bias = static_cast<float*>(bias_.reserve(DType::kFloat32, width_));
    for (int64_t i = 0; i < width_; ++i) bias[i] = load(p_.bias, expert * width_ + i);
    return bias;
  }

  template <class Out>
  SIMPLE_MOE_AVX2_TOO void finish_row(Out* out, const float* row, const float* bias,
                                      const ActivationScalars& scalars, float weight) const {
    const bool gated = is_gated(p_.activation.kind);
    const int64_t step = gated && p_.gate_layout == GateLayout::kInterleaved ? 2 : 1;
    const int64_t gate_first = gated && p_.gate_layout == GateLayout::kUpGate ? p_.n : 0;
    const int64_t up_first = p_.gate_layout == GateLayout::kGateUp   ? p_.n
                             : p_.gate_layout == GateLayout::kUpGate ? 0
                                                                     : 1;
    const auto read = [&](float* values, int64_t first, int64_t count) {
      copy_columns(values, row + first, step, count);
      if (!bias) return;
      float added[kBlock] = {};
      copy_columns(added, bias + first, step, count);
      for (int64_t i = 0; i < kBlock; ++i) values[i] += added[i];
    };
    float gate[kBlock] = {}, up[kBlock] = {};
    for (int64_t j = 0; j < p_.n; j += kBlock) {
      const int64_t count = std::min(kBlock, p_.n - j);
      read(gate, gate_first + j * step, count);
      if (gated) {
        read(up, up_first + j * step, count);
        activate_gated<kBlock>(p_.activation.kind, scalars, gate, up);
      } else {
        activate<kBlock>(p_.activation.kind, gate);
      }
      Out values[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) values[i] = static_cast<Out>(weight * gate[i]);
      // In place, this never overtakes what is still to be read.
      copy_columns(out + j, values, 1, count);
    }
  }

  const GroupedGemm& p_;
  int64_t width_;
  Scratch product_, gathered_, a32_, weights32_, copy_, bias_;
};

void zero_rows(const GroupedGemm& p, int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(p.n) * element_size(p.out_dtype);
  for (int64_t r = begin; r < end; ++r) {
    std::memset(offset(p.out, p.out_dtype, r * p.out_stride), 0, bytes);
  }
}

}  // namespace

void grouped_gemm(const GroupedGemm& p) {
  if (p.rows == 0 || p.n == 0) return;
  GroupedGemmRun run(p);
  RowRanges ranges(p.expert_offsets, p.rows);
  if (p.zero_other_rows) zero_rows(p, 0, ranges.reached());
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t begin = ranges.reached(), end = ranges.next();
    if (begin < end) run.run_expert(e, begin, end);
  }
  if (p.zero_other_rows) zero_rows(p, ranges.reached(), p.rows);
}

}  // namespace simple_moe::cpu
