// How the operands come into the ring of grouped_gemm's kernel.
#pragma once

#include "gemm_shape.cuh"
#include "ptx.cuh"

namespace simple_moe::cuda {

// Copies the operands of a block's items into the ring, step by step: a thread takes one vector of
// every kPass-th line.
template <typename Shape>
class Copier {
 public:
  static constexpr int kPassesA = Shape::kPassesA * Shape::kPerLine;
  static constexpr int kPassesB = Shape::kPassesB * Shape::kPerLine;
  static constexpr int kPasses = kPassesA + kPassesB;

  __device__ Copier(const GroupedGemm& p, Queue<Shape>& queue)
      : p_(p), queue_(queue), a_stride_(static_cast<uint32_t>(p.a_stride) * 2) {
    begin_item<true>();
  }

  // Copies kFirst ... kLast - 1 of the next step (or of the item's step `ahead` from there), those
  // of a from kFirstA on, of b from kFirstB. Past the last item nothing is copied.
  template <int kFirst, int kLast>
  __device__ void copy(uint32_t slot, int ahead = 0) const {
    const int more = ahead * Shape::kLineBytes;
    const int left = static_cast<int>(p_.k) - k_ - ahead * Shape::kDepth;
    const uint32_t to = slot + Shape::place(line(), vector());
#pragma unroll
    for (int i = kFirst; i < kLast; ++i) {
      const bool of_a = kFirstA <= i && i < kFirstA + kPassesA;
      const int pass = (i - (of_a ? kFirstA : kFirstB)) / Shape::kPerLine;
      const int vectors = i % Shape::kPerLine * Shape::kAcross;  // further on in the line
      const auto copy_vector = [&](uint32_t operand, const char* from) {
        ptx::cp_async_16<Shape::kReadsOn>(operand + pass * Shape::kPassBytes + vectors * 16,
                                          from + more + vectors * 16, left > vectors * kVector);
      };
      if (!of_a && pass < b_passes_)
        copy_vector(to + Shape::kABytes, ptx::advance(b_, pass, b_pass_stride_));
      if (of_a && pass < a_passes_) copy_vector(to, ptx::advance(a_, a_rows_[pass], a_stride_));
    }
  }

  __device__ void copy_a(uint32_t slot) const { copy<kFirstA, kFirstA + kPassesA>(slot); }
  __device__ void copy_b(uint32_t slot, int ahead = 0) const {
    copy<kFirstB, kFirstB + kPassesB>(slot, ahead);
  }

  // All of it is copied: goes on to the next.
  __device__ void end_step() {
    ptx::cp_async_commit();  // Empty groups keep the count.
    a_ += Shape::kLineBytes;
    b_ += Shape::kLineBytes;
    k_ += Shape::kDepth;
    const int done = k_ - vector() * kVector;
    if (done >= (Shape::kClaimsLate ? queue_.claim_from : static_cast<int>(p_.k))) {
      const int left = static_cast<int>(p_.k) - done;
      begin_item(Shape::kClaimsLate && left > 0 ? (left + Shape::kDepth - 1) / Shape::kDepth : 0);
    }
  }

  // Until an item's rows of `a` are written, where the first product may still be at it.
  __device__ void wait_for_rows(const Item& item) const {
    if (p_.is_second && p_.row_tiles.progress) {
      ptx::wait_for_count(p_.row_tiles.progress + item.row_begin,
                          item.row_count > 0 ? static_cast<int>(p_.k) << p_.split_log2 : 0);
    }
  }

 private:
  __device__ static int vector() { return threadIdx.x % Shape::kAcross; }
  __device__ static int line() { return threadIdx.x / Shape::kAcross; }

  // What comes first in a step. Where items are claimed late it is b: what that brings and a's row
  // numbers are waited for together, by whoever asks for a's rows.
  static constexpr int kFirstA = Shape::kClaimsLate ? kPassesB : 0;
  static constexpr int kFirstB = Shape::kClaimsLate ? 0 : kPassesA;

