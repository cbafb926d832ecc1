#define HK_ISA amx
#include "../simd.h"
#include "sgu.h"

namespace hierkernels::amx {
void sgu_forward(const SguParams& p) { avx512::sgu_forward(p); }
void sgu_backward(const SguParams& p) { avx512::sgu_backward(p); }
}  // namespace hierkernels::amx
