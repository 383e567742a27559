// The one function every kernel launch goes through.
// tests/emulator replaces this header (it defines the guard first).
#ifndef SIMPLE_MOE_LAUNCH_CUH
#define SIMPLE_MOE_LAUNCH_CUH

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace simple_moe {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("simple_moe: ") + what + ": " +
                             cudaGetErrorString(status));
  }
}

// Shared memory past 48 KB has to be asked for once per kernel and device; asking again is cheap.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, int block, size_t smem_bytes,
            cudaStream_t stream, Args... args) {
  if (grid == 0) return;
  if (smem_bytes > 48 * 1024) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(smem_bytes)),
               "cudaFuncSetAttribute");
  }
  kernel<<<static_cast<unsigned>(grid), block, smem_bytes, stream>>>(args...);
  cuda_check(cudaGetLastError(), "kernel launch");
}

}  // namespace simple_moe

#endif  // SIMPLE_MOE_LAUNCH_CUH
