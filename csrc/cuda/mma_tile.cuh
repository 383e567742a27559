// One output tile's product: acc[kRows, kCols] += a[kRows, k] * b[k, kCols], on tensor cores, or in
// IEEE float32 on the plain ones.
//
// Schedule, for the block's 4 warps: all threads copy the operands' next kDepth of k into a ring of
// kStages slots with cp.async, kStages - 1 slots ahead of the one being multiplied; a slot is
// refilled right after the barrier that says that everybody is done with it. Every accumulator adds
// its products in ascending k (tensor cores: 16 at a time) in every tile shape: the bits don't
// depend on the shape chosen. In flight: (kStages - 1) * (kRows + kCols) * kLineBytes a block.
//
// Shared memory holds 16-byte vectors, permuted (XOR) so that the 8 rows that one ldmatrix reads,
// or a warp's lanes of a float, lie in different banks.
#pragma once

#include "floats.cuh"
#include "ptx.cuh"

namespace simple_moe {

constexpr int kMmaThreads = 128;

template <typename T>
constexpr int kPer16 = 16 / sizeof(T);  // elements of a vector

// A vector from `from` on, its elements `stride` apart, to shared memory: the first `count`, and
// zeros. `aligned`: they are neighbours, and at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void copy_vector(unsigned char* to, const T* from, int64_t stride,
                                            int64_t count, bool aligned) {
  if (count <= 0 || (aligned && count >= kPer16<T>)) {
    ptx::cp_async_16(ptx::smem_address(to), count > 0 ? from : nullptr, count > 0);
  } else {
    alignas(16) T values[kPer16<T>];
#pragma unroll
    for (int i = 0; i < kPer16<T>; ++i) values[i] = i < count ? from[i * stride] : T{0};
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
  }
}

// An operand whose k is contiguous: kLines rows of a, or columns of b.
template <typename T, int kLines, int kDepth>
struct KMajor {
  static constexpr int kBytes = kLines * kDepth * sizeof(T);
  static constexpr int kVectors = kDepth / kPer16<T>;  // of a line
  static constexpr int kPerPass = kMmaThreads / kVectors;
  static constexpr int kPasses = (kLines + kPerPass - 1) / kPerPass;

  // This thread's lines; null where there is none.
  const T* lines[kPasses];
  int64_t k;
  bool aligned;

  __device__ static int vector() { return threadIdx.x % kVectors; }
  __device__ static int line(int pass) { return threadIdx.x / kVectors + pass * kPerPass; }

  __device__ static int place(int line, int vector) {
    constexpr int kLinesOf128Bytes = 8 / kVectors;
    return (line * kVectors + (vector ^ (line / kLinesOf128Bytes % kVectors))) * 16;
  }

  __device__ void copy(unsigned char* slot, int64_t first_k) const {
    const int64_t at = first_k + vector() * kPer16<T>;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (kLines % kPerPass != 0 && line(pass) >= kLines) continue;
      copy_vector(slot + place(line(pass), vector()), lines[pass] + at, 1, lines[pass] ? k - at : 0,
                  aligned);
    }
  }

  // A fragment of lines line ... line + 15 and k step `step` (16 each): of a, or two of b.
  __device__ static void load(uint32_t (&fragment)[4], const unsigned char* slot, int line,
                              int step, bool of_a) {
    const int lane = threadIdx.x % 32;
    const int down = of_a ? lane % 16 : lane / 16 * 8 + lane % 8;
    const int across = of_a ? lane / 16 : lane / 8 % 2;
    ptx::ldmatrix_x4(fragment, ptx::smem_address(slot + place(line + down, step * 2 + across)));
  }
  __device__ static T at(const unsigned char* slot, int line, int k) {
    return reinterpret_cast<const T*>(slot + place(line, k / kPer16<T>))[k % kPer16<T>];
  }
};

// An operand whose lines are contiguous: k is the slow axis.
template <typename T, int kLines, int kDepth>
struct LineMajor {
  static constexpr int kBytes = kLines * kDepth * sizeof(T);
  static constexpr int kVectors = kLines / kPer16<T>;  // of one k
  static constexpr int kPerPass = kMmaThreads / kVectors;
  static constexpr int kPasses = kDepth / kPerPass;

  const T* data;  // of this thread's first line, at k = 0
  int64_t k_stride;
  int64_t line_stride;  // between this thread's lines; `aligned` means 1
  int64_t count;        // of its vector's lines, how many there are, or more
  int64_t k;
  bool aligned;

  __device__ static int first_line() { return threadIdx.x % kVectors * kPer16<T>; }

  __device__ static int place(int depth, int vector) {
    return (depth * kVectors + (vector ^ (depth % 8))) * 16;
  }

  __device__ void copy(unsigned char* slot, int64_t first_k) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int depth = threadIdx.x / kVectors + pass * kPerPass;
      const int64_t at = first_k + depth;
      copy_vector(slot + place(depth, threadIdx.x % kVectors), data + at * k_stride, line_stride,
                  at < k ? count : 0, aligned);
    }
  }

  __device__ static void load(uint32_t (&fragment)[4], const unsigned char* slot, int line,
                              int step, bool of_a) {
    const int lane = threadIdx.x % 32;
    const int down = of_a ? lane / 16 * 8 + lane % 8 : lane % 16;
    const int across = of_a ? lane / 8 % 2 : lane / 16;
    ptx::ldmatrix_x4_trans(
        fragment, ptx::smem_address(slot + place(step * 16 + down, line / kPer16<T> + across)));
  }
  __device__ static T at(const unsigned char* slot, int line, int k) {
    return reinterpret_cast<const T*>(slot + place(k, line / kPer16<T>))[line % kPer16<T>];
  }
};

