// Serves requests over stdin and stdout: runs one operator on the emulated GPU.
//
// A request:  <operator> <number of scalars> <number of arrays>
//             <name> <value>                                    each scalar
//             <name> <in|out> <DType or -1> <bytes> <offset>    each array
//             the bytes of all `in` arrays
// The answer: "ok" and the bytes of all `out` arrays, or "error <message>". An error of a kernel
// (out of bounds, deadlock, ...) ends the process with its story on stderr.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <memory>

#include "cuda/primitives.h"
#include "cuda/shapes.h"
#include "toys.h"

namespace simple_moe {

static DeviceInfo device;
const DeviceInfo& device_info() { return device; }

namespace {

// `offset` bytes past an aligned address, and of exactly the right size, so that ASan sees one
// element too far. NaN shows what nobody wrote, and a huge number does among integers, where -1 may
// be the right answer.
struct Array {
  std::string name;
  bool output;
  int dtype;
  size_t bytes;
  std::unique_ptr<unsigned char, void (*)(void*)> block{nullptr, std::free};
  unsigned char* data;
  std::string original;  // of an input: nobody may write it

  void allocate(size_t offset) {
    void* memory;
    if (posix_memalign(&memory, 256, offset + bytes) != 0) std::abort();
    block.reset(static_cast<unsigned char*>(memory));
    data = block.get() + offset;
    std::memset(data, dtype < 0 ? 0x7F : 0xFF, bytes);
  }
};

struct Request {
  std::map<std::string, double> scalars;
  std::vector<Array> arrays;

