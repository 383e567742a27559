// The one function every kernel launch goes through.
// tests/emulator replaces this header (it defines the guard first).
#ifndef SIMPLE_MOE_LAUNCH_H
#define SIMPLE_MOE_LAUNCH_H

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_check.h"
#include "device.h"

namespace simple_moe {

// When a kernel may start: after those before it in the stream, or as early as they let it, where
// the GPU and the build can. An early one calls ptx::wait_for_earlier_kernels() before it reads
// what they write, or writes what they read or write.
enum class Start { kAfterOthers, kEarly };

// Shared memory past 48 KB has to be asked for once per kernel and device; asking again is cheap.
// What was asked for last counts, for other threads' launches too: so it is always the most.
template <Start kStart = Start::kAfterOthers, typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, int block, size_t smem_bytes,
            cudaStream_t stream, Args... args) {
  if (grid == 0) return;
  if (smem_bytes > 48 * 1024) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(device_info().smem_per_block)),
               "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid);
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = kStart == Start::kEarly && device_info().early_launch ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "kernel launch");
}

}  // namespace simple_moe

#endif  // SIMPLE_MOE_LAUNCH_H
