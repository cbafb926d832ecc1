// Sizes that the forward and the backward kernel derive from a call.
#pragma once
#include <omp.h>

#include "../scratch.h"
#include "storage.h"
#include "tiles.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Channels above which tiles have half the rows.
constexpr int kWideChannels = 256;

inline int forward_rows(const AttentionParams& p) {
  return p.dim() > kWideChannels || p.dim_v() > kWideChannels ? kTileRows / 2 : kTileRows;
}
inline int backward_rows(const AttentionParams& p) {
  return forward_rows(p) < kBackwardRows ? forward_rows(p) : kBackwardRows;
}

// Tasks a thread takes at once: few if they are long and may differ, many if there are many.
inline int tasks_at_once(int64_t tasks) {
  const int64_t each = tasks / (omp_get_max_threads() * int64_t{32});
  return each < 1 ? 1 : each > 256 ? 256 : static_cast<int>(each);
}

// Whether to write a tensor past the caches.
inline bool is_large(const Tensor& t, int element) {
  return static_cast<size_t>(t.size[0] * t.size[1] * t.size[2] * t.size[3] * element) >= kLargeOutput;
}

// The rows of a tensor themselves as the target of a product, if products can write them.
template <class F>
HK_INLINE Target<F> target_in(const Tensor& t, const Rows& rows, int64_t tokens, int64_t first, Update update,
                              const F* factors) {
  const int64_t stride = rows.uniform_stride(tokens);
  F* data = reinterpret_cast<F*>(rows.data) + first * stride;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && stride % kWidth<F> == 0;
  return {data, stride, update, factors, aligned && is_large(t, sizeof(F))};
}

template <class F>
struct KernelShape {
  int dim, dim_v, padded, padded_v;  // channels; padded: to whole vectors
  int keys;                          // of a tile at most, in whole vectors, at least one
  int panel;                         // keys of a panel
  int64_t rows;                      // of a tile at most
  int64_t stride;                    // of rows of scores

  KernelShape(const AttentionParams& p, int most_rows, int most_keys) {
    constexpr int W = kWidth<F>;
    dim = static_cast<int>(p.dim());
    dim_v = static_cast<int>(p.dim_v());
    padded = round_up(dim, W);
    padded_v = round_up(dim_v, W);
    const int64_t n_keys = p.n_keys() < 1 ? 1 : p.n_keys(), n_rows = p.n_queries() * p.group();
    keys = n_keys < most_keys ? round_up(n_keys, W) : most_keys;
    panel = keys < kPanel<F> ? keys : kPanel<F>;
    rows = n_rows < most_rows ? n_rows : most_rows;
    stride = keys + W;  // off the powers of two
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
