#include "select_blocks.h"

#include "../attention/attention.h"
#include "../isa.h"

namespace hierkernels {

void select_blocks(const SelectParams& p) {
#if defined(HIERKERNELS_X86)
  if (active_isa() >= Isa::kAvx512) return avx512::select_blocks(p);
  if (active_isa() >= Isa::kAvx2) return avx2::select_blocks(p);
#endif
  generic::select_blocks(p);
}

}  // namespace hierkernels
