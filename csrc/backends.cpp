#include "backends.h"

#include <span>
#include <vector>

#include "cpu/primitives.h"

#ifdef SIMPLE_MOE_CUDA
#include "cuda/device.h"
#include "cuda/primitives.h"
#endif

namespace simple_moe {

namespace {

const Backend kCpu{"auto", [](const GroupedGemm& p, Stream) { cpu::grouped_gemm(p); },
                   [] { return true; }, true};

// One more backend is one more file and one more line here. The fastest first.
const std::vector<Backend> kCudaBackends{
#ifdef SIMPLE_MOE_CUDA
#ifdef SIMPLE_MOE_SM90
    {"sm90", cuda::grouped_gemm_sm90, [] { return cuda::has_sm90(); }, true, true, true},
#endif
    {"sm80", cuda::grouped_gemm, [] { return device_info().major >= 8; }, true, true},
    {"cublas", cuda::cublas_grouped_gemm, [] { return device_info().major >= 8; }, false},
#endif
};

}  // namespace

const Backend& choose_backend(const Checks& check, const Place& place, const std::string& name,
                              bool batch_invariant) {
  const std::span<const Backend> backends =
      place.on_cuda() ? std::span(kCudaBackends) : std::span(&kCpu, 1);
  std::vector<const char*> names{"auto"};
  for (const Backend& backend : backends) {
    if (!backend.runs_here() || (batch_invariant && !backend.keeps_all_promises)) continue;
    if (name == backend.name || (name == "auto" && backend.keeps_all_promises)) return backend;
    names.push_back(backend.name);
  }
  if (!place.on_cuda()) check.fail("backend is '", name, "', expected auto, the CPU's only one");
  if (name == "auto") check.fail("backend is 'auto', expected a GPU of capability 8.0 or more");
  check.fail("backend is '", name, "', expected one of ", join(names),
             batch_invariant ? " with batch_invariant=True" : "");
}

std::string backend_names() {
  std::string names = "[\"auto\"";
  for (const Backend& backend : kCudaBackends) names += std::string(", \"") + backend.name + '"';
  return names + "]";
}

}  // namespace simple_moe
