// The activations and their derivatives, of vectors.
#pragma once
#include "../simd.h"
#include "sgu.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class V>
HK_INLINE V sigmoid(V x) {
  using F = decltype(+V{}[0]);
  return F(1) / (F(1) + exp2(x * F(-kLog2E)));
}

// The standard normal distribution, given its density times sqrt(2 pi), exp(-x^2 / 2): Abramowitz and Stegun 7.1.26,
// absolute error 8e-8.
HK_INLINE VecF normal_cdf(VecF x, VecF density) {
  constexpr float kTail[] = {0.0f, 0.127414796f, -0.142248368f, 0.7107068705f, -0.7265760135f, 0.5307027145f};
  const VecF magnitude = x < 0.0f ? -x : x;
  const VecF t = 1.0f / fma(magnitude, set1(0.3275911f * 0.70710678f), set1(1.0f));
  const VecF tail = polynomial<float>(kTail, t) * density;
  return x < 0.0f ? tail : 1.0f - tail;
}
HK_INLINE VecD normal_cdf(VecD x, VecD) {
  VecD y;
  for (int i = 0; i < kWidth<double>; ++i) y[i] = 0.5 * ::erfc(-0.70710678118654752440 * x[i]);
  return y;
}

// value = act(x), slope = act'(x).
template <Activation A, class V>
HK_INLINE void activate(V x, V& value, V& slope) {
  using F = decltype(+V{}[0]);
  const V one = set1(F(1));
  if constexpr (A == Activation::kNone) {
    value = x;
    slope = one;
  } else if constexpr (A == Activation::kRelu) {
    value = max(V{}, x);
    slope = x > F(0) ? one : V{};
  } else if constexpr (A == Activation::kGelu) {
    const V density = exp2(x * x * F(-0.5 * kLog2E));
    const V cdf = normal_cdf(x, density);
    value = x * cdf;
    slope = fma(x * F(0.39894228040143267794), density, cdf);
  } else if constexpr (A == Activation::kSilu) {
    const V s = sigmoid(x);
    value = x * s;
    slope = s * fma(x, one - s, one);
  } else if constexpr (A == Activation::kTanh) {
    value = tanh(x);
    slope = one - value * value;
  } else {
    value = sigmoid(x);
    slope = value * (one - value);
  }
}

// body.template operator()<A>() for the activation a.
template <class Body>
HK_INLINE void with_activation(Activation a, Body body) {
  switch (a) {
    case Activation::kRelu:
      return body.template operator()<Activation::kRelu>();
    case Activation::kGelu:
      return body.template operator()<Activation::kGelu>();
    case Activation::kSilu:
      return body.template operator()<Activation::kSilu>();
    case Activation::kTanh:
      return body.template operator()<Activation::kTanh>();
    case Activation::kSigmoid:
      return body.template operator()<Activation::kSigmoid>();
    default:
      return body.template operator()<Activation::kNone>();
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
