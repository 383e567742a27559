// fused_moe: the whole layer as four primitives.
//
//   topk_ids, topk_weights --sort_by_expert--> expert_offsets, sorted_slots
//   x  --grouped_gemm: gathered x[token] @ w1[e].T + b1[e], activation--> h1 [T*K, I], sorted
//   h1 --grouped_gemm: (h1 @ w2[e].T + b2[e]) * topk_weights--> h2 [T*K, H], in the slots' order
//   h2 --combine: the sum over each token's slots that are held here--> out [T, H]
//
// Or, of few tokens, as two: each slot is a row, and none is moved.
//
//   x  --grouped_gemv: x[token] @ w1[e].T + b1[e], activation--> h1 [T*K, I], in the slots' order
//   h1 --grouped_gemv: (h1 @ w2[e].T + b2[e]) * topk_weights, added up--> out [T, H]
//
// With batch_invariant=True they add in the four's order.
//
// A long input goes in chunks of tokens, so that the workspace stays bounded. What the sort makes
// for the products is done with before `out` is written, and lies there meanwhile, unless `out` is
// too small or overlaps an input. It may: all have been read by the time it is written, but for the
// ids, which are copied then, and what the second product reads: then the output is made elsewhere.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "backends.h"
#include "checks.h"
#include "dispatch.h"
#include "fused_moe_arguments.h"
#include "tensors.h"

namespace simple_moe {
namespace {

float value_or(const Parameter& parameter, std::optional<float> fallback) {
  return parameter.value ? static_cast<float>(*parameter.value) : fallback.value_or(0.0f);
}

const float* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Inputs as the kernels read them.
struct Inputs {
  Inputs(const Arguments& a, const Layer& layer, const Tensor& out)
      : layer(layer),
        ids(contiguous_of(overlap(out, a.topk_ids) ? torch::stable::clone(a.topk_ids)
                                                   : a.topk_ids)),
        weights(contiguous_of(a.topk_weights)),
        b1(contiguous_of(a.b1)),
        b2(contiguous_of(a.b2)),
        alphas(contiguous_of(a.alpha.per_expert)),
        betas(contiguous_of(a.beta.per_expert)),
        limits(contiguous_of(a.limit.per_expert)),
        x(rows_of(a.x)),
        w1(expert_matrices_of(a.w1)),
        w2(expert_matrices_of(a.w2)) {
    const Defaults defaults = defaults_of(layer.activation);
    first.dtype = first.out_dtype = layer.dtype;
    first.a = x.data;
    first.a_stride = x.stride;
    first.rows = layer.tokens * layer.topk;
    first.n = first.out_stride = layer.intermediate;
    first.k = layer.hidden;
    first.experts = layer.experts;
    first.b = w1.data;
    first.b_expert_stride = w1.expert_stride;
    first.b_row_stride = w1.row_stride;
    first.b_col_stride = w1.col_stride;
    first.bias = floats_of(b1);
    first.activation = {.kind = layer.activation,
                        .alpha = value_or(a.alpha, defaults.alpha),
                        .beta = value_or(a.beta, defaults.beta),
                        .limit = value_or(a.limit, defaults.limit),
                        .expert_alpha = data_of(alphas),
                        .expert_beta = data_of(betas),
                        .expert_limit = data_of(limits)};
    first.gate_layout = layer.gate_layout;
    first.ids = {ids.const_data_ptr(), layer.ids_are_int64, layer.experts, a.expert_offset};
    first.topk = static_cast<int>(layer.topk);
    first.in_order = a.batch_invariant;

    second = first;
    second.a = nullptr;
    second.a_stride = layer.intermediate;
    second.n = second.out_stride = layer.hidden;
    second.k = layer.intermediate;
    second.is_second = true;
    second.b = w2.data;
    second.b_expert_stride = w2.expert_stride;
    second.b_row_stride = w2.row_stride;
    second.b_col_stride = w2.col_stride;
    second.bias = floats_of(b2);
    second.activation = {};
    second.gate_layout = GateLayout::kGateUp;
  }

