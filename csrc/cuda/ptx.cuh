// One small wrapper per instruction: all of the product's PTX but the activations' two, and nothing
// else.
// tests/emulator replaces this header (it defines the guard first) by host versions.
#ifndef SIMPLE_MOE_PTX_CUH
#define SIMPLE_MOE_PTX_CUH

#include <cstdint>
#include <type_traits>

namespace simple_moe {

// 16-bit floats as storage. Arithmetic is done in float32 only.
struct alignas(2) f16 {
  uint16_t bits;
};
struct alignas(2) bf16 {
  uint16_t bits;
};

namespace ptx {

// All shared memory is dynamic: its size is the launcher's.
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char smem[];
  return smem;
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, in a register from here on: the compiler can't compute it anew where it is used.
__device__ __forceinline__ uint32_t keep(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// `from` and count times so many bytes, in one multiply-add: the compiler makes more of the plain
// expression.
template <typename Byte>
__device__ __forceinline__ Byte* advance(Byte* from, uint32_t count, uint32_t bytes) {
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(count), "r"(bytes), "l"(from));
  return reinterpret_cast<Byte*>(address);
}

// ---- float <-> 16 bit ----

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// instruction(the name of T in PTX, ...)
#define SIMPLE_MOE_OF_TYPE(instruction, ...)        \
  if constexpr (std::is_same_v<T, bf16>)            \
    instruction("bf16" __VA_OPT__(, ) __VA_ARGS__); \
  else                                              \
    instruction("f16" __VA_OPT__(, ) __VA_ARGS__)

// Two of them in a word, the first in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t y;
#define SIMPLE_MOE_PACK(type) \
  asm("cvt.rn." type "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low))
  SIMPLE_MOE_OF_TYPE(SIMPLE_MOE_PACK);
  return y;
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return {static_cast<uint16_t>(pack<T>(x, 0.0f))};
  }
}

// ---- cp.async: global -> shared without registers ----

// 16 bytes, both addresses 16-byte aligned; zeros where not `valid` (then global is not read).
// kReadsOn: L2 may fetch 256 bytes at once, the rest of which is wanted soon.
template <bool kReadsOn = false>
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, bool valid) {
#define SIMPLE_MOE_COPY(how)                                                                \
  asm volatile("cp.async.cg.shared.global" how::"r"(smem), "l"(global), "r"(valid ? 16 : 0) \
               : "memory")
  if constexpr (kReadsOn)
    SIMPLE_MOE_COPY(".L2::256B [%0], [%1], 16, %2;");
  else
    SIMPLE_MOE_COPY(" [%0], [%1], 16, %2;");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// 16 bytes, aligned, if `there`: without a branch. `keep`: L2 rather gives up what isn't stored so.
__device__ __forceinline__ void store_16_if(bool there, void* to, const uint4& x, bool keep) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "{ .reg .pred plain, kept; setp.eq.u32 plain, %6, 1; setp.eq.u32 kept, %6, 2;\n"
      "@plain st.global.v4.u32 [%0], {%1, %2, %3, %4};\n"
      "@kept st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5; }" ::"l"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "l"(policy), "r"(there ? 1 + keep : 0)
      : "memory");
}

// Waits until at most kPending of this thread's committed groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores ----

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_row)
               : "memory");
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_row)
               : "memory");
}

// d[16, 8] += a[16, 16] * b[16, 8], float32 accumulators; fragments as PTX lays them out.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#define SIMPLE_MOE_MMA(type)                                                 \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  SIMPLE_MOE_OF_TYPE(SIMPLE_MOE_MMA);
}

// ---- wgmma (sm_90a): products of a warpgroup, which end some time after they were asked for ----

// Before the first of them: of what the threads have written to the sums.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the warpgroup's committed groups have not ended.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Nobody reads the sums before this, in the compiler's eyes too.
template <int kJ>
__device__ __forceinline__ void wgmma_done(float (&d)[kJ][4]) {
#pragma unroll
  for (int j = 0; j < kJ; ++j)
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

// What this thread's copies have brought to shared memory is there for wgmma too, after a barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// An operand in shared memory: lines of 64 k (128 bytes) behind one another, their vectors permuted
// by XOR with the line's number % 8 (128-byte swizzle), 1024 bytes from 8 lines to the next 8.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t smem) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kStride | uint64_t{1} << 16 | (smem & 0x3FFFF) >> 4;
}

// So many bytes further on, a multiple of 16.
__device__ __forceinline__ uint64_t advance(uint64_t operand, int bytes) {
  return operand + (bytes >> 4);
}

#define SIMPLE_MOE_SUMS_4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SIMPLE_MOE_SUMS_16(j) \
  SIMPLE_MOE_SUMS_4(j), SIMPLE_MOE_SUMS_4(j + 1), SIMPLE_MOE_SUMS_4(j + 2), SIMPLE_MOE_SUMS_4(j + 3)
