// Stands in for CUDA and for csrc/cuda/{ptx.cuh,launch.h} when g++ compiles the kernels for the
// CPU: included by force before anything else. What each wrapper does is the PTX ISA's word;
// fibers.h has the threads that they run on.
#pragma once

#define SIMPLE_MOE_PTX_CUH
#define SIMPLE_MOE_LAUNCH_H

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <sanitizer/asan_interface.h>

#include "../../csrc/cuda/device.h"
#include "fibers.h"

// ---- CUDA's keywords, types and builtins ----

// `__shared__` is left out: all shared memory is dynamic here.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // libstdc++ has it as an attribute
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

using cudaStream_t = struct CudaStream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? b : a;
}

template <typename T>
T __ldcs(const T* global) {
  return *global;  // The sanitizers see where it is, and how aligned.
}

inline int __popc(uint32_t x) { return std::popcount(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

template <typename T>
T atomicAdd(T* pointer, std::type_identity_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  *pointer = old + value;
  return old;
}

template <typename T>
T atomicMax(T* pointer, std::type_identity_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  *pointer = std::max(old, value);
  return old;
}

inline void __syncthreads(emulator::Where where = emulator::Where::current()) {
  emulator::maybe_switch();
  emulator::barrier("__syncthreads", where);
}

namespace emulator {

inline int lane_id() { return current->number % 32; }

// Meets the lanes of `mask`; the last to come calls compute(every lane's operands).
template <typename Operands, typename Compute>
void collective(const char* what, uint32_t mask, Operands& mine, Where where, Compute compute) {
  maybe_switch();
  void* lanes[32];
  if (!meet_lanes(what, mask, &mine, lanes, where)) return;
  Operands* operands[32];
  for (int lane = 0; lane < 32; ++lane) operands[lane] = static_cast<Operands*>(lanes[lane]);
  compute(operands);
  release_lanes(mask);
}

template <typename T>
struct Shuffle {
  T value;
  int source;
  T result;
};

template <typename T>
T shuffle(const char* what, uint32_t mask, T value, int source, Where where) {
  Shuffle<T> mine{value, source, {}};
  collective(what, mask, mine, where, [](Shuffle<T>*(&lanes)[32]) {
    for (Shuffle<T>* lane : lanes) {
      if (!lane) continue;
      const Shuffle<T>* const from = lanes[lane->source];
      std::memset(&lane->result, 0xFF, sizeof(T));  // undefined from a lane outside the mask
      if (from) lane->result = from->value;
    }
  });
  return mine.result;
}

// The lane `to` if it's in the same segment of `width` lanes, or else this one.
inline int in_segment(int to, int width) {
  return to >= 0 && to / width == lane_id() / width ? to : lane_id();
}

template <typename T>
struct Vote {
  T value;
  uint32_t result;
};

// The lanes of `mask` with the same value as this one.
template <typename T>
uint32_t vote(const char* what, uint32_t mask, T value, Where where) {
  Vote<T> mine{value, 0};
  collective(what, mask, mine, where, [](Vote<T>*(&lanes)[32]) {
    for (Vote<T>* lane : lanes) {
      for (int i = 0; lane && i < 32; ++i) {
        if (lanes[i] && lanes[i]->value == lane->value) lane->result |= 1u << i;
      }
    }
  });
  return mine.result;
}

}  // namespace emulator

#define EMULATOR_WHERE emulator::Where where = emulator::Where::current()

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMULATOR_WHERE) {
  const int from = emulator::lane_id() / width * width + (source & (width - 1));
  return emulator::shuffle("__shfl_sync", mask, value, from, where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMULATOR_WHERE) {
  const int from = emulator::in_segment(emulator::lane_id() - static_cast<int>(delta), width);
  return emulator::shuffle("__shfl_up_sync", mask, value, from, where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, EMULATOR_WHERE) {
  const int from = emulator::in_segment(emulator::lane_id() ^ bits, width);
  return emulator::shuffle("__shfl_xor_sync", mask, value, from, where);
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, EMULATOR_WHERE) {
  return emulator::vote("__match_any_sync", mask, value, where);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMULATOR_WHERE) {
  const uint32_t alike = emulator::vote("__ballot_sync", mask, predicate != 0, where);
  return predicate ? alike : mask & ~alike;
}
inline int __any_sync(uint32_t mask, int predicate, EMULATOR_WHERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EMULATOR_WHERE) {
  return __ballot_sync(mask, predicate, where) == mask;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMULATOR_WHERE) {
  emulator::vote("__syncwarp", mask, 0, where);
}

// ---- ptx.cuh ----

namespace simple_moe {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace ptx {

inline unsigned char* dynamic_smem() { return emulator::shared_memory; }

inline uint32_t smem_address(const void* pointer) {
  return static_cast<const unsigned char*>(pointer) - emulator::shared_memory;
}

inline uint32_t keep(uint32_t value) { return value; }

template <typename Byte>
Byte* advance(Byte* from, uint32_t count, uint32_t bytes) {
  return from + static_cast<uint64_t>(count) * bytes;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) { return std::bit_cast<_Float16>(x.bits); }

// To nearest, ties to even; every NaN becomes 0x7fff, as cvt has it.
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <typename T>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

inline unsigned char* smem_pointer(uint32_t address) { return emulator::shared_memory + address; }

template <bool kReadsOn = false>
void cp_async_16(uint32_t address, const void* global, bool valid, EMULATOR_WHERE) {
  using emulator::fail;
  emulator::maybe_switch(true);
  unsigned char* const smem = smem_pointer(address);
  if (reinterpret_cast<uintptr_t>(smem) % 16) fail("misaligned shared memory", "cp_async", where);
  if (valid) {
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("misaligned source", "cp_async", where);
    if (__asan_region_is_poisoned(const_cast<void*>(global), 16)) {
      fail("source out of bounds", "cp_async", where);
    }
  }
  std::memset(smem, 0xFF, 16);  // nobody may look before the copy is waited for
  emulator::current->open_group.push_back({smem, valid ? global : nullptr});
}

inline void store_16_if(bool there, void* to, const uint4& x, bool) {
  if (there) *static_cast<uint4*>(to) = x;  // The sanitizers see where it is, and how aligned.
}

inline void cp_async_commit() {
  emulator::maybe_switch(true);
  emulator::Thread& thread = *emulator::current;
  thread.committed_groups.push_back(std::move(thread.open_group));
  thread.open_group.clear();
}

// The copies land here, as late as they may.
template <int kPending>
void cp_async_wait() {
  emulator::maybe_switch();
  auto& groups = emulator::current->committed_groups;
  for (; groups.size() > kPending; groups.erase(groups.begin())) {
    for (const emulator::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.from) std::memcpy(copy.to, copy.from, 16);
    }
  }
}

struct LdmatrixOperands {
  uint32_t* r;
  const unsigned char* row;
};

inline void ldmatrix(const char* what, uint32_t* r, uint32_t row, bool transpose,
                     emulator::Where where) {
  if (row % 16) emulator::fail("a misaligned row", what, where);
  LdmatrixOperands mine{r, smem_pointer(row)};
  emulator::collective(what, 0xffffffffu, mine, where, [=](LdmatrixOperands*(&lanes)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t x[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(x[i], lanes[matrix * 8 + i]->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transpose ? x[j][i] : x[i][j];
        const uint32_t high = transpose ? x[j + 1][i] : x[i][j + 1];
        lanes[lane]->r[matrix] = high << 16 | low;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem_row, EMULATOR_WHERE) {
  ldmatrix("ldmatrix_x4", r, smem_row, false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem_row, EMULATOR_WHERE) {
  ldmatrix("ldmatrix_x4_trans", r, smem_row, true, where);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_WHERE) {
  emulator::MmaOperands mine{d, a, {b0, b1}};
  emulator::collective("mma_m16n8k16", 0xffffffffu, mine, where,
                       [](emulator::MmaOperands*(&lanes)[32]) {
                         emulator::multiply(lanes, [](uint16_t bits) { return to_float(T{bits}); });
                       });
}

// wgmma's products happen as late as they may: when they are waited for. Then they read shared
// memory, and until then the sums are anybody's guess.
inline void wgmma_fence() { emulator::maybe_switch(); }
inline void wgmma_commit() {
  emulator::maybe_switch();
  emulator::Thread& thread = *emulator::current;
  thread.committed_products.push_back(std::move(thread.open_products));
  thread.open_products.clear();
}
template <int kPending>
void wgmma_wait() {
  emulator::maybe_switch();
  auto& groups = emulator::current->committed_products;
  for (; groups.size() > kPending; groups.erase(groups.begin())) {
    for (const std::function<void()>& product : groups.front()) product();
  }
}
template <int kJ>
void wgmma_done(float (&)[kJ][4]) {}
inline void fence_async_proxy() {}

// The address of the first line, and of the 16 k in it.
inline uint64_t wgmma_operand(uint32_t smem) {
  if (smem % 1024) emulator::fail("a misaligned operand", "wgmma", emulator::Where::current());
  return smem;
}
inline uint64_t advance(uint64_t operand, int bytes) { return operand + bytes; }

template <typename T, int kJ>
void wgmma(float (&d)[kJ][4], uint64_t a, uint64_t b, EMULATOR_WHERE) {
  emulator::vote("wgmma", 0xffffffffu, 0, where);  // of whole warps
  const auto multiply = [&d, a, b] {
    const auto value = [](uint64_t operand, int line, int k) {
      uint32_t at = static_cast<uint32_t>(operand) + line * 128 + k * 2;
      at ^= (at / 128 % 8) * 16;
      T element;
      std::memcpy(&element, smem_pointer(at), 2);
      return to_float(element);
    };
    const int warp = emulator::current->number / 32 % 4, lane = emulator::lane_id();
    for (int j = 0; j < kJ; ++j) {
      for (int q = 0; q < 4; ++q) {
        const int row = warp * 16 + lane / 4 + q / 2 * 8, column = j * 8 + lane % 4 * 2 + q % 2;
        for (int k = 0; k < 16; ++k) d[j][q] += value(a, row, k) * value(b, column, k);
      }
    }
  };
  emulator::current->open_products.push_back(multiply);
}

// A kernel runs when those before it are done.
inline void wait_for_earlier_kernels() {}
inline void let_next_kernel_start() {}
inline void follow_earlier_kernels() {}
inline void add_release(int32_t* count, int32_t value) { *count += value; }
inline void wait_for_count(const int32_t* count, int32_t least, EMULATOR_WHERE) {
  if (*count < least) emulator::fail("a wait that never ends", "wait_for_count", where);
}

}  // namespace ptx

// ---- launch.h ----

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(what);
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

enum class Start { kAfterOthers, kEarly };

// Blocks run one after another, in a random order.
template <Start kStart = Start::kAfterOthers, typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, int block, size_t smem_bytes, cudaStream_t,
            Args... args) {
  if (grid == 0) return;
  if (grid < 0 || grid > INT32_MAX || block < 1 || block > 1024 ||
      smem_bytes > device_info().smem_per_block) {
    throw std::runtime_error("launch: " + std::to_string(grid) + " blocks of " +
                             std::to_string(block) + " threads and " + std::to_string(smem_bytes) +
                             " bytes of shared memory");
  }
  gridDim = {static_cast<unsigned>(grid)};
  blockDim = {static_cast<unsigned>(block)};
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), emulator::random_bits);
  for (unsigned number : order) {
    blockIdx = {number, 0, 0};
    emulator::run_block(block, smem_bytes, [&] { kernel(static_cast<Params>(args)...); });
  }
}

}  // namespace simple_moe