  const Layer& layer;
  Tensor ids;
  std::optional<Tensor> weights, b1, b2, alphas, betas, limits;
  Rows x;
  ExpertMatrices w1, w2;
  // Of all tokens, but for what lies in the workspace.
  GroupedGemm first{}, second{};
};

// Arrays behind one another, each from a multiple of kAlignment on.
class Arrays {
 public:
  static constexpr int64_t kAlignment = 16;
  static int64_t aligned(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  int64_t add(int64_t bytes) {
    const int64_t begin = aligned(bytes_);
    bytes_ = begin + bytes;
    return begin;
  }
  int64_t bytes() const { return bytes_; }
  void use(char* memory) { memory_ = memory; }
  template <typename T>
  T* at(int64_t begin) const {
    return reinterpret_cast<T*>(memory_ + begin);
  }

 private:
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
};

// What the work on a chunk takes. `routing`: what the sort makes for the products, if there is one.
struct Workspace {
  Workspace(const Place& place, const Backend& backend, const Layer& layer, int64_t tokens,
            bool sorted, bool may_split)
      : sorted(sorted) {
    const int64_t slots = tokens * layer.topk, element = element_size(layer.dtype);
    h1_at = rows.add(element * slots * layer.intermediate);
    if (!sorted) return;
    tiles = place.plan_row_tiles(slots, layer.experts, layer.intermediate, layer.hidden, may_split,
                                 backend.wgmma);
    tiles_at = routing.add(tiles.bytes());
    sorted_slots_at = routing.add(4 * slots);
    source_rows_at = routing.add(4 * slots);
    row_weights_at = routing.add(4 * slots);
    progress_at = routing.add(tiles.overlap ? 4 * slots : 0);
    expert_offsets_at = routing.add(4 * (layer.experts + 1));
    counts_at = routing.add(4 * place.sort_by_expert_counts(slots, layer.experts));
    h2_dtype = tiles.split_log2 > 0 ? DType::kFloat32 : layer.dtype;
    h2_at = rows.add((static_cast<int64_t>(element_size(h2_dtype)) << tiles.split_log2) * slots *
                     layer.hidden);
  }