#define SIMPLE_MOE_SUMS_32(j) SIMPLE_MOE_SUMS_16(j), SIMPLE_MOE_SUMS_16(j + 4)
#define SIMPLE_MOE_SUMS_64(j) SIMPLE_MOE_SUMS_32(j), SIMPLE_MOE_SUMS_32(j + 8)
#define SIMPLE_MOE_TEN(n) \
  "%" n "0, %" n "1, %" n "2, %" n "3, %" n "4, %" n "5, %" n "6, %" n "7, %" n "8, %" n "9, "
#define SIMPLE_MOE_THIRTY(l, m, n) SIMPLE_MOE_TEN(l) SIMPLE_MOE_TEN(m) SIMPLE_MOE_TEN(n)
#define SIMPLE_MOE_NAMES_60 SIMPLE_MOE_THIRTY("", "1", "2") SIMPLE_MOE_THIRTY("3", "4", "5")
#define SIMPLE_MOE_NAMES_64 SIMPLE_MOE_NAMES_60 "%60, %61, %62, %63"
#define SIMPLE_MOE_NAMES_90 SIMPLE_MOE_NAMES_60 SIMPLE_MOE_THIRTY("6", "7", "8")
#define SIMPLE_MOE_NAMES_96 SIMPLE_MOE_NAMES_90 "%90, %91, %92, %93, %94, %95"
#define SIMPLE_MOE_NAMES_120 SIMPLE_MOE_NAMES_90 SIMPLE_MOE_THIRTY("9", "10", "11")
#define SIMPLE_MOE_NAMES_128 SIMPLE_MOE_NAMES_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define SIMPLE_MOE_WGMMA(type, columns, sums, a_name, b_name, ...)                             \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 1, 1; wgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type "." type " {" sums "}, " a_name ", " b_name ", p, 1, 1, 0, 0;}" \
               : __VA_ARGS__                                                                   \
               : "l"(a), "l"(b)                                                                \
               : "memory")

// d[64, 8 kJ] += a[64, 16] * b[8 kJ, 16].T, float32 accumulators: a warp has 16 of the rows, and of
// each 8 columns what mma_m16n8k16 gives it.
template <typename T, int kJ>
__device__ __forceinline__ void wgmma(float (&d)[kJ][4], uint64_t a, uint64_t b) {
  static_assert(kJ == 16 || kJ == 24 || kJ == 32, "more are a line each");
  if constexpr (kJ == 16) {
    SIMPLE_MOE_OF_TYPE(SIMPLE_MOE_WGMMA, "128", SIMPLE_MOE_NAMES_64, "%64", "%65",
                       SIMPLE_MOE_SUMS_64(0));
  } else if constexpr (kJ == 24) {
    SIMPLE_MOE_OF_TYPE(SIMPLE_MOE_WGMMA, "192", SIMPLE_MOE_NAMES_96, "%96", "%97",
                       SIMPLE_MOE_SUMS_64(0), SIMPLE_MOE_SUMS_32(16));
  } else {
    SIMPLE_MOE_OF_TYPE(SIMPLE_MOE_WGMMA, "256", SIMPLE_MOE_NAMES_128, "%128", "%129",
                       SIMPLE_MOE_SUMS_64(0), SIMPLE_MOE_SUMS_64(16));
  }
}

// ---- programmatic dependent launch (SM90 on; before, kernels never overlap) ----

// Until every kernel before this one in the stream is done and its writes are seen. A kernel that
// launch<Start::kEarly> starts calls it in every thread.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start as soon as every block has said so and there is room for it.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void follow_earlier_kernels() {
  wait_for_earlier_kernels();
  let_next_kernel_start();
}

// ---- between blocks that run at the same time ----

// Adds to a count that others wait for.
__device__ __forceinline__ void add_release(int32_t* count, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(count), "r"(value) : "memory");
}
// Until it is at least that. What was written before the additions is seen then. Not a loop of the
// compiler's, which within the caller's loops would cost them their uniform registers; nor a call,
// for which it keeps registers free.
__device__ __forceinline__ void wait_for_count(const int32_t* count, int32_t least) {
  asm volatile(
      "{ .reg .pred p; .reg .s32 now; setp.le.s32 p, %1, 0; @p bra DONE;\n"
      "WAIT: ld.acquire.gpu.global.s32 now, [%0]; setp.lt.s32 p, now, %1; @p bra WAIT; DONE: }" ::
          "l"(count),
      "r"(least)
      : "memory");
}

}  // namespace ptx
}  // namespace simple_moe

#endif  // SIMPLE_MOE_PTX_CUH
