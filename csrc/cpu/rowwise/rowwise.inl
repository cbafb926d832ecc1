// The entry points of one instruction set: the types are chosen here.
#pragma once
#include "rms_norm.inl"
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

}  // namespace

void rms_norm_forward(const RmsNormParams& p) {
  with_types(p.x.dtype, p.out.dtype, [&]<class F, class TX, class TO>() { RmsNorm<F, TX, TO>(p).forward(); });
}
void rms_norm_backward(const RmsNormParams& p) {
  with_types(p.x.dtype, p.dout.dtype, [&]<class F, class TX, class TO>() { RmsNorm<F, TX, TO>(p).backward(); });
}
void rotary(const RotaryParams& p) {
  with_types(p.x.dtype, p.x.dtype, [&]<class F, class T, class>() { turn<F, T>(p); });
}

}  // namespace HK_ISA
}  // namespace hierkernels
