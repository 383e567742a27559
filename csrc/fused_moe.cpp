// fused_moe: the whole layer as four primitives.
//
//   topk_ids --sort_by_expert--> expert_offsets, sorted_slots, slot_rows
//   x  --grouped_gemm, gathered by slot: x[slot / K] @ w1[e].T + b1[e], activation--> h1 [T*K, I]
//   h1 --grouped_gemm: (h1 @ w2[e].T + b2[e]) * topk_weights[slot]--> h2 [T*K, H]
//   h2 --combine: the sum over each token's slot_rows--> out [T, H]
//
// All inputs have been read by the time `out` is written, so that it may overlap any of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "backends.h"
#include "checks.h"
#include "dispatch.h"
#include "tensors.h"

namespace simple_moe {
namespace {

// In the order of the enumeration.
constexpr std::array kActivationNames{
    "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "swiglu_step", "situ",
    "silu",   "gelu",  "gelu_tanh",  "relu",  "relu2",      "identity",
};
constexpr std::array kGateLayoutNames{"gate_up", "up_gate", "interleaved"};

// A parameter of the activation: a float, or a tensor with one value per expert.
struct Parameter {
  const char* name;
  std::optional<double> value;
  const std::optional<Tensor>& per_expert;
};

struct Arguments {
  const Tensor &x, &w1, &w2, &topk_weights, &topk_ids;
  const std::optional<Tensor>&b1, &b2;
  Parameter alpha, beta, limit;
  const std::string &activation, &gate_layout;
  int64_t expert_offset;
  bool batch_invariant;
  const std::string& backend;
};

// What the checks find out.
struct Layer {
  int64_t tokens, topk, experts, hidden, intermediate;
  DType dtype;
  bool ids_are_int64;
  Activation activation;
  GateLayout gate_layout;
};

// The defaults of the parameters that the activation takes.
struct Defaults {
  std::optional<float> alpha, beta, limit;
};

Defaults defaults_of(Activation activation) {
  switch (activation) {
    case Activation::kSwigluOai:
      return {1.702f, 1.0f, 7.0f};
    case Activation::kSwigluStep:
      return {{}, {}, 7.0f};
    case Activation::kSitu:
      return {{}, 4.0f, 25.0f};
    default:
      return {};
  }
}

void check_parameter(const Checks& check, const Parameter& parameter, std::optional<float> fallback,
                     const std::string& activation, int64_t experts) {
  const char* const name = parameter.name;
  if (parameter.per_expert) {
    check.shape(name, *parameter.per_expert, {experts}, "(one per expert)");
    const ScalarType type = parameter.per_expert->scalar_type();
    check.that(type == ScalarType::Float, name, " has dtype ", dtype_name(type),
               ", expected float32");
    check.that(!parameter.value, name,
               " is given as a float and as a tensor, expected one of them");
  }
  check.that(fallback || (!parameter.value && !parameter.per_expert), name, " is given, but '",
             activation, "' takes no ", name, ": expected none");
}

Layer check_arguments(const Checks& check, const Arguments& a) {
  Layer layer{};
  layer.activation =
      static_cast<Activation>(check.one_of("activation", a.activation, kActivationNames));
  layer.gate_layout =
      static_cast<GateLayout>(check.one_of("gate_layout", a.gate_layout, kGateLayoutNames));
  const bool gated = is_gated(layer.activation);
  const char* const w1_symbols = gated ? "(E, 2*I, H)" : "(E, I, H)";

  check.dims("x", a.x, 2, "(T, H)");
  layer.dtype = check.floating("x", a.x);
  layer.tokens = a.x.size(0);
  layer.hidden = a.x.size(1);
  check.that(layer.hidden >= 1, "x has shape ", shape_of(a.x), ", expected H >= 1 (T, H)");

  check.dims("w1", a.w1, 3, w1_symbols);
  layer.experts = a.w1.size(0);
  const int64_t width = a.w1.size(1);
  layer.intermediate = gated ? width / 2 : width;
  check.shape("w1", a.w1, {layer.experts, width, layer.hidden}, w1_symbols);
  check.that(layer.experts >= 1 && layer.intermediate >= 1, "w1 has shape ", shape_of(a.w1),
             ", expected E >= 1 and I >= 1 ", w1_symbols);
  check.that(!gated || width % 2 == 0, "w1 has shape ", shape_of(a.w1),
             ", expected an even number of rows, as '", a.activation, "' is gated ", w1_symbols);
  check.same_dtype("w1", a.w1);
  check.shape("w2", a.w2, {layer.experts, layer.hidden, layer.intermediate}, "(E, H, I)");
  check.same_dtype("w2", a.w2);

  check.dims("topk_weights", a.topk_weights, 2, "(T, K)");
  layer.topk = a.topk_weights.size(1);
  check.shape("topk_weights", a.topk_weights, {layer.tokens, layer.topk}, "(T, K)");
  check.that(layer.topk >= 1, "topk_weights has shape ", shape_of(a.topk_weights),
             ", expected K >= 1 (T, K)");
  check.countable("topk_weights", a.topk_weights, layer.tokens * layer.topk, "T * K");
  check.floating("topk_weights", a.topk_weights);
  check.shape("topk_ids", a.topk_ids, {layer.tokens, layer.topk}, "(T, K)");
  layer.ids_are_int64 = check.int32_or_int64("topk_ids", a.topk_ids);

  if (a.b1) {
    check.shape("b1", *a.b1, {layer.experts, width}, gated ? "(E, 2*I)" : "(E, I)");
    check.bias_dtype("b1", *a.b1);
  }
  if (a.b2) {
    check.shape("b2", *a.b2, {layer.experts, layer.hidden}, "(E, H)");
    check.bias_dtype("b2", *a.b2);
  }
  const Defaults defaults = defaults_of(layer.activation);
  check_parameter(check, a.alpha, defaults.alpha, a.activation, layer.experts);
  check_parameter(check, a.beta, defaults.beta, a.activation, layer.experts);
  check_parameter(check, a.limit, defaults.limit, a.activation, layer.experts);
  return layer;
}

// Several arrays in one allocation: each costs the host a few microseconds.
class Plan {
 public:
  // Where the array begins.
  int64_t add(int64_t bytes) {
    const int64_t begin = bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return begin;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

float value_or(const Parameter& parameter, std::optional<float> fallback) {
  return parameter.value ? static_cast<float>(*parameter.value) : fallback.value_or(0.0f);
}

const float* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// `out` is contiguous. With tokens, and checked arguments.
void run(const Arguments& a, const Layer& layer, const Place& place, const Backend& backend,
         const Tensor& out) {
  const int64_t slots = layer.tokens * layer.topk;
  const int64_t element = static_cast<int64_t>(element_size(layer.dtype));
  Plan plan;
  const int64_t expert_offsets_at = plan.add(4 * (layer.experts + 1));
  const int64_t sorted_slots_at = plan.add(4 * slots);
  const int64_t slot_rows_at = plan.add(4 * slots);
  const int64_t counts_at = plan.add(4 * place.sort_by_expert_counts(slots, layer.experts));
  const int64_t h1_at = plan.add(element * slots * layer.intermediate);
  const int64_t h2_at = plan.add(element * slots * layer.hidden);
  const Tensor scratch = empty(a.x, {plan.bytes()}, ScalarType::Byte);
  char* const memory = static_cast<char*>(scratch.mutable_data_ptr());
  const auto int32_at = [&](int64_t begin) { return reinterpret_cast<int32_t*>(memory + begin); };

  const Tensor ids = contiguous_of(a.topk_ids);
  const SortByExpert sort{
      .topk_ids = ids.const_data_ptr(),
      .ids_are_int64 = layer.ids_are_int64,
      .slots = slots,
      .experts = layer.experts,
      .expert_offset = a.expert_offset,
      .expert_offsets = int32_at(expert_offsets_at),
      .sorted_slots = int32_at(sorted_slots_at),
      .slot_rows = int32_at(slot_rows_at),
      .counts = int32_at(counts_at),
  };
  place.sort_by_expert(sort);

  const Defaults defaults = defaults_of(layer.activation);
  const auto alphas = contiguous_of(a.alpha.per_expert), betas = contiguous_of(a.beta.per_expert),
             limits = contiguous_of(a.limit.per_expert);
  const auto b1 = contiguous_of(a.b1), b2 = contiguous_of(a.b2);
  const std::optional<Tensor> weights = contiguous_of(a.topk_weights);
  const Rows x = rows_of(a.x);
  const ExpertMatrices w1 = expert_matrices_of(a.w1), w2 = expert_matrices_of(a.w2);
  const GroupedGemm first{
      .dtype = layer.dtype,
      .out_dtype = layer.dtype,
      .a = x.data,
      .a_stride = x.stride,
      .rows = slots,
      .n = layer.intermediate,
      .k = layer.hidden,
      .experts = layer.experts,
      .expert_offsets = sort.expert_offsets,
      .sorted_slots = sort.sorted_slots,
      .gather_topk = static_cast<int>(layer.topk),
      .b = w1.data,
      .b_expert_stride = w1.expert_stride,
      .b_row_stride = w1.row_stride,
      .b_col_stride = w1.col_stride,
      .bias = floats_of(b1),
      .activation = {.kind = layer.activation,
                     .alpha = value_or(a.alpha, defaults.alpha),
                     .beta = value_or(a.beta, defaults.beta),
                     .limit = value_or(a.limit, defaults.limit),
                     .expert_alpha = data_of(alphas),
                     .expert_beta = data_of(betas),
                     .expert_limit = data_of(limits)},
      .gate_layout = layer.gate_layout,
      .slot_weights = {},
      .out = memory + h1_at,
      .out_stride = layer.intermediate,
      .zero_other_rows = false,
  };
  backend.grouped_gemm(first, place.stream());

  GroupedGemm second = first;
  second.a = first.out;
  second.a_stride = first.out_stride;
  second.n = layer.hidden;
  second.k = layer.intermediate;
  second.gather_topk = 0;
  second.b = w2.data;
  second.b_expert_stride = w2.expert_stride;
  second.b_row_stride = w2.row_stride;
  second.b_col_stride = w2.col_stride;
  second.bias = floats_of(b2);
  second.activation = {};
  second.gate_layout = GateLayout::kGateUp;
  second.slot_weights = floats_of(weights);
  second.out = memory + h2_at;
  second.out_stride = layer.hidden;
  backend.grouped_gemm(second, place.stream());

  const Combine sum{
      .dtype = layer.dtype,
      .out_dtype = dtype_of(out),
      .expert_out = second.out,
      .expert_out_stride = second.out_stride,
      .tokens = layer.tokens,
      .hidden = layer.hidden,
      .rows = slots,
      .topk = static_cast<int>(layer.topk),
      .weights = {},
      .slot_rows = sort.slot_rows,
      .sorted_slots = nullptr,
      .expert_offsets = nullptr,
      .experts = layer.experts,
      .out = out.mutable_data_ptr(),
  };
  place.combine(sum);
}

// `make_out(check, layer)` gives the tensor to write.
template <class MakeOut>
Tensor checked_run(const Arguments& a, const MakeOut& make_out) {
  const Checks check("fused_moe", "x", a.x);
  const Layer layer = check_arguments(check, a);
  const Place place(check);
  const Backend& backend = choose_backend(check, place, a.backend, a.batch_invariant);
  const Tensor out = make_out(check, layer);
  if (layer.tokens > 0) run(a, layer, place, backend, out);
  return out;
}

Tensor fused_moe(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& topk_weights,
                 const Tensor& topk_ids, const std::optional<Tensor>& b1,
                 const std::optional<Tensor>& b2, const std::optional<Tensor>& expert_alpha,
                 const std::optional<Tensor>& expert_beta,
                 const std::optional<Tensor>& expert_limit, const std::string& activation,
                 const std::string& gate_layout, std::optional<double> alpha,
                 std::optional<double> beta, std::optional<double> limit, int64_t expert_offset,
                 std::optional<ScalarType> output_dtype, bool batch_invariant,
                 const std::string& backend) {
  const Arguments arguments{
      x,
      w1,
      w2,
      topk_weights,
      topk_ids,
      b1,
      b2,
      {"alpha", alpha, expert_alpha},
      {"beta", beta, expert_beta},
      {"limit", limit, expert_limit},
      activation,
      gate_layout,
      expert_offset,
      batch_invariant,
      backend,
  };
  return checked_run(arguments, [&](const Checks& check, const Layer& layer) {
    const DType dtype = check.output_dtype(output_dtype, layer.dtype);
    return empty(x, {layer.tokens, layer.hidden}, scalar_type_of(dtype));
  });
}

void fused_moe_out(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& topk_weights,
                   const Tensor& topk_ids, const std::optional<Tensor>& b1,
                   const std::optional<Tensor>& b2, const std::optional<Tensor>& expert_alpha,
                   const std::optional<Tensor>& expert_beta,
                   const std::optional<Tensor>& expert_limit, const std::string& activation,
                   const std::string& gate_layout, std::optional<double> alpha,
                   std::optional<double> beta, std::optional<double> limit, int64_t expert_offset,
                   bool batch_invariant, const std::string& backend, Tensor out) {
  const Arguments arguments{
      x,
      w1,
      w2,
      topk_weights,
      topk_ids,
      b1,
      b2,
      {"alpha", alpha, expert_alpha},
      {"beta", beta, expert_beta},
      {"limit", limit, expert_limit},
      activation,
      gate_layout,
      expert_offset,
      batch_invariant,
      backend,
  };
  const Tensor written = checked_run(arguments, [&](const Checks& check, const Layer& layer) {
    check.shape("out", out, {layer.tokens, layer.hidden}, "(T, H)");
    const DType dtype = check.floating("out", out);
    for (int64_t d = 0; d < 2; ++d) {
      check.that(out.size(d) <= 1 || out.stride(d) > 0, "out has stride 0 in dimension ", d,
                 ", expected every element to have a place of its own");
    }
    if (out.is_contiguous()) return out;
    return empty(out, {layer.tokens, layer.hidden}, scalar_type_of(dtype));
  });
  if (!out.is_contiguous()) torch::stable::copy_(out, written);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simple_moe, CPU, m) {
  m.impl("fused_moe", TORCH_BOX(&fused_moe));
  m.impl("fused_moe.out", TORCH_BOX(&fused_moe_out));
}
STABLE_TORCH_LIBRARY_IMPL(simple_moe, CUDA, m) {
  m.impl("fused_moe", TORCH_BOX(&fused_moe));
  m.impl("fused_moe.out", TORCH_BOX(&fused_moe_out));
}

}  // namespace simple_moe
