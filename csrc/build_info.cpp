// What was built, for Python to ask before any operator exists.
#include <string>

#include "backends.h"

#ifdef SIMPLE_MOE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace simple_moe {
namespace {

std::string cuda_version() {
#ifdef SIMPLE_MOE_CUDA
  return '"' + std::to_string(CUDART_VERSION / 1000) + '.' +
         std::to_string(CUDART_VERSION % 1000 / 10) + '"';
#else
  return "null";
#endif
}

}  // namespace
}  // namespace simple_moe

// JSON. SIMPLE_MOE_VERSION and SIMPLE_MOE_CUDA_TARGETS, a JSON list, are the build's.
extern "C" __attribute__((visibility("default"))) const char* simple_moe_build_info() {
  static const std::string info =
      "{\"version\": \"" SIMPLE_MOE_VERSION
      "\", \"torch_target\": \"2.10\", \"cuda_targets\": " SIMPLE_MOE_CUDA_TARGETS
      ", \"cuda_version\": " +
      simple_moe::cuda_version() + ", \"backends\": " + simple_moe::backend_names() + "}";
  return info.c_str();
}