  bool sorted;
  RowTiles tiles;
  DType h2_dtype{};
  Arrays routing, rows;
  int64_t tiles_at = 0, sorted_slots_at = 0, source_rows_at = 0, row_weights_at = 0,
          progress_at = 0, expert_offsets_at = 0, counts_at = 0, h1_at, h2_at = 0;
};

// The layer for tokens first ... first + tokens.
void run_chunk(const Inputs& in, const Place& place, const Backend& backend,
               const Workspace& workspace, int64_t first_token, int64_t tokens, const Tensor& out) {
  const Layer& layer = in.layer;
  const int64_t slots = tokens * layer.topk, first_slot = first_token * layer.topk;
  const DType out_dtype = dtype_of(out);
  const auto offset = [](const void* data, int64_t bytes) {
    return static_cast<const char*>(data) + bytes;
  };
  Floats weights = floats_of(in.weights);
  weights.data = offset(weights.data, first_slot * element_size(weights.dtype));
  void* const out_rows = static_cast<char*>(out.mutable_data_ptr()) +
                         first_token * layer.hidden * static_cast<int64_t>(element_size(out_dtype));
  const Arrays &routing = workspace.routing, &rows = workspace.rows;

  GroupedGemm first = in.first;
  first.a = offset(first.a, first_token * first.a_stride * element_size(layer.dtype));
  first.rows = slots;
  first.source_count = tokens;
  first.ids.data = offset(first.ids.data, first_slot * (layer.ids_are_int64 ? 8 : 4));
  first.out = rows.at<void>(workspace.h1_at);
  first.keep_out = place.l2_keeps(element_size(layer.dtype) * slots * layer.intermediate);

  GroupedGemm second = in.second;
  second.a = first.out;
  second.rows = second.source_count = slots;
  second.ids = first.ids;

  if (!workspace.sorted) {
    second.row_weights = weights;
    second.out = out_rows;
    second.out_dtype = out_dtype;
    place.grouped_gemv(first);
    place.grouped_gemv(second);
    return;
  }

  SortByExpert sort{
      .ids = first.ids,
      .slots = slots,
      .expert_offsets = routing.at<int32_t>(workspace.expert_offsets_at),
      .sorted_slots = routing.at<int32_t>(workspace.sorted_slots_at),
      .topk = first.topk,
      .topk_weights = weights,
      .source_rows = routing.at<int32_t>(workspace.source_rows_at),
      .row_weights = routing.at<float>(workspace.row_weights_at),
      .counts = routing.at<int32_t>(workspace.counts_at),
      .row_tiles = workspace.tiles,
  };
  sort.row_tiles.head = routing.at<RowTilesHead>(workspace.tiles_at);
  if (sort.row_tiles.overlap) {
    sort.row_tiles.progress = routing.at<int32_t>(workspace.progress_at);
  }
  place.sort_by_expert(sort);

  first.expert_offsets = second.expert_offsets = sort.expert_offsets;
  first.row_tiles = second.row_tiles = sort.row_tiles;
  first.source_rows = sort.source_rows;
  backend.grouped_gemm(first, place.stream());

  second.split_log2 = workspace.tiles.split_log2;
  second.k >>= second.split_log2;
  second.out_stride <<= second.split_log2;
  second.out_rows = sort.sorted_slots;
  second.row_weights = Floats{sort.row_weights};
  second.out = rows.at<void>(workspace.h2_at);
  second.out_dtype = workspace.h2_dtype;
  second.keep_out =
      place.l2_keeps(element_size(second.out_dtype) * slots * layer.hidden << second.split_log2);
  backend.grouped_gemm(second, place.stream());

  const Combine sum{
      .dtype = second.out_dtype,
      .out_dtype = out_dtype,
      .expert_out = second.out,
      .expert_out_stride = layer.hidden,
      .split_log2 = second.split_log2,
      .tokens = tokens,
      .hidden = layer.hidden,
      .rows = slots,
      .topk = first.topk << second.split_log2,
      .weights = {},
      .ids = first.ids,
      .sorted_slots = nullptr,
      .expert_offsets = nullptr,
      .experts = layer.experts,
      .slot_rows = nullptr,
      .only_rows_are_new = true,
      .out = out_rows,
  };
  place.combine(sum);
}

// Whether `out` overlaps an input of the second product that isn't copied.
bool overlaps_second(const Arguments& a, const Tensor& out) {
  return overlap(out, a.w2) || overlap(out, a.topk_weights) || (a.b2 && overlap(out, *a.b2));
}
// The others.
bool overlaps_another(const Arguments& a, const Tensor& out) {
  for (const auto* input : {&a.b1, &a.alpha.per_expert, &a.beta.per_expert, &a.limit.per_expert}) {
    if (*input && overlap(out, **input)) return true;
  }
  return overlap(out, a.x) || overlap(out, a.w1) || overlap(out, a.topk_ids);
}

// `out` is contiguous. With tokens, and checked arguments.
void run(const Arguments& a, const Layer& layer, const Place& place, const Backend& backend,
         const Tensor& out) {
  // Equal chunks, as few as keep the workspace under kMost. One only where `out` overlaps an input:
  // the first chunk's output would be read as the second's input.
  constexpr int64_t kMost = int64_t{3} << 30;
  const bool apart = !overlaps_another(a, out);
  const Inputs in(a, layer, out);
  const bool sorted = !backend.takes_few_rows_otherwise || !place.grouped_gemv_suits(in.first) ||
                      !place.grouped_gemv_suits(in.second);
  // A product whose k is split adds in an order of its own.
  const bool may_split = !a.batch_invariant && backend.takes_few_rows_otherwise &&
                         place.reads_whole_vectors(in.second);
  Workspace workspace(place, backend, layer, layer.tokens, sorted, may_split);
  const int64_t chunks =
      apart ? (workspace.rows.bytes() + workspace.routing.bytes() + kMost - 1) / kMost : 1;
  const int64_t step = (layer.tokens + chunks - 1) / chunks;
  if (step < layer.tokens) workspace = Workspace(place, backend, layer, step, sorted, may_split);

  // The routing lies in the chunk's rows of `out` where even the last chunk has room for it.
  const int64_t rows_bytes = workspace.rows.bytes();
  const int64_t routing_bytes = workspace.routing.bytes();
  const int64_t out_row_bytes = layer.hidden * static_cast<int64_t>(element_size(dtype_of(out)));
  const int64_t last = (layer.tokens - 1) % step + 1;
  const bool in_out =
      apart && Arrays::aligned(routing_bytes) <= last * out_row_bytes - Arrays::kAlignment;
  const int64_t end_of_rows = Arrays::aligned(rows_bytes);
  const Tensor memory =
      empty(a.x, {in_out ? rows_bytes : end_of_rows + routing_bytes}, ScalarType::Byte);
  char* const begin = static_cast<char*>(memory.mutable_data_ptr());
  workspace.rows.use(begin);
  workspace.routing.use(begin + end_of_rows);
  for (int64_t first = 0; first < layer.tokens; first += step) {
    const int64_t tokens = step < layer.tokens - first ? step : layer.tokens - first;
    if (in_out) {
      const auto at = reinterpret_cast<int64_t>(out.mutable_data_ptr()) + first * out_row_bytes;
      workspace.routing.use(reinterpret_cast<char*>(Arrays::aligned(at)));
    }
    run_chunk(in, place, backend, workspace, first, tokens, out);
  }
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
    check.that(out.numel() == 0 || lie_apart(out), "out has strides [", out.stride(0), ", ",
               out.stride(1), "] for shape ", shape_of(out),
               ", expected rows, or columns, that don't overlap");
    // grouped_gemv writes it while other blocks still read.
    if (out.is_contiguous() && !overlaps_second(arguments, out)) return out;
    return empty(out, {layer.tokens, layer.hidden}, scalar_type_of(dtype));
  });
  // A tensor copied to itself is left alone, but autograd is told that it was written.
  torch::stable::copy_(out, written);
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
