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

// One operand of a tile: kLines lines, which are rows of a or columns of b, and kDepth of k a slot.
// Vectors lie as memory does, along k or, where !kAlongK, across lines; so a slot's rows of vectors
// are the lines or the k's.
template <typename T, int kLines, int kDepth, bool kAlongK>
class Operand {
 public:
  static constexpr int kBytes = kLines * kDepth * sizeof(T);

  // line(i): where line i has its k = 0; null past the last line, and for all after that one.
  // Its k lie next to one another or, where !kAlongK, `k_stride` apart; the lines of a vector then
  // lie as far from one another as its first two.
  template <typename Line>
  __device__ Operand(int64_t k, int64_t k_stride, const Line& line) : k_(k), k_stride_(k_stride) {
    for (int i = 0; i < kOwnLines; ++i) lines_[i] = line(kAlongK ? row(i) : across());
    while (!kAlongK && count_ < kPer16 && line(across() + count_)) ++count_;
    if (count_ > 1) stride_ = line(across() + 1) - lines_[0];
    neighbours_ = kAlongK || (count_ == kPer16 && stride_ == 1 && k_stride * sizeof(T) % 16 == 0);
  }

  // A vector goes with cp.async if it can, else element by element; zeros stand past the last k and
  // where there is no line.
  __device__ void copy(unsigned char* slot, int64_t first_k) const {
    const int depth = static_cast<int>(min(k_ - first_k, int64_t{kDepth}));
    for (int pass = 0; pass < kPasses; ++pass) {
      const int k = kAlongK ? across() : row(pass);
      const T* const line = lines_[kAlongK ? pass : 0];
      const T* const from = line + (first_k + k) * (kAlongK ? 1 : k_stride_);
      const int count = kAlongK ? (line ? depth - k : 0) : k < depth ? count_ : 0;
      const bool aligned = neighbours_ & (reinterpret_cast<uintptr_t>(line) % 16 == 0);
      unsigned char* const to = slot + place(row(pass), across() / kPer16);
      // No branch for each condition.
      if ((count <= 0) | (aligned & (count >= kPer16))) {
        ptx::cp_async_16(ptx::smem_address(to), count > 0 ? from : nullptr, count > 0);
      } else {
        alignas(16) T values[kPer16];
        for (int i = 0; i < kPer16; ++i) values[i] = i < count ? from[i * stride_] : T{0};
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
      }
    }
  }

  // 16 lines from `line` on and 16 of k: a fragment of a, or two of b, each in registers side by
  // side, as mma.sync wants them.
  __device__ static void load(uint32_t (&fragment)[4], const unsigned char* slot, int line, int k,
                              bool of_a) {
    const int lane = threadIdx.x % 32, row = lane % 8, odd = lane / 8 % 2 * 8, high = lane / 16 * 8;
    line += (of_a ? odd : high) + (kAlongK ? row : 0);  // of matrix lane / 8
    k += (of_a ? high : odd) + (kAlongK ? 0 : row);
    const uint32_t from = ptx::smem_address(slot);
    kAlongK ? ptx::ldmatrix_x4(fragment, from + place(line, k / kPer16))
            : ptx::ldmatrix_x4_trans(fragment, from + place(k, line / kPer16));
  }

  __device__ static const T* at(const unsigned char* slot, int line, int k) {
    const int across = kAlongK ? k : line;
    const unsigned char* const vector = slot + place(kAlongK ? line : k, across / kPer16);
    return reinterpret_cast<const T*>(vector) + across % kPer16;
  }

 private:
  static constexpr int kPer16 = 16 / sizeof(T);  // elements of a vector
  static constexpr int kRows = kAlongK ? kLines : kDepth;
  static constexpr int kVectors = kLines * kDepth / kRows / kPer16;  // of a row
  static constexpr int kPerPass = kMmaThreads / kVectors, kPasses = kRows / kPerPass;
  static constexpr int kOwnLines = kAlongK ? kPasses : 1;
  static_assert(kRows % kPerPass == 0, "each thread takes a vector in each pass");

  // A thread takes the same vector of every kPerPass-th row.
  __device__ static int row(int pass) { return threadIdx.x / kVectors + pass * kPerPass; }
  __device__ static int across() { return threadIdx.x % kVectors * kPer16; }

  // One vector of 8 neighbouring rows: in 8 places modulo 128 bytes, in all banks.
  __device__ static int place(int row, int vector) {
    constexpr int kRowsOf128Bytes = kVectors < 8 ? 8 / kVectors : 1;
    return (row * kVectors + (vector ^ row / kRowsOf128Bytes % (8 / kRowsOf128Bytes))) * 16;
  }

  const T* lines_[kOwnLines];  // one a pass, or the first of its vectors
  int64_t k_, k_stride_;
  int64_t stride_ = 1;  // between a vector's elements
  int count_ = 0;       // lines that its vectors have
  bool neighbours_;     // whether all are there, side by side, and aligned for every k if for one
};

