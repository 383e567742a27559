// The activations, written once for the CPU kernels and the CUDA epilogues.
//
// NaN goes through every one as torch's own clamp and relu let it: a comparison keeps it where
// fminf would drop it. Nothing here may be contracted to an fma (the build says -fmad=false), so
// that every kernel rounds alike.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "params.h"

namespace simple_moe {

SIMPLE_MOE_HOST_DEVICE float at_most(float x, float limit) { return x > limit ? limit : x; }
SIMPLE_MOE_HOST_DEVICE float at_least(float x, float limit) { return x < limit ? limit : x; }
SIMPLE_MOE_HOST_DEVICE float clamp_both(float x, float limit) {
  return at_least(at_most(x, limit), -limit);
}
// Of a y of 1 or more. Within 2 ulp on a GPU, in two instructions; zero for a y past 2^126, which
// only a vanishing sigmoid has.
SIMPLE_MOE_HOST_DEVICE float quotient(float x, float y) {
#ifdef __CUDA_ARCH__
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(y));
  return x * reciprocal;
#else
  return x / y;
#endif
}
// e^x. On a GPU in two instructions, of which the first rounds: by reckoning within 1.3 |x| + 3
// ulp; zero below -87.3. On the CPU within 2 ulp, in steps that the compiler makes vector
// instructions of, which it does of no call; below -87 it stays at e^-87, and it is infinite
// from 88.4 up.
SIMPLE_MOE_HOST_DEVICE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
#else
  x = at_least(at_most(x, 88.7f), -87.0f);
  // e^x = 2^n * e^r. 1.5 * 2^23 leaves n, rounded, in the lowest bits of the sum.
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p =
      ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) *
           r +
       1.6666665459e-1f) *
          r +
      0.5f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127) << 23);
  return power * (p * r * r + r + 1.0f);
#endif
}
SIMPLE_MOE_HOST_DEVICE float sigmoid(float x) { return quotient(1.0f, 1.0f + exp_of(-x)); }
SIMPLE_MOE_HOST_DEVICE float silu(float x) { return quotient(x, 1.0f + exp_of(-x)); }
SIMPLE_MOE_HOST_DEVICE float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}
SIMPLE_MOE_HOST_DEVICE float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
SIMPLE_MOE_HOST_DEVICE float relu(float x) { return at_least(x, 0.0f); }

// alpha, beta and limit of one expert.
struct ActivationScalars {
  float alpha, beta, limit;
};

SIMPLE_MOE_HOST_DEVICE ActivationScalars scalars_of(const ActivationParams& p, int64_t expert) {
  return {p.expert_alpha ? p.expert_alpha[expert] : p.alpha,
          p.expert_beta ? p.expert_beta[expert] : p.beta,
          p.expert_limit ? p.expert_limit[expert] : p.limit};
}

// Of kCount values at once, so that the switch is taken once and not per element.
#ifdef __CUDA_ARCH__
#define SIMPLE_MOE_EACH _Pragma("unroll") for (int i = 0; i < kCount; ++i)
#else
#define SIMPLE_MOE_EACH for (int i = 0; i < kCount; ++i)
#endif

// The gated ones: the result replaces `gate`.
template <int kCount>
SIMPLE_MOE_HOST_DEVICE void activate_gated(Activation kind, const ActivationScalars& s, float* gate,
                                           const float* up) {
  switch (kind) {
    case Activation::kSwiglu:
      SIMPLE_MOE_EACH gate[i] = silu(gate[i]) * up[i];
      break;
    case Activation::kGeglu:
      SIMPLE_MOE_EACH gate[i] = gelu(gate[i]) * up[i];
      break;
    case Activation::kGegluTanh:
      SIMPLE_MOE_EACH gate[i] = gelu_tanh(gate[i]) * up[i];
      break;
    case Activation::kReglu:
      SIMPLE_MOE_EACH gate[i] = relu(gate[i]) * up[i];
      break;
    case Activation::kSwigluOai:
      SIMPLE_MOE_EACH {
        const float g = at_most(gate[i], s.limit);
        gate[i] = g * sigmoid(s.alpha * g) * (clamp_both(up[i], s.limit) + s.beta);
      }
      break;
    case Activation::kSwigluStep:
      SIMPLE_MOE_EACH gate[i] = at_most(silu(gate[i]), s.limit) * clamp_both(up[i], s.limit);
      break;
    case Activation::kSitu:
      SIMPLE_MOE_EACH gate[i] =
          s.beta * tanhf(gate[i] / s.beta) * sigmoid(gate[i]) * (s.limit * tanhf(up[i] / s.limit));
      break;
    default:
      break;
  }
}

// The ungated ones, in place.
template <int kCount>
SIMPLE_MOE_HOST_DEVICE void activate(Activation kind, float* x) {
  switch (kind) {
    case Activation::kSilu:
      SIMPLE_MOE_EACH x[i] = silu(x[i]);
      break;
    case Activation::kGelu:
      SIMPLE_MOE_EACH x[i] = gelu(x[i]);
      break;
    case Activation::kGeluTanh:
      SIMPLE_MOE_EACH x[i] = gelu_tanh(x[i]);
      break;
    case Activation::kRelu:
      SIMPLE_MOE_EACH x[i] = relu(x[i]);
      break;
    case Activation::kRelu2:
      SIMPLE_MOE_EACH x[i] = relu(x[i]) * relu(x[i]);
      break;
    default:
      break;
  }
}
#undef SIMPLE_MOE_EACH

}  // namespace simple_moe
