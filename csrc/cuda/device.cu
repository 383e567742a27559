#include "cuda_check.h"
#include "device.h"

namespace simple_moe {

static __global__ void probe_kernel() {}

int compiled_for() {
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, probe_kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

}  // namespace simple_moe
