#include "rowwise.h"

#include "../isa.h"
#include "../scratch.h"

namespace hierkernels {
namespace {

struct Kernels {
  void (*norm_forward)(const NormParams&);
  void (*norm_backward)(const NormParams&);
  void (*gelu_forward)(const GeluParams&);
  void (*gelu_backward)(const GeluParams&);
  void (*rotary)(const RotaryParams&);
};

// There is nothing in these operations that levels above AVX-512 do better.
Kernels kernels() {
#if defined(HIERKERNELS_X86)
  if (active_isa() >= Isa::kAvx512) return {avx512::norm_forward, avx512::norm_backward, avx512::gelu_forward, avx512::gelu_backward, avx512::rotary};
  if (active_isa() == Isa::kAvx2) return {avx2::norm_forward, avx2::norm_backward, avx2::gelu_forward, avx2::gelu_backward, avx2::rotary};
#endif
  return {generic::norm_forward, generic::norm_backward, generic::gelu_forward, generic::gelu_backward, generic::rotary};
}

void advise(const Tensor& t) {
  if (t) advise_huge_pages(t.data, static_cast<size_t>(t.span_bytes()));
}

}  // namespace

void norm_forward(const NormParams& p) {
  advise(p.out);
  kernels().norm_forward(p);
}
void norm_backward(const NormParams& p) {
  advise(p.dx);
  kernels().norm_backward(p);
}
void gelu_forward(const GeluParams& p) {
  advise(p.first);
  advise(p.second);
  kernels().gelu_forward(p);
}
void gelu_backward(const GeluParams& p) {
  advise(p.dx);
  kernels().gelu_backward(p);
}
void rotary(const RotaryParams& p) {
  advise(p.out);
  kernels().rotary(p);
}

}  // namespace hierkernels
