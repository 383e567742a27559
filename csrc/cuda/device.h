// What the launchers know of the GPU.
#pragma once

#include <cstddef>

#include "params.h"

namespace simple_moe {

struct DeviceInfo {
  int sm_count;
  size_t smem_per_block;  // the most that one block may have
  size_t smem_per_sm;
  int64_t l2_bytes, memory_gbps;  // gbps: by its clock and width
  int major, minor;               // compute capability
  // Whether a kernel may start before those before it are done (programmatic dependent launch):
  // needs SM90, and code that was compiled for it (PTX for SM80 has no instruction to wait).
  bool early_launch;
};

// The most shared memory that a block may have where code runs that was compiled for that PTX
// version (80, 86, ...): of all GPUs that it runs on by its nature, the least.
SIMPLE_MOE_HOST_DEVICE constexpr int most_smem(int ptx_version) {
  const bool small =
      (ptx_version > 80 && ptx_version < 90 && ptx_version != 87) || ptx_version >= 120;
  return (small ? 99 : ptx_version < 90 ? 163 : 227) << 10;
}

// The PTX version that the kernels running here were compiled for: 80 where the driver made them
// from PTX for SM80, on whatever GPU.
int compiled_for();

// Of the current device.
// SIMPLE_MOE_TEST_DEVICE="sms=108,smem_kb=163,memory_gbps=2000,early_launch=0" overrides it, so
// that one GPU can stand in for another in tests.
const DeviceInfo& device_info();

}  // namespace simple_moe
