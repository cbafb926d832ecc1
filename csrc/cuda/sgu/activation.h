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

// relu passes NaN on.
__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return x <= 0.f ? 0.f : x;
    case Activation::kGelu:
      return x * normal_cdf(x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kTanh:
      return hyperbolic_tangent(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

__device__ __forceinline__ float slope(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return x > 0.f ? 1.f : 0.f;
    case Activation::kGelu:
      return normal_cdf(x) + x * 0.39894228040143268f * ptx::exp2(x * x * -0.72134752044448170f);
    case Activation::kSilu: {
      const float s = sigmoid(x);
      return s * (1.f + x * (1.f - s));
    }
    case Activation::kTanh: {
      const float t = hyperbolic_tangent(x);
      return 1.f - t * t;
    }
    case Activation::kSigmoid: {
      const float s = sigmoid(x);
      return s * (1.f - s);
    }
    default:
      return 1.f;
  }
}

}  // namespace hierkernels::cuda
