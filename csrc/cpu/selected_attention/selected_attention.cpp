#include "selected_attention.h"

#include "../isa.h"
#include "../scratch.h"

namespace hierkernels {
namespace {

struct Kernels {
  void (*forward)(const SelectedParams&);
  void (*backward)(const SelectedParams&);
};

Kernels kernels_for(const SelectedParams& p) {
#if defined(HIERKERNELS_X86)
  switch (active_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512Bf16:
      if (p.q.dtype == DType::kBFloat16) return {avx512bf16::selected_forward, avx512bf16::selected_backward};
      [[fallthrough]];
    case Isa::kAvx512:
      return {avx512::selected_forward, avx512::selected_backward};
    case Isa::kAvx2:
      return {avx2::selected_forward, avx2::selected_backward};
    default:
      break;
  }
#endif
  return {generic::selected_forward, generic::selected_backward};
}

void advise(const Tensor& t) { advise_huge_pages(t.data, static_cast<size_t>(t.span_bytes())); }

}  // namespace

void selected_forward(const SelectedParams& p) {
  advise(p.out);
  kernels_for(p).forward(p);
}
void selected_backward(const SelectedParams& p) {
  advise(p.dq);
  advise(p.dk);
  advise(p.dv);
  kernels_for(p).backward(p);
}

}  // namespace hierkernels
