// grouped_gemm on the CPU: torch's own matmul once per expert that has rows, then one pass over the
// float32 product for bias, activation and routing weight.
//
//   a's rows --gather--> [rows, k] --mm--> product [rows, n or 2 n], float32 --epilogue--> out
//                                  b[e] --convert--^
//
// 16-bit operands are multiplied in float32 from a converted copy: torch's matmul of them is
// several times slower than conversion and float32 matmul together on a CPU without 16-bit
// products, and its 16-bit result is one rounding more and may overflow. Two rows or fewer of a
// large expert don't repay the conversion, and a CPU that has 16-bit products needs none: there the
// operands are multiplied as they are.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "activation.h"
#include "common.h"
#include "primitives.h"

namespace simple_moe::cpu {
namespace {

constexpr int kBlock = 16;                     // Columns the epilogue takes at once.
constexpr int64_t kProductElements = 1 << 22;  // Of scratch, so that long experts go in pieces ...
constexpr int64_t kMinRows = 256;              // ... that still repay converting the weights.
constexpr int64_t kWeightElements = 1 << 19;   // Converted at a time: 2 MiB stay in the cache.
// An expert of at most so many weights costs next to nothing to convert. A product of fewer columns
// than this averages too little over the extra rounding to keep to the accuracy promised.
constexpr int64_t kSmallWeights = 1 << 15;
constexpr int64_t kSmallProduct = 256;

// Whether torch multiplies matrices of this dtype with instructions made for it.
bool has_native_matmul(DType dtype) {
#ifdef __x86_64__
  if (dtype == DType::kBFloat16) {
    return __builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16");
  }
  if (dtype == DType::kFloat16) return __builtin_cpu_supports("avx512fp16");
#endif
  return dtype == DType::kFloat32;
}

bool all_finite(const Matrix& m) {
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, m.rows, grain_of(m.cols), [&](int64_t begin, int64_t end) {
    // x * 0 is NaN exactly where x is not finite.
    float sum = 0;
    for (int64_t r = begin; r < end; ++r) {
      const float* row = static_cast<const float*>(m.data) + r * m.row_stride;
      for (int64_t i = 0; i < m.cols; ++i) sum += row[i] * 0.0f;
    }
    if (sum != 0.0f) finite = false;
  });
  return finite;
}

class GroupedGemmRun {
 public:
  explicit GroupedGemmRun(const GroupedGemm& p)
      : p_(p),
        width_(is_gated(p.activation.kind) ? 2 * p.n : p.n),
        native_(has_native_matmul(p.dtype)) {}

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
    const bool float_out = p_.out_dtype == DType::kFloat32;
    const Matrix product =
        float_out && width_ == p_.n ? out : product_.matrix(DType::kFloat32, count, width_);
    multiply_rows(product, rows_of_a(first, count), weights);
    // A 16-bit output is rounded by torch, from the first n columns of the product itself.
    const Matrix result = float_out ? out : product.col_block(0, p_.n);
    apply_epilogue(result, product, expert, first);
    if (!float_out) convert(out, result);
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
    } else if (!multiply_unconverted(product, a, weights)) {
      multiply_converted(product, a, weights);
    }
  }

  // False if the product must be made from converted operands: it would be slower this way, or
  // less exact than a float32 output deserves, or it left the range of its 16 bits.
  bool multiply_unconverted(const Matrix& product, const Matrix& a, const Matrix& weights) {
    // torch has a fast path for few rows only where the dot products' operands are contiguous.
    const bool few_rows = a.rows <= 2 && weights.col_stride == 1;
    if (p_.out_dtype == DType::kFloat32 || !(native_ || few_rows)) return false;
    if (weights.rows < kSmallProduct || weights.rows * weights.cols <= kSmallWeights) return false;
    const Matrix rounded = rounded_.matrix(p_.dtype, product.rows, product.cols);
    multiply(rounded, a, weights.transposed());
    convert(product, rounded);
    return all_finite(product);
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

  // Bias, activation, routing weight. The result may lie in the first n columns of the product.
  void apply_epilogue(const Matrix& result, const Matrix& product, int64_t expert, int64_t first) {
    const bool identity = p_.activation.kind == Activation::kIdentity;
    if (identity && !p_.bias.data && !p_.row_weights) return;
    const float* bias = bias_of(expert);
    const ActivationScalars scalars = scalars_of(p_.activation, expert);
    torch::stable::parallel_for(
        0, product.rows, grain_of(4 * width_), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const float weight = p_.row_weights ? p_.row_weights[first + r] : 1.0f;
            finish_row(static_cast<float*>(result.data) + r * result.row_stride,
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

  void finish_row(float* result, const float* row, const float* bias,
                  const ActivationScalars& scalars, float weight) const {
    const bool gated = is_gated(p_.activation.kind);
    const int64_t step = gated && p_.gate_layout == GateLayout::kInterleaved ? 2 : 1;
    const int64_t gate_first = gated && p_.gate_layout == GateLayout::kUpGate ? p_.n : 0;
    const int64_t up_first = p_.gate_layout == GateLayout::kGateUp   ? p_.n
                             : p_.gate_layout == GateLayout::kUpGate ? 0
                                                                     : 1;
    const auto read = [&](float* values, int64_t first, int count) {
      for (int i = 0; i < count; ++i) values[i] = row[first + i * step];
      if (!bias) return;
      for (int i = 0; i < count; ++i) values[i] += bias[first + i * step];
    };
    float gate[kBlock] = {}, up[kBlock] = {};
    for (int64_t j = 0; j < p_.n; j += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, p_.n - j));
      read(gate, gate_first + j * step, count);
      if (gated) read(up, up_first + j * step, count);
      activate<kBlock>(p_.activation.kind, scalars, gate, up);
      // In place, this never overtakes what is still to be read.
      for (int i = 0; i < count; ++i) result[j + i] = weight * gate[i];
    }
  }

  const GroupedGemm& p_;
  int64_t width_;
  bool native_;
  Scratch product_, gathered_, rounded_, a32_, weights32_, bias_;
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
