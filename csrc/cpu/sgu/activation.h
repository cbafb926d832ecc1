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
    gelu(x, value, slope);
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
