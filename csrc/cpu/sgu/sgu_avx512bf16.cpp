#define HK_ISA avx512bf16
#include "../attention/dot_products.h"

namespace hierkernels::HK_ISA {
namespace {
constexpr int64_t kBf16BlockRows = 128;  // 1 MB of second-level cache
}
}  // namespace hierkernels::HK_ISA

#include "bf16_engine.h"
#include "backward.inl"
#include "forward.inl"

namespace hierkernels::avx512bf16 {
void sgu_forward(const SguParams& p) { Forward<Bf16Engine, BFloat16>(p).run(); }
void sgu_backward(const SguParams& p) { Backward<Bf16Engine, BFloat16>(p).run(); }
}  // namespace hierkernels::avx512bf16
