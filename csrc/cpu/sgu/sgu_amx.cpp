#define HK_ISA amx
#include "../attention/amx_products.h"

namespace hierkernels::HK_ISA {
namespace {
constexpr int64_t kBf16BlockRows = 256;  // 2 MB of second-level cache
}
}  // namespace hierkernels::HK_ISA

#include "bf16_engine.h"
#include "backward.inl"
#include "forward.inl"

namespace hierkernels::amx {
void sgu_forward(const SguParams& p) { Forward<Bf16Engine, BFloat16>(p).run(); }
void sgu_backward(const SguParams& p) { Backward<Bf16Engine, BFloat16>(p).run(); }
}  // namespace hierkernels::amx
