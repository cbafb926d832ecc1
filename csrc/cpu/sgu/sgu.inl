// The entry points of one instruction set: the types are chosen here.
#pragma once
#include "backward.inl"
#include "forward.inl"

namespace hierkernels {
namespace HK_ISA {

void sgu_forward(const SguParams& p) {
  switch (p.gate.dtype) {
    case DType::kFloat64:
      return Forward<double, double>(p).run();
    case DType::kBFloat16:
      return Forward<float, BFloat16>(p).run();
    case DType::kFloat16:
      return Forward<float, Float16>(p).run();
    default:
      return Forward<float, float>(p).run();
  }
}

void sgu_backward(const SguParams& p) {
  switch (p.gate.dtype) {
    case DType::kFloat64:
      return Backward<double, double>(p).run();
    case DType::kBFloat16:
      return Backward<float, BFloat16>(p).run();
    case DType::kFloat16:
      return Backward<float, Float16>(p).run();
    default:
      return Backward<float, float>(p).run();
  }
}

}  // namespace HK_ISA
}  // namespace hierkernels
