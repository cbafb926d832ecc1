#include "attention.h"

#include <cstring>

#include "../isa.h"
#include "../scratch.h"

namespace hierkernels {
namespace {

struct Kernels {
  void (*forward)(const AttentionParams&);
  void (*backward)(const AttentionParams&);
};

Kernels kernels_for(const AttentionParams& p) {
#if defined(HIERKERNELS_X86)
  switch (active_isa()) {
    case Isa::kAmx:
      if (p.q.dtype == DType::kBFloat16) return {amx::attention_forward, amx::attention_backward};
      [[fallthrough]];
    case Isa::kAvx512:
      return {avx512::attention_forward, avx512::attention_backward};
    case Isa::kAvx2:
      return {avx2::attention_forward, avx2::attention_backward};
    default:
      break;
  }
#endif
  return {generic::attention_forward, generic::attention_backward};
}

}  // namespace

void attention_forward(const AttentionParams& p) { kernels_for(p).forward(p); }
void attention_backward(const AttentionParams& p) {
  if (p.dbias) {  // kernels add to it
    const size_t bytes = static_cast<size_t>(p.dbias.span_bytes());
    advise_huge_pages(p.dbias.data, bytes);
    std::memset(p.dbias.data, 0, bytes);
  }
  kernels_for(p).backward(p);
}

}  // namespace hierkernels
