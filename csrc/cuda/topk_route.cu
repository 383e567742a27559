// topk_route: scores -> groups -> the K best experts.
//
// Schedule: a warp takes a token. Its lanes read the logits for the maximum and the sum of the
// softmax, then turn every choice (score + bias) into a key, an integer in the order of the floats,
// in shared memory (global where a row of keys doesn't fit). K times the warp looks for the largest
// (key, lower id first) below the last one. Every sum has a fixed order.
#include <algorithm>

#include "activation.h"
#include "block_scan.cuh"
#include "device.h"
#include "floats.cuh"
#include "launch.h"
#include "primitives.h"

namespace simple_moe::cuda {
namespace {

constexpr int kMaxWarps = 4;
// Keys below every number's.
constexpr uint32_t kExcludedKey = 0, kNanKey = 1;

// Larger floats have larger keys; -0 ties with +0; NaN lies below -inf.
__device__ __forceinline__ uint32_t key_of(float value) {
  if (value != value) return kNanKey;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// NaN gives -inf.
__device__ __forceinline__ float value_of(uint32_t key) {
  if (key == kNanKey) return -INFINITY;
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// No two are equal, so the order of the best is one.
__device__ __forceinline__ uint64_t rank_of(uint32_t key, int64_t id) {
  return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(id);
}

// The largest rank below `limit` of keys[0 ... count), in every lane.
__device__ uint64_t largest_below(uint64_t limit, const uint32_t* keys, int64_t count) {
  uint64_t best = 0;
  for (int64_t i = threadIdx.x % 32; i < count; i += 32) {
    const uint64_t rank = rank_of(keys[i], i);
    if (rank < limit && rank > best) best = rank;
  }
  return warp_reduce(best, [](auto a, auto b) { return max(a, b); });
}

// One token's scores, from its logits.
template <typename T>
class Scores {
 public:
  __device__ Scores(const TopkRoute& p, int64_t token)
      : logits_(static_cast<const T*>(p.logits) + token * p.experts), sigmoid_(p.sigmoid) {
    if (sigmoid_) return;
    // NaN is left out of the maximum and of the sum: one bad logit spoils no other.
    const int lane = threadIdx.x % 32;
    for (int64_t e = lane; e < p.experts; e += 32) {
      const float logit = ptx::to_float(logits_[e]);
      if (logit > largest_) largest_ = logit;
    }
    largest_ = warp_reduce(largest_, [](auto a, auto b) { return max(a, b); });
    for (int64_t e = lane; e < p.experts; e += 32) {
      const float term = expf(ptx::to_float(logits_[e]) - largest_);
      if (term == term) sum_ += term;
    }
    sum_ = warp_reduce(sum_, [](float a, float b) { return a + b; });
  }

  __device__ float operator()(int64_t expert) const {
    const float logit = ptx::to_float(logits_[expert]);
    return sigmoid_ ? sigmoid(logit) : expf(logit - largest_) / sum_;
  }

 private:
  const T* logits_;
  bool sigmoid_;
  float largest_ = -INFINITY;
  float sum_ = 0;
};

// The sum of the two best choices, in every lane.
__device__ float group_score(const uint32_t* keys, int64_t size) {
  float best = -INFINITY, second = -INFINITY;
  for (int64_t i = threadIdx.x % 32; i < size; i += 32) {
    const float value = value_of(keys[i]);
    second = fmaxf(second, fminf(best, value));
    best = fmaxf(best, value);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other_best = __shfl_xor_sync(0xffffffffu, best, distance);
    const float other_second = __shfl_xor_sync(0xffffffffu, second, distance);
    second = fmaxf(fminf(best, other_best), fmaxf(second, other_second));
    best = fmaxf(best, other_best);
  }
  return size > 1 ? best + second : best;
}

// Excludes the experts of all but the best groups.
__device__ void choose_groups(const TopkRoute& p, uint32_t* keys, uint32_t* group_keys) {
  const int lane = threadIdx.x % 32;
  const int64_t size = p.experts / p.num_groups;
  for (int g = 0; g < p.num_groups; ++g) {
    const float score = group_score(keys + g * size, size);
    if (lane == 0) group_keys[g] = key_of(score);
  }
  __syncwarp();
  uint64_t last_chosen = ~uint64_t(0);
  for (int i = 0; i < p.topk_groups; ++i)
    last_chosen = largest_below(last_chosen, group_keys, p.num_groups);
  for (int64_t e = lane; e < p.experts; e += 32) {
    const int64_t g = e / size;
    if (rank_of(group_keys[g], g) < last_chosen) keys[e] = kExcludedKey;
  }
  __syncwarp();
}

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps) topk_route_kernel(const TopkRoute p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  if (token >= p.tokens) return;  // No barrier of the block follows.
  const int64_t row = p.experts + p.num_groups;
  uint32_t* const keys =
      p.keys ? p.keys + token * row : reinterpret_cast<uint32_t*>(ptx::dynamic_smem()) + warp * row;

  const Scores<T> scores(p, token);
  for (int64_t e = lane; e < p.experts; e += 32)
    keys[e] = key_of(p.bias.data ? scores(e) + load_float(p.bias, e) : scores(e));
  __syncwarp();
  if (p.num_groups > 1) choose_groups(p, keys, keys + p.experts);

  float* const weights = p.weights + token * p.topk;
  int32_t* const ids = p.ids + token * p.topk;
  uint64_t rank = ~uint64_t(0);
  float sum = 0;
  for (int k = 0; k < p.topk; ++k) {
    rank = largest_below(rank, keys, p.experts);
    const auto id = static_cast<int32_t>(~static_cast<uint32_t>(rank));
    const float weight = rank >> 32 == kNanKey ? 0.0f : scores(id);
    sum += weight;
    if (lane == k % 32) ids[k] = id, weights[k] = weight;
  }
  for (int k = lane; k < p.topk; k += 32)  // The lane that wrote it.
    weights[k] = (p.renormalize && sum > 0 ? weights[k] / sum : weights[k]) * p.scaling;
}

size_t smem_of_warp(const TopkRoute& p) {
  return sizeof(uint32_t) * static_cast<size_t>(p.experts + p.num_groups);
}

}  // namespace

bool topk_route_needs_keys(const TopkRoute& p) {
  return smem_of_warp(p) > device_info().smem_per_block;
}

void topk_route(const TopkRoute& p, cudaStream_t stream) {
  // Several blocks are to fit on one SM.
  const int64_t fit = static_cast<int64_t>(device_info().smem_per_block / 4 / smem_of_warp(p));
  const int64_t warps = p.keys ? kMaxWarps : std::clamp<int64_t>(fit, 1, kMaxWarps);
  const size_t smem = p.keys ? 0 : smem_of_warp(p) * static_cast<size_t>(warps);
  with_type(p.dtype, [&](auto type) {
    launch(topk_route_kernel<decltype(type)>, (p.tokens + warps - 1) / warps,
           static_cast<int>(32 * warps), smem, stream, p);
  });
}

}  // namespace simple_moe::cuda
