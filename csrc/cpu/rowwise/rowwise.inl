// The entry points of one instruction set: the types are chosen here.
#pragma once
#include "gelu.inl"
#include "norm.inl"
#include "rotary.inl"
#include "rowwise.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// body.template operator()<F, TX, TO>() for the types of the input and of the output: alike, or one of them float32.
template <class Body>
HK_INLINE void with_types(DType x, DType out, Body body) {
  if (x == DType::kFloat64) return body.template operator()<double, double, double>();
  if (x == DType::kBFloat16) {
    if (out == x) return body.template operator()<float, BFloat16, BFloat16>();
    return body.template operator()<float, BFloat16, float>();
  }
  if (x == DType::kFloat16) {
    if (out == x) return body.template operator()<float, Float16, Float16>();
    return body.template operator()<float, Float16, float>();
  }
  if (out == DType::kBFloat16) return body.template operator()<float, float, BFloat16>();
  if (out == DType::kFloat16) return body.template operator()<float, float, Float16>();
  return body.template operator()<float, float, float>();
}

template <class Body>
HK_INLINE void with_norm(const NormParams& p, DType out, Body body) {
  with_types(p.x.dtype, out, [&]<class F, class TX, class TO>() {
    if (p.bias)
      body(Norm<F, TX, TO, true>(p));
    else
      body(Norm<F, TX, TO, false>(p));
  });
}

}  // namespace

void norm_forward(const NormParams& p) {
  with_norm(p, p.out.dtype, [](const auto& norm) { norm.forward(); });
}
void norm_backward(const NormParams& p) {
  with_norm(p, p.dout.dtype, [](const auto& norm) { norm.backward(); });
}
void gelu_forward(const GeluParams& p) {
  with_types(p.x.dtype, p.x.dtype, [&]<class F, class T, class>() { Gelu<F, T>(p).forward(); });
}
void gelu_backward(const GeluParams& p) {
  with_types(p.x.dtype, p.x.dtype, [&]<class F, class T, class>() { Gelu<F, T>(p).backward(); });
}
void rotary(const RotaryParams& p) {
  with_types(p.x.dtype, p.x.dtype, [&]<class F, class T, class>() { turn<F, T>(p); });
}

}  // namespace HK_ISA
}  // namespace hierkernels
