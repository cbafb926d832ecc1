#include "rowwise.h"

#include "../isa.h"

namespace hierkernels {
namespace {

struct Kernels {
  void (*rms_norm_forward)(const RmsNormParams&);
  void (*rms_norm_backward)(const RmsNormParams&);
  void (*rotary)(const RotaryParams&);
};

// There is nothing in these operations that levels above AVX-512 do better.
Kernels kernels() {
#if defined(HIERKERNELS_X86)
  if (active_isa() >= Isa::kAvx512) return {avx512::rms_norm_forward, avx512::rms_norm_backward, avx512::rotary};
  if (active_isa() == Isa::kAvx2) return {avx2::rms_norm_forward, avx2::rms_norm_backward, avx2::rotary};
#endif
  return {generic::rms_norm_forward, generic::rms_norm_backward, generic::rotary};
}

}  // namespace

void rms_norm_forward(const RmsNormParams& p) { kernels().rms_norm_forward(p); }
void rms_norm_backward(const RmsNormParams& p) { kernels().rms_norm_backward(p); }
void rotary(const RotaryParams& p) { kernels().rotary(p); }

}  // namespace hierkernels
