#include "select_blocks.h"

#include "../attention/attention.h"
#include "../isa.h"

namespace hierkernels {

void select_blocks(const SelectParams& p) {
#if defined(HIERKERNELS_X86)
  switch (active_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::select_blocks(p);
    case Isa::kAvx2:
      return avx2::select_blocks(p);
    default:
      break;
  }
#endif
  generic::select_blocks(p);
}

}  // namespace hierkernels
