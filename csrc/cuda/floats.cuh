// Floats of a dtype that is known at run time, and rows of 8 values in one 16-byte access.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace simple_moe {

// Calls `f` with a value of the type behind `dtype`. (The pragma: `f` may be for the GPU alone.)
#pragma nv_exec_check_disable
template <typename F>
SIMPLE_MOE_HOST_DEVICE void with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f(float());
  if (dtype == DType::kFloat16) return f(f16());
  f(bf16());
}

// In two parts, for the second is a use of what was loaded, and waits for it.
__device__ __forceinline__ uint32_t load_bits(const Floats& floats, int64_t index) {
  if (floats.dtype == DType::kFloat32) return static_cast<const uint32_t*>(floats.data)[index];
  return static_cast<const uint16_t*>(floats.data)[index];
}
__device__ __forceinline__ float float_of(DType dtype, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  if (dtype == DType::kFloat32) return __uint_as_float(bits);
  return dtype == DType::kFloat16 ? ptx::to_float(f16{half}) : ptx::to_float(bf16{half});
}
__device__ __forceinline__ float load_float(const Floats& floats, int64_t index) {
  return float_of(floats.dtype, load_bits(floats, index));
}

constexpr int kVector = 8;  // values a thread handles at once
template <typename T, int kCount = kVector>
struct alignas(16) Vector {
  T values[kCount];
};

// data[index + i] = values[i] for i < count.
__device__ __forceinline__ void store_vector(void* data, DType dtype, int64_t index, int count,
                                             bool aligned, const float (&values)[kVector]) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* const row = static_cast<T*>(data) + index;
    if (!aligned || count < kVector) {
      for (int i = 0; i < kVector; ++i)
        if (i < count) row[i] = ptx::from_float<T>(values[i]);
    } else if constexpr (std::is_same_v<T, float>) {
      reinterpret_cast<uint4*>(row)[0] = reinterpret_cast<const uint4&>(values[0]);
      reinterpret_cast<uint4*>(row)[1] = reinterpret_cast<const uint4&>(values[4]);
    } else {
      *reinterpret_cast<uint4*>(row) = {
          ptx::pack<T>(values[0], values[1]), ptx::pack<T>(values[2], values[3]),
          ptx::pack<T>(values[4], values[5]), ptx::pack<T>(values[6], values[7])};
    }
  });
}

}  // namespace simple_moe
