// The entry points of one instruction set: the types are chosen here.
#pragma once
#include "backward.inl"
#include "forward.inl"
#include "simd_engine.h"

namespace hierkernels {
namespace HK_ISA {

void sgu_forward(const SguParams& p) {
  switch (p.gate.dtype) {
    case DType::kFloat64:
      return Forward<SimdEngine<double>, double>(p).run();
    case DType::kBFloat16:
      return Forward<SimdEngine<float>, BFloat16>(p).run();
    case DType::kFloat16:
      return Forward<SimdEngine<float>, Float16>(p).run();
    default:
      return Forward<SimdEngine<float>, float>(p).run();
  }
}

void sgu_backward(const SguParams& p) {
  switch (p.gate.dtype) {
    case DType::kFloat64:
      return Backward<SimdEngine<double>, double>(p).run();
    case DType::kBFloat16:
      return Backward<SimdEngine<float>, BFloat16>(p).run();
    case DType::kFloat16:
      return Backward<SimdEngine<float>, Float16>(p).run();
    default:
      return Backward<SimdEngine<float>, float>(p).run();
  }
}

}  // namespace HK_ISA
}  // namespace hierkernels
