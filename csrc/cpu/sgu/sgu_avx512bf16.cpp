#define HK_ISA avx512bf16
#include "../attention/dot_products.h"
#include "bf16_engine.h"
#include "backward.inl"
#include "forward.inl"

namespace hierkernels::avx512bf16 {
void sgu_forward(const SguParams& p) { Forward<Bf16Engine, BFloat16>(p).run(); }
void sgu_backward(const SguParams& p) { Backward<Bf16Engine, BFloat16>(p).run(); }
}  // namespace hierkernels::avx512bf16
