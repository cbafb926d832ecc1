// The activations and their derivatives, of float32.
#pragma once
#include "../../common/sgu_params.h"
#include "../common/ptx.h"

namespace hierkernels::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + ptx::exp2(x * -1.4426950408889634f)); }

__device__ __forceinline__ float normal_cdf(float x) { return 0.5f + 0.5f * erff(x * 0.70710678118654752f); }

// (1 - e) / (1 + e) with e = exp(-2 |x|); below 1/4, where that cancels, the Taylor series to x^9.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  const float size = fabsf(x), e = ptx::exp2(size * -2.8853900817779268f), square = x * x;
  const float large = (1.f - e) / (1.f + e);
  float series = 2.1869488536155203e-2f;
  series = series * square - 5.3968253968253968e-2f;
  series = series * square + 1.3333333333333333e-1f;
  series = series * square - 3.3333333333333333e-1f;
  return size < 0.25f ? x + x * square * series : copysignf(large, x);
}

// change(x) for each.
template <int kCount, class Change>
__device__ __forceinline__ void each(float (&x)[kCount], Change change) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = change(x[i]);
}

// x = act(x); relu passes NaN on.
template <int kCount>
__device__ __forceinline__ void activate(Activation activation, float (&x)[kCount]) {
  switch (activation) {
    case Activation::kRelu:
      return each(x, [](float v) { return v <= 0.f ? 0.f : v; });
    case Activation::kGelu:
      return each(x, [](float v) { return v * normal_cdf(v); });
    case Activation::kSilu:
      return each(x, [](float v) { return v * sigmoid(v); });
    case Activation::kTanh:
      return each(x, [](float v) { return hyperbolic_tangent(v); });
    case Activation::kSigmoid:
      return each(x, [](float v) { return sigmoid(v); });
    default:
      return;
  }
}

// x = act'(x).
template <int kCount>
__device__ __forceinline__ void slope(Activation activation, float (&x)[kCount]) {
  switch (activation) {
    case Activation::kRelu:
      return each(x, [](float v) { return v > 0.f ? 1.f : 0.f; });
    case Activation::kGelu:
      return each(x, [](float v) {
        return normal_cdf(v) + v * 0.39894228040143268f * ptx::exp2(v * v * -0.72134752044448170f);
      });
    case Activation::kSilu:
      return each(x, [](float v) {
        const float s = sigmoid(v);
        return s * (1.f + v * (1.f - s));
      });
    case Activation::kTanh:
      return each(x, [](float v) {
        const float t = hyperbolic_tangent(v);
        return 1.f - t * t;
      });
    case Activation::kSigmoid:
      return each(x, [](float v) {
        const float s = sigmoid(v);
        return s * (1.f - s);
      });
    default:
      return each(x, [](float) { return 1.f; });
  }
}

}  // namespace hierkernels::cuda
