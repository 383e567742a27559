#include "device.h"

#include <cuda_runtime_api.h>

#include <charconv>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>

namespace simple_moe {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, name, device);
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("simple_moe: cudaDeviceGetAttribute: ") +
                             cudaGetErrorString(status));
  }
  return value;
}

// "sms=108,smem_kb=163", either of them alone too.
void override_with(std::string_view text, DeviceInfo& info) {
  const auto value_of = [&](std::string_view field, std::string_view name) {
    int value = 0;
    const std::string_view digits = field.substr(name.size());
    const auto [end, error] = std::from_chars(digits.begin(), digits.end(), value);
    return error == std::errc() && end == digits.end() ? value : 0;
  };
  for (std::string_view rest = text; !rest.empty();) {
    const std::string_view field = rest.substr(0, rest.find(','));
    rest.remove_prefix(field.size() + (field.size() < rest.size()));
    const bool sms = field.starts_with("sms="), smem = field.starts_with("smem_kb=");
    const int value = sms ? value_of(field, "sms=") : smem ? value_of(field, "smem_kb=") : 0;
    if (value <= 0) {
      throw std::runtime_error("simple_moe: SIMPLE_MOE_TEST_DEVICE is '" + std::string(text) +
                               "', expected one like sms=108,smem_kb=163");
    }
    if (sms) {
      info.sm_count = value;
    } else {
      info.smem_per_block = static_cast<size_t>(value) << 10;
      info.smem_per_sm = static_cast<size_t>(value + 1) << 10;  // CUDA keeps 1 KB for itself.
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
      .major = attribute(cudaDevAttrComputeCapabilityMajor, device),
      .minor = attribute(cudaDevAttrComputeCapabilityMinor, device),
  };
  if (const char* text = std::getenv("SIMPLE_MOE_TEST_DEVICE")) override_with(text, info);
  return info;
}

}  // namespace

const DeviceInfo& device_info() {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> infos;  // Its elements never move.
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("simple_moe: cudaGetDevice: ") +
                             cudaGetErrorString(status));
  }
  const std::lock_guard lock(mutex);
  const auto found = infos.find(device);
  return found != infos.end() ? found->second : infos.emplace(device, ask(device)).first->second;
}

}  // namespace simple_moe
