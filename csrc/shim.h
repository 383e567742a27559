// Calls of torch's C functions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

namespace simple_moe {

// (torch's own macro for this has another name in every other version.)
inline void check_shim(AOTITorchError code, const char* what) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string(what) + " failed");
}

}  // namespace simple_moe
