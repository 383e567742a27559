// fused_moe's arguments, and what the checks find out about them.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "params.h"
#include "tensors.h"

namespace simple_moe {

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

Defaults defaults_of(Activation activation);

// Raises where they don't fit together.
Layer check_arguments(const Checks& check, const Arguments& a);

}  // namespace simple_moe
