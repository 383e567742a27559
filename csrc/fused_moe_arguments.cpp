#include "fused_moe_arguments.h"

#include <array>

namespace simple_moe {
namespace {

// In the order of the enumeration.
constexpr std::array kActivationNames{
    "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "swiglu_step", "situ",
    "silu",   "gelu",  "gelu_tanh",  "relu",  "relu2",      "identity",
};
constexpr std::array kGateLayoutNames{"gate_up", "up_gate", "interleaved"};

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

}  // namespace

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

}  // namespace simple_moe
