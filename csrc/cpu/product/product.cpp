#include "product.h"

#include <stdexcept>

#include "../isa.h"
#include "../scratch.h"

namespace hierkernels {

bool has_product(bool in_bfloat16) {
#if defined(HIERKERNELS_X86)
  return active_isa() == Isa::kAvx512Bf16 || (active_isa() == Isa::kAvx512 && !in_bfloat16);
#else
  return false;
#endif
}

void product(const ProductParams& p) {
  if (!has_product(p.in_bfloat16)) throw std::runtime_error("no product of matrices for this instruction set");
  if (p.out.size[0] == 0 || p.out.size[1] == 0) return;
#if defined(HIERKERNELS_X86)
  advise_huge_pages(p.out.data, static_cast<size_t>(p.out.span_bytes()));
  return p.in_bfloat16 ? avx512bf16::product(p) : avx512::product(p);
#endif
}

}  // namespace hierkernels
