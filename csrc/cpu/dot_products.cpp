// Two kernels, both over rows as they lie in memory, nothing packed:
//
//   AVX512-BF16  4 rows of `a` times 4 rows of `b`, 32 columns a step: 16 vectors of sums, which
//                stay in registers and are added up at the end. Weights of one block stay in the
//                first-level cache for all rows of `a`.
//   AVX2         one row of `a`, converted before, times one of `b`, converted on its way: for few
//                rows, which don't repay converting the weights into memory.
#include "dot_products.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace simple_moe::cpu {

#ifdef __x86_64__

#define SIMPLE_MOE_AVX2 __attribute__((target("avx2,fma,f16c")))
#define SIMPLE_MOE_AVX512 __attribute__((target("avx512f,avx512bw,avx512bf16")))

// GCC 12 takes the undefined vectors in its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace {

constexpr int64_t kTile = 4;
constexpr int64_t kBlockElements = 1 << 13;  // Of `b`: 16 KiB.
constexpr int64_t kFewRows = 32;

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

// ---- AVX512-BF16 ----

// The halves of two vectors, added up: half a vector of each.
SIMPLE_MOE_AVX512 inline __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

// Vector i's quarters, added up, in quarter i.
SIMPLE_MOE_AVX512 inline __m512 add_quarters(const __m512 (&v)[kTile]) {
  const __m512 a = add_halves(v[0], v[1]), b = add_halves(v[2], v[3]);
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Within each quarter: a's floats 0 and 2, b's, a's 1 and 3, b's.
SIMPLE_MOE_AVX512 inline __m512d add_pairs(__m512 a, __m512 b) {
  return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
}

// Quarter r, float n of the result: the sum of vector [n][r].
SIMPLE_MOE_AVX512 inline __m512 add_up(const __m512 (&sums)[kTile][kTile]) {
  const __m512d a = add_pairs(add_quarters(sums[0]), add_quarters(sums[1]));
  const __m512d b = add_pairs(add_quarters(sums[2]), add_quarters(sums[3]));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

// Columns i ... i + 31 of 4 x 4 rows, or as many of them as the mask has bits.
SIMPLE_MOE_AVX512 inline void add_products(__m512 (&sums)[kTile][kTile],
                                           const BFloat16* const (&a)[kTile],
                                           const BFloat16* const (&b)[kTile], int64_t i,
                                           __mmask32 mask) {
  __m512bh va[kTile], vb[kTile];
  for (int r = 0; r < kTile; ++r) va[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, a[r] + i);
  for (int n = 0; n < kTile; ++n) vb[n] = (__m512bh)_mm512_maskz_loadu_epi16(mask, b[n] + i);
  for (int n = 0; n < kTile; ++n) {
    for (int r = 0; r < kTile; ++r) sums[n][r] = _mm512_dpbf16_ps(sums[n][r], va[r], vb[n]);
  }
}

// The sums of 4 x 4 rows' products; row r of `a` in quarter r.
SIMPLE_MOE_AVX512 inline __m512 tile(const BFloat16* const (&a)[kTile],
                                     const BFloat16* const (&b)[kTile], int64_t k) {
  __m512 sums[kTile][kTile];
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), _mm512_setzero_ps());
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) add_products(sums, a, b, i, 0xffffffff);
  if (i < k) add_products(sums, a, b, i, (1u << (k - i)) - 1);
  return add_up(sums);
}

// Four rows from `first` on. Past the last one, that one again.
SIMPLE_MOE_AVX512 inline void rows_of(const Matrix& m, int64_t first,
                                      const BFloat16* (&rows)[kTile]) {
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t row = std::min(first + i, m.rows - 1);
    rows[i] = static_cast<const BFloat16*>(m.data) + row * m.row_stride;
  }
}

SIMPLE_MOE_AVX512 void tiles(const Matrix& out, const Matrix& a, const Matrix& b) {
  const BFloat16 *a_rows[kTile], *b_rows[kTile];
  for (int64_t r = 0; r < a.rows; r += kTile) {
    rows_of(a, r, a_rows);
    for (int64_t n = 0; n < b.rows; n += kTile) {
      rows_of(b, n, b_rows);
      float sums[kTile][kTile];
      _mm512_storeu_ps(sums, tile(a_rows, b_rows, a.cols));
      float* const to = static_cast<float*>(out.data) + r * out.row_stride + n;
      const int64_t rows = std::min(kTile, a.rows - r), count = std::min(kTile, b.rows - n);
      for (int64_t i = 0; i < rows; ++i) {
        if (count == kTile) {
          std::memcpy(to + i * out.row_stride, sums[i], sizeof sums[i]);
        } else {
          std::copy_n(sums[i], count, to + i * out.row_stride);
        }
      }
    }
  }
}

// ---- AVX2 ----

SIMPLE_MOE_AVX2 inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SIMPLE_MOE_AVX2 inline __m256 load8(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

template <class T>
SIMPLE_MOE_AVX2 float dot(const float* a, const T* b, int64_t k) {
  __m256 sums[4];
  std::fill(std::begin(sums), std::end(sums), _mm256_setzero_ps());
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + 8 * j;
      sums[j] = _mm256_fmadd_ps(_mm256_loadu_ps(a + at), load8(b + at), sums[j]);
    }
  }
  const __m256 all =
      _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
  float lanes[8];
  _mm256_storeu_ps(lanes, all);
  for (int step = 4; step > 0; step /= 2) {
    for (int j = 0; j < step; ++j) lanes[j] += lanes[j + step];
  }
  float rest = 0;
  for (; i < k; ++i) rest += a[i] * static_cast<float>(b[i]);
  return lanes[0] + rest;
}

template <class T>
void dots(const Matrix& out, const Matrix& a, const Matrix& b) {
  for (int64_t n = 0; n < b.rows; ++n) {
    const T* const row = static_cast<const T*>(b.data) + n * b.row_stride;
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* const from = static_cast<const float*>(a.data) + r * a.row_stride;
      static_cast<float*>(out.data)[r * out.row_stride + n] = dot(from, row, b.cols);
    }
  }
}

}  // namespace

bool dot_products_pay(DType dtype, int64_t rows) {
  if (dtype == DType::kBFloat16 && has_avx512_bf16()) return true;
  return dtype != DType::kFloat32 && rows <= kFewRows && has_avx2();
}

void dot_products(const Matrix& out, const Matrix& a, const Matrix& b) {
  const bool native = b.dtype == DType::kBFloat16 && has_avx512_bf16();
  Scratch scratch;
  const Matrix a32 = native ? a : scratch.matrix(DType::kFloat32, a.rows, a.cols);
  if (!native) convert(a32, a);
  const int64_t step = kTile * std::max<int64_t>(1, kBlockElements / (kTile * b.cols));
  const int64_t blocks = (b.rows + step - 1) / step;
  torch::stable::parallel_for(
      0, blocks, grain_of(a.rows * step * b.cols / 4), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * step, count = std::min(step, b.rows - first);
          const Matrix columns = out.col_block(first, count), rows = b.row_block(first, count);
          if (native) {
            tiles(columns, a, rows);
          } else if (b.dtype == DType::kFloat16) {
            dots<Half>(columns, a32, rows);
          } else {
            dots<BFloat16>(columns, a32, rows);
          }
        }
      });
}

#else

bool dot_products_pay(DType, int64_t) { return false; }
void dot_products(const Matrix&, const Matrix&, const Matrix&) {}

#endif

}  // namespace simple_moe::cpu
