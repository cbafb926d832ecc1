#define HK_ISA amx
#include "../attention/amx_products.h"
#include "bf16_engine.h"
#include "backward.inl"
#include "forward.inl"

namespace hierkernels::amx {
void sgu_forward(const SguParams& p) { Forward<Bf16Engine, BFloat16>(p).run(); }
void sgu_backward(const SguParams& p) { Backward<Bf16Engine, BFloat16>(p).run(); }
}  // namespace hierkernels::amx
