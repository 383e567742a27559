// What CUDA answers, as an exception. Declared alone: <string> in every kernel's file would take a
// tenth of the build.
#pragma once

#include <cuda_runtime_api.h>

namespace simple_moe {

// Throws std::runtime_error, with what failed and why.
void cuda_check(cudaError_t status, const char* what);

}  // namespace simple_moe
