// What the launchers know of the GPU.
#pragma once

#include <cstddef>

namespace simple_moe {

struct DeviceInfo {
  int sm_count;
  size_t smem_per_block;  // the most that one block may opt in to
  size_t smem_per_sm;
  int major, minor;  // compute capability
  // Whether a kernel may start before those before it are done (programmatic dependent launch):
  // needs SM90, and code that was compiled for it (PTX for SM80 has no instruction to wait).
  bool early_launch;
};

// The PTX version that the kernels running here were compiled for: 80 where the driver made them
// from PTX for SM80, on whatever GPU.
int compiled_for();

// Of the current device. SIMPLE_MOE_TEST_DEVICE="sms=108,smem_kb=163,early_launch=0" overrides it,
// so that one GPU can stand in for another in tests.
const DeviceInfo& device_info();

}  // namespace simple_moe
