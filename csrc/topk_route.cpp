// topk_route: checks, outputs, scratch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "tensors.h"

namespace simple_moe {
namespace {

constexpr const char* kScorings[] = {"softmax", "sigmoid"};

std::tuple<Tensor, Tensor> topk_route(const Tensor& router_logits, int64_t topk,
                                      const std::optional<Tensor>& correction_bias,
                                      const std::string& scoring, bool renormalize,
                                      int64_t num_groups, int64_t topk_groups, double scaling) {
  const Checks check("topk_route", "router_logits", router_logits);
  check.dims("router_logits", router_logits, 2, "(T, E)");
  const DType dtype = check.floating("router_logits", router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  check.that(experts >= 1, "router_logits has shape ", shape_of(router_logits),
             ", expected at least one expert (T, E)");
  check.countable("router_logits", router_logits, experts, "E");
  if (correction_bias) {
    check.shape("correction_bias", *correction_bias, {experts}, "(E)");
    check.floating("correction_bias", *correction_bias);
  }
  check.that(num_groups >= 1 && experts % num_groups == 0, "num_groups is ", num_groups,
             ", expected a divisor of the ", experts, " experts");
  check.that(topk_groups >= 1 && topk_groups <= num_groups, "topk_groups is ", topk_groups,
             ", expected 1 to num_groups, ", num_groups);
  const int64_t choices = topk_groups * (experts / num_groups);
  check.that(topk >= 1 && topk <= choices, "topk is ", topk, ", expected 1 to ", choices,
             num_groups > 1 ? ", the experts of topk_groups groups" : ", the number of experts");
  check.countable("router_logits", router_logits, tokens * topk, "T * topk");
  const bool sigmoid = check.one_of("scoring", scoring, kScorings) == 1;

  const Place place(check);
  const Tensor weights = empty(router_logits, {tokens, topk}, ScalarType::Float);
  const Tensor ids = empty(router_logits, {tokens, topk}, ScalarType::Int);
  if (tokens == 0) return {weights, ids};
  const Tensor logits = contiguous_of(router_logits);
  const auto bias = contiguous_of(correction_bias);
  TopkRoute p{
      .logits = logits.const_data_ptr(),
      .dtype = dtype,
      .bias = floats_of(bias),
      .tokens = tokens,
      .experts = experts,
      .topk = static_cast<int>(topk),
      .sigmoid = sigmoid,
      .renormalize = renormalize,
      .num_groups = static_cast<int>(num_groups),
      .topk_groups = static_cast<int>(topk_groups),
      .scaling = static_cast<float>(scaling),
      .weights = static_cast<float*>(weights.mutable_data_ptr()),
      .ids = static_cast<int32_t*>(ids.mutable_data_ptr()),
      .keys = nullptr,
  };
  std::optional<Tensor> keys;
  if (place.topk_route_needs_keys(p)) {
    keys = empty(router_logits, {tokens, experts + num_groups}, ScalarType::Int);
    p.keys = static_cast<uint32_t*>(keys->mutable_data_ptr());
  }
  place.topk_route(p);
  return {weights, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simple_moe, CPU, m) { m.impl("topk_route", TORCH_BOX(&topk_route)); }
STABLE_TORCH_LIBRARY_IMPL(simple_moe, CUDA, m) { m.impl("topk_route", TORCH_BOX(&topk_route)); }

}  // namespace simple_moe
