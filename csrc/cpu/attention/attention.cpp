#include "attention.h"

#include <omp.h>

#include <cstring>

#include "../isa.h"
#include "../scratch.h"

namespace hierkernels {
namespace {

struct Kernels {
  void (*forward)(const AttentionParams&);
  void (*backward)(const AttentionParams&);
};

#if defined(HIERKERNELS_X86)
// Decoding with fewer key/value heads than threads: only the kernels of avx512 share the keys of a head among threads.
bool shares_keys(const AttentionParams& p) {
  return p.batch() * p.kv_heads() < omp_get_max_threads() && p.group() * p.n_queries() <= 16 && p.n_keys() >= 2048;
}

// Tiles of dot products work on 16 rows whether they are there or not. Measured on Zen 4: where few are, the kernels of
// avx512 are up to twice as fast.
Kernels kernels_of_dot_products(const AttentionParams& p) {
  const int64_t rows = p.group() * p.n_queries(), unused = (16 - rows % 16) % 16;
  const bool few = rows < 48 && p.n_keys() < 48;
  const bool forward = rows >= 8 && !shares_keys(p) && !(few && (rows == 8 || unused >= 12));
  const bool backward = rows >= 16 && !few;
  return {forward ? avx512bf16::attention_forward : avx512::attention_forward,
          backward ? avx512bf16::attention_backward : avx512::attention_backward};
}
#endif

Kernels kernels_for(const AttentionParams& p) {
#if defined(HIERKERNELS_X86)
  switch (active_isa()) {
    case Isa::kAmx:
      if (p.q.dtype == DType::kBFloat16)
        return {shares_keys(p) ? avx512::attention_forward : amx::attention_forward, amx::attention_backward};
      return {avx512::attention_forward, avx512::attention_backward};
    case Isa::kAvx512Bf16:
      if (p.q.dtype == DType::kBFloat16) return kernels_of_dot_products(p);
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

void clear_sums(const Tensor& t) {
  const int64_t bytes = t.span_bytes(), chunk = int64_t{1} << 20;
#pragma omp parallel for schedule(static) if (bytes > chunk)
  for (int64_t at = 0; at < bytes; at += chunk)
    std::memset(static_cast<char*>(t.data) + at, 0, static_cast<size_t>(bytes - at < chunk ? bytes - at : chunk));
}

void attention_forward(const AttentionParams& p) { kernels_for(p).forward(p); }
void attention_backward(const AttentionParams& p) {
  if (p.dbias) advise_huge_pages(p.dbias.data, static_cast<size_t>(p.dbias.span_bytes()));
  kernels_for(p).backward(p);
}

}  // namespace hierkernels
