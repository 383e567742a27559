// Where an operator runs, and the primitives there: the one thing that knows whether there is a
// CUDA half.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "checks.h"
#include "params.h"

struct CUstream_st;

namespace simple_moe {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers.

// The device of the checked tensors, which is the current device as long as this lives. Raises for
// a CUDA tensor where the library was built without CUDA.
class Place {
 public:
  explicit Place(const Checks& check);
  bool on_cuda() const { return guard_.has_value(); }
  Stream stream() const { return stream_; }  // The current one.

  // Scratch that the CPU needs none of. Row tiles have height 0 there.
  RowTiles plan_row_tiles(int64_t rows, int64_t experts, int64_t first_n, int64_t second_n,
                          bool may_split, bool wgmma) const;
  bool topk_route_needs_keys(const TopkRoute& p) const;
  int64_t sort_by_expert_counts(int64_t slots, int64_t experts) const;

  // Whether grouped_gemv is there, and the best for this product.
  bool grouped_gemv_suits(const GroupedGemm& p) const;
  // Whether L2 should keep so much that is read soon. Not on CPUs.
  bool l2_keeps(int64_t bytes) const;
  // Whether k may be split.
  bool reads_whole_vectors(const GroupedGemm& p) const;

  // The primitives, but for grouped_gemm: there is a choice of those, in backends.h.
  void topk_route(const TopkRoute& p) const;
  void sort_by_expert(const SortByExpert& p) const;
  void row_tiles(const GroupedGemm& p) const;
  void grouped_gemm_wgrad(const GroupedGemmWgrad& p) const;
  void combine(const Combine& p) const;
  void grouped_gemv(const GroupedGemm& p) const;  // where suited

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

}  // namespace simple_moe