  template <typename T = int64_t>
  T scalar(const char* name) const {
    return static_cast<T>(scalars.at(name));
  }
  const Array* find(const char* name) const {
    for (const Array& array : arrays) {
      if (array.name == name) return &array;
    }
    return nullptr;
  }
  template <typename T = void>
  T* data(const char* name) const {
    const Array* const array = find(name);
    return array ? reinterpret_cast<T*>(array->data) : nullptr;
  }
  DType dtype(const char* name) const { return static_cast<DType>(find(name)->dtype); }
  Floats floats(const char* name) const {
    return find(name) ? Floats{data(name), dtype(name)} : Floats{};
  }
  // Memory for the operator alone, of that many 4-byte elements.
  template <typename T>
  T* scratch(int64_t elements) {
    Array& array = arrays.emplace_back("scratch", false, -1, static_cast<size_t>(elements) * 4);
    array.allocate(0);
    return reinterpret_cast<T*>(array.data);
  }
};

void topk_route(Request& r) {
  TopkRoute p{};
  p.logits = r.data("logits");
  p.dtype = r.dtype("logits");
  p.bias = r.floats("bias");
  p.tokens = r.scalar("tokens");
  p.experts = r.scalar("experts");
  p.topk = r.scalar("topk");
  p.sigmoid = r.scalar("sigmoid");
  p.renormalize = r.scalar("renormalize");
  p.num_groups = r.scalar("num_groups");
  p.topk_groups = r.scalar("topk_groups");
  p.scaling = r.scalar<float>("scaling");
  p.weights = r.data<float>("weights");
  p.ids = r.data<int32_t>("ids");
  if (cuda::topk_route_needs_keys(p)) {
    p.keys = r.scratch<uint32_t>(p.tokens * (p.experts + p.num_groups));
  }
  cuda::topk_route(p, nullptr);
}

TopkIds topk_ids(Request& r) {
  return {r.data("topk_ids"), r.scalar<bool>("ids_are_int64"), r.scalar("experts"),
          r.scalar("expert_offset")};
}

void sort_by_expert(Request& r) {
  SortByExpert p{};
  p.ids = topk_ids(r);
  p.slots = r.scalar("slots");
  p.expert_offsets = r.data<int32_t>("expert_offsets");
  p.sorted_slots = r.data<int32_t>("sorted_slots");
  p.topk = r.scalar("topk");
  p.topk_weights = r.floats("topk_weights");
  p.source_rows = r.data<int32_t>("source_rows");
  p.row_weights = r.data<float>("row_weights");
  p.row_tiles.height = r.scalar("tile_height");
  p.row_tiles.unit_log2 = r.scalar("tile_unit_log2");
  p.row_tiles.group = 2;
  p.row_tiles.head = r.data<RowTilesHead>("row_tiles");
  p.counts = r.scratch<int32_t>(cuda::sort_by_expert_counts(p.slots, p.ids.experts));
  cuda::sort_by_expert(p, nullptr);
}

void sort_by_expert_counts(Request& r) {
  const int* const slots = r.data<int>("slots");
  for (int64_t i = 0; i < r.scalar("n"); ++i) {
    r.data<int>("out")[i] = cuda::sort_by_expert_counts(slots[i], r.scalar("experts"));
  }
}

GroupedGemm product(Request& r) {
  GroupedGemm p{};
  p.dtype = r.dtype("a");
  p.out_dtype = r.dtype("out");
  p.a = r.data("a");
  p.a_stride = r.scalar("a_stride");
  p.rows = r.scalar("rows");
  p.n = r.scalar("n");
  p.k = r.scalar("k");
  p.experts = r.scalar("experts");
  p.expert_offsets = r.data<int32_t>("expert_offsets");
  p.source_rows = r.data<int32_t>("source_rows");
  p.out_rows = r.data<int32_t>("out_rows");
  p.b = r.data("b");
  p.b_expert_stride = r.scalar("b_expert_stride");
  p.b_row_stride = r.scalar("b_row_stride");
  p.b_col_stride = r.scalar("b_col_stride");
  p.bias = r.floats("bias");
  p.activation.kind = static_cast<Activation>(r.scalar("activation"));
  p.activation.alpha = r.scalar<float>("alpha");
  p.activation.beta = r.scalar<float>("beta");
  p.activation.limit = r.scalar<float>("limit");
  p.activation.expert_alpha = r.data<float>("expert_alpha");
  p.activation.expert_beta = r.data<float>("expert_beta");
  p.activation.expert_limit = r.data<float>("expert_limit");
  p.gate_layout = static_cast<GateLayout>(r.scalar("gate_layout"));
  p.row_weights = r.floats("row_weights");
  p.out = r.data("out");
  p.out_stride = r.scalar("out_stride");
  p.zero_other_rows = r.scalar("zero_other_rows");
  p.is_second = r.scalar("is_second");
  p.split_log2 = r.scalar("split_log2");
  return p;
}

void grouped_gemm(Request& r) {
  GroupedGemm p = product(r);
  if (p.rows > 0) {
    const int64_t columns = r.scalar("columns");
    p.row_tiles =
        cuda::plan_row_tiles(p.rows, p.experts, columns, columns, false, r.scalar("sm90"), device);
    p.row_tiles.head = reinterpret_cast<RowTilesHead*>(r.scratch<int32_t>(p.row_tiles.bytes() / 4));
    // Cleared for the first product; the second finds what that one left there.
    if (!p.is_second) p.row_tiles.progress = r.data<int32_t>("progress");
    cuda::row_tiles(p, nullptr);
    p.row_tiles.progress = r.data<int32_t>("progress");
  }
  r.scalar("sm90") ? cuda::grouped_gemm_sm90(p, nullptr) : cuda::grouped_gemm(p, nullptr);
}

void grouped_gemv(Request& r) {
  GroupedGemm p = product(r);
  p.ids = topk_ids(r);
  p.topk = r.scalar("topk");
  p.in_order = r.scalar("in_order");
  cuda::grouped_gemv(p, nullptr);
}

void grouped_gemm_wgrad(Request& r) {
  GroupedGemmWgrad p{};
  p.dtype = r.dtype("a");
  p.out_dtype = r.dtype("out");
  p.a = r.data("a");
  p.b = r.data("b");
  p.a_stride = r.scalar("a_stride");
  p.b_stride = r.scalar("b_stride");
  p.rows = r.scalar("rows");
  p.m = r.scalar("m");
  p.n = r.scalar("n");
  p.experts = r.scalar("experts");
  p.expert_offsets = r.data<int32_t>("expert_offsets");
  p.out = r.data("out");
  cuda::grouped_gemm_wgrad(p, nullptr);
}

void combine(Request& r) {
  Combine p{};
  p.dtype = r.dtype("expert_out");
  p.out_dtype = r.dtype("out");
  p.expert_out = r.data("expert_out");
  p.expert_out_stride = r.scalar("expert_out_stride");
  p.split_log2 = r.scalar("split_log2");
  p.tokens = r.scalar("tokens");
  p.hidden = r.scalar("hidden");
  p.rows = r.scalar("rows");
  p.topk = r.scalar("topk");
  p.weights = r.floats("weights");
  p.sorted_slots = r.data<int32_t>("sorted_slots");
  p.expert_offsets = r.data<int32_t>("expert_offsets");
  if (p.expert_offsets) p.slot_rows = r.scratch<int32_t>(p.tokens * p.topk);
  if (r.data("topk_ids")) p.ids = topk_ids(r);
  p.experts = r.scalar("experts");
  p.out = r.data("out");
  cuda::combine(p, nullptr);
}

void toy_gemm(Request& r) {
  toys::gemm(r.data<bf16>("a"), r.data<bf16>("b"), r.data<float>("out"), r.scalar("m"),
             r.scalar("n"), r.scalar("k"), r.scalar("b_is_k_by_n"));
}

void toy_scan(Request& r) { toys::scan(r.data<int>("x"), r.data<int>("out"), r.scalar("n")); }

void toy_divide(Request& r) {
  toys::divide(r.data<int>("x"), r.data<int>("out"), r.scalar("n"), r.scalar("divisor"));
}

void toy_tiles(Request& r) {
  const int64_t experts = r.scalar("experts"), rows = r.scalar("rows");
  auto* const row_tiles =
      reinterpret_cast<RowTilesHead*>(r.scratch<int32_t>(4 * (1 + rows / 64 + experts)));
  toys::tiles(r.data<int>("expert_offsets"), r.data<int>("out"), experts, rows,
              r.scalar("column_tiles"), r.scalar("group"), row_tiles);
}

const std::map<std::string, void (*)(Request&)> kOperators = {
    {"topk_route", topk_route},
    {"sort_by_expert", sort_by_expert},
    {"sort_by_expert_counts", sort_by_expert_counts},
    {"grouped_gemm", grouped_gemm},
    {"grouped_gemv", grouped_gemv},
    {"grouped_gemm_wgrad", grouped_gemm_wgrad},
    {"combine", combine},
    {"toy_gemm", toy_gemm},
    {"toy_scan", toy_scan},
    {"toy_divide", toy_divide},
    {"toy_tiles", toy_tiles},
};

void serve(const std::string& name, Request& r) {
  device = {r.scalar<int>("sm_count"),
            r.scalar<size_t>("smem_per_block"),
            r.scalar<size_t>("smem_per_sm"),
            0,
            0,
            8,
            0,
            false};
  emulator::random_bits.seed(r.scalar("seed"));
  try {
    kOperators.at(name)(r);
  } catch (const std::exception& error) {
    std::cout << "error " << error.what() << std::endl;
    return;
  }
  for (const Array& array : r.arrays) {
    const auto* const bytes = reinterpret_cast<const char*>(array.data);
    if (array.original != std::string(bytes, array.original.size())) {
      std::cout << "error the input " << array.name << " was written" << std::endl;
      return;
    }
  }
  std::cout << "ok\n";
  for (const Array& array : r.arrays) {
    if (array.output) std::cout.write(reinterpret_cast<const char*>(array.data), array.bytes);
  }
  std::cout.flush();
}

}  // namespace
}  // namespace simple_moe

int main() {
  using namespace simple_moe;
  std::ios::sync_with_stdio(false);
  std::string name;
  size_t scalars, arrays;
  while (std::cin >> name >> scalars >> arrays) {
    Request request;
    for (size_t i = 0; i < scalars; ++i) {
      std::string scalar;
      std::cin >> scalar;
      std::cin >> request.scalars[scalar];
    }
    for (size_t i = 0; i < arrays; ++i) {
      Array& array = request.arrays.emplace_back();
      std::string kind;
      size_t offset;
      std::cin >> array.name >> kind >> array.dtype >> array.bytes >> offset;
      array.output = kind == "out";
      array.allocate(offset);
    }
    std::cin.ignore();  // the newline
    for (Array& array : request.arrays) {
      if (array.output) continue;
      std::cin.read(reinterpret_cast<char*>(array.data), array.bytes);
      array.original.assign(reinterpret_cast<const char*>(array.data), array.bytes);
    }
    serve(name, request);
  }
}
