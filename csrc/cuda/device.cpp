#include "device.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>

#include "cuda_check.h"

namespace simple_moe {

void cuda_check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("simple_moe: ") + what + ": " + cudaGetErrorString(status));
}

namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  cuda_check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// "sms=108,smem_kb=163,memory_gbps=2000,early_launch=0", or some of them.
void override_with(std::string_view text, DeviceInfo& info) {
  for (std::string_view rest = text; !rest.empty();) {
    const std::string_view field = rest.substr(0, rest.find(','));
    rest.remove_prefix(field.size() + (field.size() < rest.size()));
    const std::string_view name = field.substr(0, field.find('='));
    const std::string_view digits = field.substr(name.size() + (name.size() < field.size()));
    int value = 0;
    const auto [end, error] = std::from_chars(digits.begin(), digits.end(), value);
    const bool number = error == std::errc() && end == digits.end();
    if (name == "early_launch" && number && value == 0) {
      info.early_launch = false;
    } else if (name == "sms" && number && value > 0) {
      info.sm_count = value;
    } else if (name == "memory_gbps" && number) {
      info.memory_gbps = value;
    } else if (name == "smem_kb" && number && value > 0) {
      info.smem_per_block = static_cast<size_t>(value) << 10;
      info.smem_per_sm = static_cast<size_t>(value + 1) << 10;  // CUDA keeps 1 KB for itself.
    } else {
      throw std::runtime_error(
          "simple_moe: SIMPLE_MOE_TEST_DEVICE is '" + std::string(text) +
          "', expected one like sms=108,smem_kb=163,memory_gbps=2000,early_launch=0");
    }
  }
}

DeviceInfo ask(int device) {
  DeviceInfo info{
      .sm_count = attribute(cudaDevAttrMultiProcessorCount, device),
      .smem_per_block =
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
      .smem_per_sm =
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)),
      .l2_bytes = attribute(cudaDevAttrL2CacheSize, device),
      // Two transfers a clock, of kHz; bits.
      .memory_gbps = int64_t{2} * attribute(cudaDevAttrMemoryClockRate, device) *
                     attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8 / 1'000'000,
      .major = attribute(cudaDevAttrComputeCapabilityMajor, device),
      .minor = attribute(cudaDevAttrComputeCapabilityMinor, device),
      .early_launch = false,
  };
  const int version = info.major < 8 ? 80 : compiled_for();  // There is no code for older ones.
  info.early_launch = info.major >= 9 && version >= 90;
  if (const char* text = std::getenv("SIMPLE_MOE_TEST_DEVICE")) override_with(text, info);
  // Of code for smaller multiprocessors there is none that takes more.
  info.smem_per_block = std::min<size_t>(info.smem_per_block, most_smem(version));
  return info;
}

}  // namespace

const DeviceInfo& device_info() {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> infos;  // Its elements never move.
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto found = infos.find(device);
  return found != infos.end() ? found->second : infos.emplace(device, ask(device)).first->second;
}

}  // namespace simple_moe
