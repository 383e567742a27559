// Every operator's schema, in one place. Tensors stand before the `*`: register_autograd takes no
// keyword-only ones.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(simple_moe, m) {
  m.def(
      "fused_moe(Tensor x, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids,"
      " Tensor? b1=None, Tensor? b2=None, Tensor? expert_alpha=None, Tensor? expert_beta=None,"
      " Tensor? expert_limit=None, *, str activation=\"swiglu\", str gate_layout=\"gate_up\","
      " float? alpha=None, float? beta=None, float? limit=None, SymInt expert_offset=0,"
      " ScalarType? output_dtype=None, bool batch_invariant=False, str backend=\"auto\") -> "
      "Tensor");
  m.def(
      "fused_moe.out(Tensor x, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids,"
      " Tensor? b1=None, Tensor? b2=None, Tensor? expert_alpha=None, Tensor? expert_beta=None,"
      " Tensor? expert_limit=None, *, str activation=\"swiglu\", str gate_layout=\"gate_up\","
      " float? alpha=None, float? beta=None, float? limit=None, SymInt expert_offset=0,"
      " bool batch_invariant=False, str backend=\"auto\", Tensor(a!) out) -> ()");
  m.def(
      "topk_route(Tensor router_logits, SymInt topk, Tensor? correction_bias=None, *,"
      " str scoring=\"softmax\", bool renormalize=True, SymInt num_groups=1, SymInt topk_groups=1,"
      " float scaling=1.0) -> (Tensor, Tensor)");
  m.def(
      "sort_by_expert(Tensor topk_ids, SymInt num_experts, SymInt expert_offset=0)"
      " -> (Tensor, Tensor)");
  m.def(
      "grouped_gemm(Tensor a, Tensor b, Tensor expert_offsets, Tensor? bias=None, *,"
      " ScalarType? output_dtype=None, str backend=\"auto\") -> Tensor");
  m.def(
      "grouped_gemm_wgrad(Tensor a, Tensor b, Tensor expert_offsets, *,"
      " ScalarType? output_dtype=None) -> Tensor");
  m.def(
      "combine(Tensor expert_out, Tensor topk_weights, Tensor sorted_slots, Tensor expert_offsets,"
      " *, ScalarType? output_dtype=None) -> Tensor");
}