// How a tile is shared out: kRows x kCols of output, warps in a grid of kWarpRows x kWarpCols.
template <typename T_, int kRows_, int kCols_, int kLineBytes, int kStages_, int kWarpRows>
struct TileShape {
  using T = T_;
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kDepth = kLineBytes / sizeof(T);
  static constexpr int kWarpCols = kMmaThreads / 32 / kWarpRows;
  static constexpr int kRowsOfWarp = kRows / kWarpRows, kColsOfWarp = kCols / kWarpCols;
  static constexpr int kPitch = kCols + 8;  // floats between rows of the result
  static constexpr int kSlotBytes = (kRows + kCols) * kLineBytes;
  static constexpr int kRingBytes = kStages * kSlotBytes, kResultBytes = kRows * kPitch * 4;
  static constexpr int kBytes = kRingBytes > kResultBytes ? kRingBytes : kResultBytes;
  static_assert(kRowsOfWarp % 16 == 0 && kColsOfWarp % 16 == 0, "fragments are 16 x 16");
};

template <typename Shape, bool kAAlongK, bool kBAlongK>
class MmaTile {
  using T = typename Shape::T;

 public:
  using A = Operand<T, Shape::kRows, Shape::kDepth, kAAlongK>;
  using B = Operand<T, Shape::kCols, Shape::kDepth, kBAlongK>;

  // The result, in `smem` of Shape::kBytes, until the next: row * Shape::kPitch + column. Nobody
  // need wait for those who read the last one.
  __device__ const float* multiply(const A& a, const B& b, int64_t k, unsigned char* smem) {
    const int steps = static_cast<int>((k + Shape::kDepth - 1) / Shape::kDepth);
    const auto copy = [&](int step) {
      if (step < steps) {
        unsigned char* const slot = smem + step % Shape::kStages * Shape::kSlotBytes;
        a.copy(slot, static_cast<int64_t>(step) * Shape::kDepth);
        b.copy(slot + A::kBytes, static_cast<int64_t>(step) * Shape::kDepth);
      }
      ptx::cp_async_commit();  // Empty groups keep the count.
    };
    __syncthreads();  // The last result is read.
    for (int step = 0; step < Shape::kStages - 1; ++step) copy(step);
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<Shape::kStages - 2>();
      __syncthreads();  // This slot has landed for all; all are done with the one before it.
      copy(step + Shape::kStages - 1);
      const unsigned char* const slot = smem + step % Shape::kStages * Shape::kSlotBytes;
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll 4
        for (int k = 0; k < Shape::kDepth; ++k) multiply_one(slot, slot + A::kBytes, k);
      } else {
        for (int k = 0; k < Shape::kDepth; k += 16) multiply_16(slot, slot + A::kBytes, k);
      }
    }
    __syncthreads();  // The ring is free.
    float* const result = reinterpret_cast<float*>(smem);
    const int lane = threadIdx.x % 32, row = row_ + lane / 4, col = col_ + lane % 4 * 2;
    for (int n = 0; n < 2 * kI * kJ; ++n) {  // 8 rows and columns each
      const int i = n / kJ, j = n % kJ;
      const float* const from = acc_[i / 2][j] + i % 2 * 2;
      float* const to = result + (row + i * 8) * Shape::kPitch + col + j * 8;
      *reinterpret_cast<float2*>(to) = {from[0], from[1]};
    }
    __syncthreads();  // The result is there.
    return result;
  }

 private:
  static constexpr int kI = Shape::kRowsOfWarp / 16, kJ = Shape::kColsOfWarp / 8;

  // 16 of k, on tensor cores.
  __device__ void multiply_16(const unsigned char* a_slot, const unsigned char* b_slot, int k) {
    uint32_t a[kI][4], b[kJ / 2][4];
    for (int i = 0; i < kI; ++i) A::load(a[i], a_slot, row_ + i * 16, k, true);
    for (int j = 0; j < kJ / 2; ++j) B::load(b[j], b_slot, col_ + j * 16, k, false);
    for (int i = 0; i < kI; ++i) {
      for (int j = 0; j < kJ; ++j) {
        ptx::mma_m16n8k16<T>(acc_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // One k, on the plain cores: a thread has the outputs that tensor cores would give it.
  __device__ void multiply_one(const unsigned char* a_slot, const unsigned char* b_slot, int k) {
    const int row = row_ + threadIdx.x % 32 / 4, col = col_ + threadIdx.x % 4 * 2;
    float a[2 * kI], b[2 * kJ];
    for (int i = 0; i < 2 * kI; ++i) a[i] = *A::at(a_slot, row + i * 8, k);
    for (int j = 0; j < 2 * kJ; ++j) b[j] = *B::at(b_slot, col + j / 2 * 8 + j % 2, k);
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
