// topk_route on the CPU: scores -> groups -> the K best experts, a token at a time.
//
// An expert's rank is one integer: its choice's order in the high half, its id, counted down, in
// the low half. No two are equal, so any selection algorithm gives the one right order.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "activation.h"
#include "common.h"
#include "primitives.h"

namespace simple_moe::cpu {
namespace {

constexpr uint32_t kNanOrder = 0;

// Larger floats have larger orders; -0 ties with +0; NaN lies below -inf.
uint32_t order_of(float value) {
  if (std::isnan(value)) return kNanOrder;
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

uint64_t rank_of(float value, int64_t id) {
  return static_cast<uint64_t>(order_of(value)) << 32 | ~static_cast<uint32_t>(id);
}

int32_t id_of(uint64_t rank) { return static_cast<int32_t>(~static_cast<uint32_t>(rank)); }

bool is_nan_rank(uint64_t rank) { return rank >> 32 == kNanOrder; }

// The `count` largest come first, in descending order.
void select_largest(std::vector<uint64_t>& ranks, int64_t count) {
  const auto end = ranks.begin() + std::min<int64_t>(count, static_cast<int64_t>(ranks.size()));
  std::partial_sort(ranks.begin(), end, ranks.end(), std::greater<>());
}

class Router {
 public:
  explicit Router(const TopkRoute& p)
      : p_(p), group_size_(p.experts / p.num_groups), scores_(p.experts), choices_(p.experts) {}

  void route(int64_t token) {
    with_type(p_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* logits = static_cast<const T*>(p_.logits) + token * p_.experts;
      std::copy(logits, logits + p_.experts, scores_.begin());
    });
    if (p_.sigmoid) {
      apply_sigmoid();
    } else {
      apply_softmax();
    }
    for (int64_t e = 0; e < p_.experts; ++e) {
      choices_[e] = p_.bias.data ? scores_[e] + load(p_.bias, e) : scores_[e];
    }
    rank_experts();
    select_largest(ranks_, p_.topk);
    write(p_.weights + token * p_.topk, p_.ids + token * p_.topk);
  }

 private:
  void apply_sigmoid() {
    for (float& s : scores_) s = sigmoid(s);
  }

  // NaN is left out of the maximum and of the sum: one bad logit spoils no other.
  void apply_softmax() {
    float largest = -std::numeric_limits<float>::infinity();
    for (float s : scores_) largest = s > largest ? s : largest;
    float sum = 0;
    for (float& s : scores_) {
      s = expf(s - largest);
      if (!std::isnan(s)) sum += s;
    }
    for (float& s : scores_) s /= sum;
  }

  // Fills ranks_ with the experts that may be chosen.
  void rank_experts() {
    ranks_.clear();
    if (p_.num_groups <= 1) {
      for (int64_t e = 0; e < p_.experts; ++e) ranks_.push_back(rank_of(choices_[e], e));
      return;
    }
    groups_.clear();
    for (int64_t g = 0; g < p_.num_groups; ++g) groups_.push_back(rank_of(group_score(g), g));
    select_largest(groups_, p_.topk_groups);
    for (int64_t i = 0; i < std::min(p_.topk_groups, p_.num_groups); ++i) {
      const int64_t first = id_of(groups_[i]) * group_size_;
      for (int64_t e = first; e < first + group_size_; ++e) {
        ranks_.push_back(rank_of(choices_[e], e));
      }
    }
  }

  // The sum of the group's two best choices.
  float group_score(int64_t group) const {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    const float* choices = choices_.data() + group * group_size_;
    float best = kLowest, second = kLowest;
    for (int64_t i = 0; i < group_size_; ++i) {
      if (choices[i] > best) {
        second = best;
        best = choices[i];
      } else if (choices[i] > second) {
        second = choices[i];
      }
    }
    return group_size_ > 1 ? best + second : best;
  }

  void write(float* weights, int32_t* ids) const {
    float sum = 0;
    for (int k = 0; k < p_.topk; ++k) {
      ids[k] = id_of(ranks_[k]);
      weights[k] = is_nan_rank(ranks_[k]) ? 0.0f : scores_[ids[k]];
      sum += weights[k];
    }
    for (int k = 0; k < p_.topk; ++k) {
      if (p_.renormalize && sum > 0) weights[k] /= sum;
      weights[k] *= p_.scaling;
    }
  }

  const TopkRoute& p_;
  int64_t group_size_;
  std::vector<float> scores_, choices_;
  std::vector<uint64_t> ranks_, groups_;
};

}  // namespace

void topk_route(const TopkRoute& p) {
  const int64_t grain = grain_of(8 * p.experts);
  torch::stable::parallel_for(0, p.tokens, grain, [&](int64_t begin, int64_t end) {
    Router router(p);
    for (int64_t token = begin; token < end; ++token) router.route(token);
  });
}

}  // namespace simple_moe::cpu