// How a tile is shared out: kRows x kCols of output, warps in a grid of kWarpRows x kWarpCols.
template <typename T_, int kRows_, int kCols_, int kLineBytes, int kStages_, int kWarpRows>
struct TileShape {
  using T = T_;
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kDepth = kLineBytes / sizeof(T);
  static constexpr int kWarpCols = kMmaThreads / 32 / kWarpRows;
  static constexpr int kRowsOfWarp = kRows / kWarpRows, kColsOfWarp = kCols / kWarpCols;
  static constexpr int kPitch = kCols + 8;  // floats between rows of the staged result
  // The result is staged so many rows at a time.
  static constexpr int kStagedRows = kRows < 64 ? kRows : 64;
  static constexpr int kRingBytes = kStages * (kRows + kCols) * kLineBytes;
  static constexpr int kStagedBytes = kStagedRows * kPitch * 4;
  static constexpr int kBytes = kRingBytes > kStagedBytes ? kRingBytes : kStagedBytes;
  static_assert(kRowsOfWarp % 16 == 0 && kColsOfWarp % 16 == 0, "fragments are 16 x 16");
};

template <typename Shape>
class MmaTile {
  using T = typename Shape::T;

 public:
  // `smem`: Shape::kBytes, in nobody's use.
  template <typename A, typename B>
  __device__ void multiply(const A& a, const B& b, int64_t k, unsigned char* smem) {
    constexpr int kSlotBytes = A::kBytes + B::kBytes;
    static_assert(Shape::kStages * kSlotBytes == Shape::kRingBytes);
    const int steps = static_cast<int>((k + Shape::kDepth - 1) / Shape::kDepth);
    const auto copy = [&](int step) {
      if (step < steps) {
        unsigned char* const slot = smem + step % Shape::kStages * kSlotBytes;
        a.copy(slot, static_cast<int64_t>(step) * Shape::kDepth);
        b.copy(slot + A::kBytes, static_cast<int64_t>(step) * Shape::kDepth);
      }
      ptx::cp_async_commit();  // Empty groups keep the count.
    };
    for (int step = 0; step < Shape::kStages - 1; ++step) copy(step);
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<Shape::kStages - 2>();
      __syncthreads();  // This slot has landed for all; all are done with the one before it.
      copy(step + Shape::kStages - 1);
      const unsigned char* const slot = smem + step % Shape::kStages * kSlotBytes;
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll 4
        for (int k = 0; k < Shape::kDepth; ++k) multiply_one<A, B>(slot, slot + A::kBytes, k);
      } else {
#pragma unroll
        for (int k16 = 0; k16 < Shape::kDepth / 16; ++k16) {
          multiply_16<A, B>(slot, slot + A::kBytes, k16);
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // The ring is free.
  }

  // Hands the result over in shared memory, Shape::kStagedRows rows at a time:
  // finish(first row, staged[row * kPitch + column]) is called by all threads, and must not rely
  // on a barrier of its own.
  template <typename Finish>
  __device__ void stage(unsigned char* smem, const Finish& finish) const {
    float* const staged = reinterpret_cast<float*>(smem);
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < Shape::kRows; first += Shape::kStagedRows) {
      const int row = row_ - first;
      if (0 <= row && row < Shape::kStagedRows) {
        float* const to = staged + (row + lane / 4) * Shape::kPitch + col_ + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2 * kI * kJ; ++n) {  // 8 rows and columns each
          const int i = n / kJ, j = n % kJ;
          const float* const from = acc_[i / 2][j] + i % 2 * 2;
          *reinterpret_cast<float2*>(to + i * 8 * Shape::kPitch + j * 8) = {from[0], from[1]};
        }
      }
      __syncthreads();
      finish(first, staged);
      __syncthreads();
    }
  }

 private:
  static constexpr int kI = Shape::kRowsOfWarp / 16, kJ = Shape::kColsOfWarp / 8;

  // 16 of k, on tensor cores.
  template <typename A, typename B>
  __device__ void multiply_16(const unsigned char* a_slot, const unsigned char* b_slot, int k16) {
    uint32_t a[kI][4], b[kJ / 2][4];
#pragma unroll
    for (int i = 0; i < kI; ++i) A::load(a[i], a_slot, row_ + i * 16, k16, true);
#pragma unroll
    for (int j = 0; j < kJ / 2; ++j) B::load(b[j], b_slot, col_ + j * 16, k16, false);
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        ptx::mma_m16n8k16<T>(acc_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // One k, on the plain cores: a thread has the outputs that tensor cores would give it.
  template <typename A, typename B>
  __device__ void multiply_one(const unsigned char* a_slot, const unsigned char* b_slot, int k) {
    const int row = row_ + threadIdx.x % 32 / 4, col = col_ + threadIdx.x % 4 * 2;
    float a[2 * kI], b[2 * kJ];
#pragma unroll
    for (int i = 0; i < 2 * kI; ++i) a[i] = A::at(a_slot, row + i * 8, k);
#pragma unroll
    for (int j = 0; j < 2 * kJ; ++j) b[j] = B::at(b_slot, col + j / 2 * 8 + j % 2, k);
#pragma unroll
    for (int i = 0; i < 4 * kI * kJ; ++i) {
      float& sum = acc_[i / 4 / kJ][i / 4 % kJ][i % 4];
      sum = fmaf(a[i / 4 / kJ * 2 + i % 4 / 2], b[i / 4 % kJ * 2 + i % 2], sum);
    }
  }

  const int warp_ = static_cast<int>(threadIdx.x / 32);
  const int row_ = warp_ / Shape::kWarpCols * Shape::kRowsOfWarp;  // this warp's first
  const int col_ = warp_ % Shape::kWarpCols * Shape::kColsOfWarp;
  float acc_[kI][kJ][4] = {};
};

}  // namespace simple_moe
