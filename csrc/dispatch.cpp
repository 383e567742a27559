#include "dispatch.h"

#include "cpu/primitives.h"
#include "shim.h"

#ifdef SIMPLE_MOE_CUDA
#include "cuda/primitives.h"

// Weak: torch for the CPU alone has no such function, and the same library loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

#define SIMPLE_MOE_RUN(primitive) on_cuda() ? cuda::primitive(p, stream()) : cpu::primitive(p)
#else
#define SIMPLE_MOE_RUN(primitive) cpu::primitive(p)
#endif

namespace simple_moe {

Place::Place(const Checks& check) {
  const Tensor& tensor = check.reference();
  if (!tensor.is_cuda()) return;
#ifdef SIMPLE_MOE_CUDA
  const int32_t device = tensor.get_device_index();
  guard_.emplace(device);
  void* stream;
  check_shim(aoti_torch_get_current_cuda_stream(device, &stream),
             "aoti_torch_get_current_cuda_stream");
  stream_ = static_cast<Stream>(stream);
#else
  check.that(false, check.reference_name(), " is on ", device_of(tensor),
             ", expected cpu: this library was built without CUDA (no nvcc was found)");
#endif
}

#ifdef SIMPLE_MOE_CUDA
bool Place::topk_route_needs_keys(const TopkRoute& p) const {
  return on_cuda() && cuda::topk_route_needs_keys(p);
}
int64_t Place::sort_by_expert_counts(int64_t slots, int64_t experts) const {
  return on_cuda() ? cuda::sort_by_expert_counts(slots, experts) : 0;
}
RowTiles Place::plan_row_tiles(int64_t rows, int64_t experts, int64_t first_n, int64_t second_n,
                               bool may_split, bool wgmma) const {
  if (!on_cuda() || rows == 0 || first_n == 0 || second_n == 0) return {};
  return cuda::plan_row_tiles(rows, experts, first_n, second_n, may_split, wgmma);
}
bool Place::grouped_gemv_suits(const GroupedGemm& p) const {
  return on_cuda() && cuda::grouped_gemv_suits(p);
}
bool Place::reads_whole_vectors(const GroupedGemm& p) const {
  return on_cuda() && cuda::reads_whole_vectors(p);
}
bool Place::l2_keeps(int64_t bytes) const { return on_cuda() && cuda::l2_keeps(bytes); }
void Place::grouped_gemv(const GroupedGemm& p) const { cuda::grouped_gemv(p, stream()); }
void Place::row_tiles(const GroupedGemm& p) const {
  if (p.row_tiles.height > 0) cuda::row_tiles(p, stream());
}
#else
bool Place::topk_route_needs_keys(const TopkRoute&) const { return false; }
int64_t Place::sort_by_expert_counts(int64_t, int64_t) const { return 0; }
RowTiles Place::plan_row_tiles(int64_t, int64_t, int64_t, int64_t, bool, bool) const { return {}; }
bool Place::grouped_gemv_suits(const GroupedGemm&) const { return false; }
bool Place::reads_whole_vectors(const GroupedGemm&) const { return false; }
bool Place::l2_keeps(int64_t) const { return false; }
void Place::grouped_gemv(const GroupedGemm&) const {}
void Place::row_tiles(const GroupedGemm&) const {}
#endif

void Place::topk_route(const TopkRoute& p) const { SIMPLE_MOE_RUN(topk_route); }
void Place::sort_by_expert(const SortByExpert& p) const { SIMPLE_MOE_RUN(sort_by_expert); }
void Place::grouped_gemm_wgrad(const GroupedGemmWgrad& p) const {
  SIMPLE_MOE_RUN(grouped_gemm_wgrad);
}
void Place::combine(const Combine& p) const { SIMPLE_MOE_RUN(combine); }

}  // namespace simple_moe
