#include "select_blocks.h"

#include "../attention/attention.h"
#include "../isa.h"

namespace hierkernels {

void select_blocks(const SelectParams& p) {
#if defined(HIERKERNELS_X86)
  // Mean queries and keys are no bfloat16 numbers: scores by logits stay in float32.
  const bool pairs = p.q.dtype == DType::kBFloat16 && p.lse;
  if (active_isa() >= Isa::kAvx512Bf16 && pairs) return avx512bf16::select_blocks(p);
  if (active_isa() >= Isa::kAvx512) return avx512::select_blocks(p);
  if (active_isa() >= Isa::kAvx2) return avx2::select_blocks(p);
#endif
  generic::select_blocks(p);
}

}  // namespace hierkernels
