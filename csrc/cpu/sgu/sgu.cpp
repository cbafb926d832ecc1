#include "sgu.h"

#include "../attention/attention.h"
#include "../isa.h"
#include "../scratch.h"

namespace hierkernels {
namespace {

struct Kernels {
  void (*forward)(const SguParams&);
  void (*backward)(const SguParams&);
};

Kernels kernels_for(const SguParams& p) {
#if defined(HIERKERNELS_X86)
  switch (active_isa()) {
    case Isa::kAmx:
      if (p.gate.dtype == DType::kBFloat16) return {amx::sgu_forward, amx::sgu_backward};
      return {avx512::sgu_forward, avx512::sgu_backward};
    case Isa::kAvx512Bf16:
      if (p.gate.dtype == DType::kBFloat16) return {avx512bf16::sgu_forward, avx512bf16::sgu_backward};
      [[fallthrough]];
    case Isa::kAvx512:
      return {avx512::sgu_forward, avx512::sgu_backward};
    case Isa::kAvx2:
      return {avx2::sgu_forward, avx2::sgu_backward};
    default:
      break;
  }
#endif
  static_cast<void>(p);
  return {generic::sgu_forward, generic::sgu_backward};
}

void advise(const Tensor& t) {
  if (t) advise_huge_pages(t.data, static_cast<size_t>(t.span_bytes()));
}

}  // namespace

void sgu_forward(const SguParams& p) {
  advise(p.out);
  advise(p.z);
  kernels_for(p).forward(p);
}
void sgu_backward(const SguParams& p) {
  const Tensor* const results[] = {&p.dresidual, &p.dgate, &p.dgate_residual, &p.dweight};
  for (const Tensor* t : results) advise(*t);
  kernels_for(p).backward(p);
}

}  // namespace hierkernels
