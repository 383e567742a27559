// One parameter struct per primitive: filled once in a binding, passed down whole.
// Plain C++, no torch: the bindings, the CPU kernels, the CUDA kernels and the emulator share it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define SIMPLE_MOE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SIMPLE_MOE_HOST_DEVICE inline
#endif

namespace simple_moe {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

inline size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether rows of this dtype, so many elements apart, can be read and written 16 bytes at a time.
inline bool rows_are_aligned(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         stride * static_cast<int64_t>(element_size(dtype)) % 16 == 0;
}

// A tensor whose dtype is only known at run time (a bias, the routing weights). Null: not there.
struct Floats {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

enum class Activation : int {
  // Gated: two branches, gate and up, joined to one.
  kSwiglu,
  kGeglu,
  kGegluTanh,
  kReglu,
  kSwigluOai,
  kSwigluStep,
  kSitu,
  // Ungated.
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kRelu2,
  kIdentity,
};

SIMPLE_MOE_HOST_DEVICE bool is_gated(Activation activation) {
  return activation <= Activation::kSitu;
}

// How the two branches lie in w1's rows.
enum class GateLayout : int { kGateUp, kUpGate, kInterleaved };

// alpha, beta, limit: one value for all experts, or a float32 [E] where the pointer is set.
struct ActivationParams {
  Activation kind = Activation::kIdentity;
  float alpha = 0, beta = 0, limit = 0;
  const float* expert_alpha = nullptr;
  const float* expert_beta = nullptr;
  const float* expert_limit = nullptr;
};

// Scores -> the K best experts of each token. SPEC of the order: score + bias descending, ties to
// the lower id, NaN last.
struct TopkRoute {
  const void* logits;  // [tokens, experts], contiguous
  DType dtype;
  Floats bias;  // [experts] or null
  int64_t tokens, experts;
  int topk;
  bool sigmoid, renormalize;
  int num_groups, topk_groups;
  float scaling;
  float* weights;  // [tokens, topk]
  int32_t* ids;    // [tokens, topk]
  uint32_t* keys;  // scratch [tokens, experts + num_groups] where shared memory is too small
};

// The experts of the slots, as the caller numbers them. Those held here are the `experts` from
// `offset` on.
struct TopkIds {
  const void* data = nullptr;  // [slots], contiguous
  bool are_int64 = false;
  int64_t experts = 0, offset = 0;
};

// A slot's expert, numbered as those held here; `experts` where it isn't. Compared before the
// subtraction, which might overflow, and without a branch, so that a GPU reads several ids at once.
SIMPLE_MOE_HOST_DEVICE int64_t local_expert(const TopkIds& ids, int64_t slot) {
  const int64_t id = ids.are_int64 ? static_cast<const int64_t*>(ids.data)[slot]
                                   : static_cast<const int32_t*>(ids.data)[slot];
  const uint64_t local = static_cast<uint64_t>(id) - static_cast<uint64_t>(ids.offset);
  const bool held = (id >= ids.offset) & (local < static_cast<uint64_t>(ids.experts));
  return held ? static_cast<int64_t>(local) : ids.experts;
}

// A row tile is up to so many neighbouring rows of one expert: what a product's tile is made of. An
// expert's rows are shared out evenly over its tiles, in units of some rows. Neighbouring tiles of
// an expert form a group, which a sweep over the columns takes at once. A tile is told by its
// group: so many rows from `begin` on, in so many tiles of which it is number `place`, of so many
// units each, and the first `longer` of one more.
struct alignas(16) RowTile {
  int32_t expert, begin, rows;
  uint8_t place, tiles, units, longer;
};

// What comes before an array of row tiles: how many follow, and how many items the blocks of a
// layer's two products have claimed beyond those that fall to them anyway.
struct alignas(16) RowTilesHead {
  int32_t count;
  uint32_t claimed[2];
};
static_assert(sizeof(RowTilesHead) == sizeof(RowTile));

// The row tiles of all experts, in order.
struct RowTiles {
  int height = 0;     // the most rows of one, whole units; 0: there are none
  int unit_log2 = 4;  // of a unit's rows
  int group = 1;      // the most tiles of a group, below 256
  int most = 0;       // how many there can be
  RowTilesHead* head = nullptr;
  // Whether a layer's second product starts on a tile when the first has written it, not when that
  // has ended. Then [rows], else null: at a tile's first row, how many columns are written.
  bool overlap = false;
  int32_t* progress = nullptr;
  int split_log2 = 0;  // of a layer's second product