  // Past the last item comes one of no rows. With steps left it is prepared for, no more.
  template <bool kFirst = false>
  __device__ void begin_item(int steps_left = 0) {
    const Item item = steps_left == 0 ? queue_[begun_] : Item{};
    if (!kFirst && steps_left == 0) wait_for_rows(item);
    queue_.prepare(begun_, steps_left);
    if (steps_left > 0) return;
    ++begun_;
    k_ = vector() * kVector;
    const int at = item.part * static_cast<int>(p_.k) + k_;
    a_ = static_cast<const char*>(p_.a) + at * 2;
    // How many passes have one of so many lines for this thread.
    const auto passes = [](int lines) {
      return lines > line() ? (lines - line() - 1) / Shape::kPass + 1 : 0;
    };
    a_passes_ = passes(item.row_count);
#pragma unroll
    for (int pass = 0; pass < Shape::kPassesA; ++pass) {
      const int row = item.row_begin + line() + pass * Shape::kPass;
      a_rows_[pass] = row;
      if (p_.source_rows && pass < a_passes_) a_rows_[pass] = p_.source_rows[row];
    }
    b_ = static_cast<const char*>(p_.b) +
         (item.expert * p_.b_expert_stride +
          row_of_line<Shape>(p_, item, line()) * p_.b_row_stride + at) *
             2;
    const bool gated = is_gated(p_.activation.kind);
    const bool apart = gated && p_.gate_layout != GateLayout::kInterleaved;
    b_pass_stride_ =
        (apart ? Shape::kPass : 2 * Shape::kPass) * static_cast<uint32_t>(p_.b_row_stride);
    const int lines = static_cast<int>(gated ? 2 * p_.n : p_.n) - item.column_tile * Shape::kCols;
    // A tile's columns may be no whole passes: the last has fewer lines then.
    constexpr bool kWhole = Shape::kCols % Shape::kPass == 0;
    b_passes_ = item.row_count > 0 ? passes(kWhole ? lines : min(lines, Shape::kCols)) : 0;
  }

  const GroupedGemm& p_;
  Queue<Shape>& queue_;
  unsigned begun_ = 0;
  int k_;                              // of this thread's vector in the next step
  const char* a_;                      // there, in a's row 0
  const char* b_;                      // there, in the first pass's line
  uint32_t a_rows_[Shape::kPassesA];   // read from memory, not needed before the next step
  uint32_t a_stride_, b_pass_stride_;  // bytes
  int a_passes_, b_passes_;            // that have lines
};

// The slot being multiplied, and the one to be filled, for the step kAhead from there.
template <typename Shape>
struct Cursor {
  __device__ explicit Cursor(uint32_t ring)
      : begin(ring), slot(ring), free(ring + Shape::kAhead * Shape::kSlotBytes) {}
  __device__ void advance() {
    free = Shape::kBehind == 1 ? slot : after(free);
    slot = after(slot);
  }
  __device__ uint32_t after(uint32_t at) const {
    at += Shape::kSlotBytes;
    return at == begin + Shape::kStages * Shape::kSlotBytes ? begin : at;
  }

  uint32_t begin, slot, free;
};

// Until the next slot has landed for all, and the next to be filled is done with: where products
// end after the step that asks for them, that is the slot of the step before.
template <typename Shape>
__device__ __forceinline__ void meet() {
  ptx::cp_async_wait<Shape::kAhead - 1>();
  if constexpr (Shape::kBehind > 1) {
    ptx::wgmma_wait<Shape::kBehind - 1>();
    ptx::fence_async_proxy();
  }
  __syncthreads();
}

template <typename Shape>
__device__ __forceinline__ void next_step(Copier<Shape>& copier, Cursor<Shape>& cursor) {
  copier.end_step();
  meet<Shape>();
  cursor.advance();
}

}  // namespace simple_moe::cuda
