#define HK_ISA amx
#include "amx_engine.h"
#include "backward.inl"
#include "forward.inl"

namespace hierkernels::amx {
void sgu_forward(const SguParams& p) { Forward<AmxEngine, BFloat16>(p).run(); }
void sgu_backward(const SguParams& p) { Backward<AmxEngine, BFloat16>(p).run(); }
}  // namespace hierkernels::amx