  int64_t bytes() const { return (most + 1) * static_cast<int64_t>(sizeof(RowTile)); }
  SIMPLE_MOE_HOST_DEVICE RowTile* data() const { return reinterpret_cast<RowTile*>(head + 1); }
};

// A stable counting sort of the slots by local expert.
struct SortByExpert {
  TopkIds ids;
  int64_t slots;
  int32_t* expert_offsets;  // [experts + 1]
  int32_t* sorted_slots;    // [slots]
  // What a layer's products want of each slot in sorted order: its token and its routing weight.
  // Both null, or both and topk_weights not.
  int topk;
  Floats topk_weights;   // [slots]
  int32_t* source_rows;  // [slots]
  float* row_weights;    // [slots]
  int32_t* counts;       // scratch, sort_by_expert_counts() of them
  RowTiles row_tiles;    // for the products, where wanted
};

// out[out_rows[r]] = epilogue(a[source_rows[r]] @ b[e].T) for the rows r of expert e, which are
// expert_offsets[e] <= r < expert_offsets[e + 1]:
//   + bias[e], then the activation, then * row_weights[r], each where it is set.
// Other rows of out are left alone, or zeroed with `zero_other_rows`, which goes without out_rows.
struct GroupedGemm {
  DType dtype, out_dtype;
  const void* a;
  int64_t a_stride;  // elements between rows; the columns are contiguous
  int64_t rows;      // of out
  int64_t n, k;      // columns of out; length of the dot products
  // A product may be split: k is then that of a part, of 2^split_log2, whose sums are apart in out,
  // [rows, parts, n] in float32; a bias is in the first.
  int split_log2 = 0;
  int64_t experts;
  const int32_t* expert_offsets;  // [experts + 1]; malformed ones are clamped
  const int32_t* source_rows;     // [rows] or null: row r is made of a's row r
  const int32_t* out_rows;        // [rows] or null: row r goes to out's row r
  int64_t source_count;           // rows of a
  RowTiles row_tiles;             // of the expert_offsets
  // Whether `a` is what a layer's first product writes, all else having been written before that
  // one started. By grouped_gemv then the slots of a token are added up.
  bool is_second = false;
  const void* b;  // [experts, n or 2 n when gated, k]; one of the two strides is 1
  int64_t b_expert_stride, b_row_stride, b_col_stride;
  Floats bias;  // [experts, n or 2 n]
  ActivationParams activation;
  GateLayout gate_layout;
  Floats row_weights;  // [rows] or null
  void* out;           // [rows, n], contiguous rows out_stride apart
  int64_t out_stride;
  bool keep_out = false;  // A GPU is to keep `out` in L2, for it is read soon.
  bool zero_other_rows;
  // For grouped_gemv, which goes by these in the place of expert_offsets and what is made of them:
  // row r is slot r's, of the token r / topk. A first product's `a` has a row a token, as has a
  // second's `out`.
  TopkIds ids = {};
  int topk = 1;
  bool in_order = false;  // grouped_gemv is to add in the order of grouped_gemm and combine.
};

// out[e] = a[rows of e].T @ b[rows of e]: the gradient of grouped_gemm's b.
struct GroupedGemmWgrad {
  DType dtype, out_dtype;
  const void* a;  // [rows, m]
  const void* b;  // [rows, n]
  int64_t a_stride, b_stride;
  int64_t rows, m, n, experts;
  const int32_t* expert_offsets;
  void* out;  // [experts, m, n]
};

// out[t] = sum over k, ascending, of weights[t, k] * the row of slot t * topk + k, where it has
// one.
struct Combine {
  DType dtype, out_dtype;
  const void* expert_out;  // [rows, hidden], or [rows, 2^split_log2, hidden], all to be summed
  int64_t expert_out_stride;
  int split_log2 = 0;  // in the slots' order alone
  int64_t tokens, hidden, rows;
  int topk;
  Floats weights;  // [tokens, topk], or null: the rows are weighted already
  // Without expert_offsets the rows are in the slots' order, and there where the slot's expert is
  // held here.
  TopkIds ids;
  const int32_t* sorted_slots;    // [rows], with expert_offsets; null too where there are no rows
  const int32_t* expert_offsets;  // [experts + 1]
  int64_t experts;
  int32_t* slot_rows;  // scratch [tokens, topk], with expert_offsets: a slot's row, or -1
  // Whether all but expert_out was written before the kernel that writes it started.
  bool only_rows_are_new;
  void* out;  // [tokens, hidden], contiguous
};

}  // namespace simple_moe
