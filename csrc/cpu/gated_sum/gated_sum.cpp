#include "gated_sum.h"

#include "../isa.h"
#include "../scratch.h"

namespace hierkernels {
namespace {

void advise(const Tensor& t) { advise_huge_pages(t.data, static_cast<size_t>(t.span_bytes())); }

}  // namespace

void gated_sum_forward(const GatedSumParams& p) {
  advise(p.out);
#if defined(HIERKERNELS_X86)
  if (active_isa() >= Isa::kAvx512) return avx512::gated_sum_forward(p);
  if (active_isa() >= Isa::kAvx2) return avx2::gated_sum_forward(p);
#endif
  generic::gated_sum_forward(p);
}

void gated_sum_backward(const GatedSumParams& p) {
  for (const Tensor& t : p.dparts) advise(t);
#if defined(HIERKERNELS_X86)
  if (active_isa() >= Isa::kAvx512) return avx512::gated_sum_backward(p);
  if (active_isa() >= Isa::kAvx2) return avx2::gated_sum_backward(p);
#endif
  generic::gated_sum_backward(p);
}

}  // namespace hierkernels
