// Scores of windows for many queries: a row is a window, a lane is a query. They never leave the registers as logits:
// probabilities are added to those of the heads before.
#pragma once
#include "../attention/products.h"
#include "../selected_attention/gathered_products.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// out[r][c] (+)= 2^(scale * k(r) . q(c) - lse[c]), zero where the query does not see the window; without lse,
// out[r][c] = scale * k(r) . q(c).
template <class E>
struct WindowProduct {
  using F = Sum<E>;
  const E* k;  // k(r) = k + r * k_stride, r = 0 is window `first`
  int64_t k_stride;
  const E* q;  // q(c)[t] = q[t * q_stride + c], c < W; the next W queries are q_column further
  int64_t q_stride, q_column;
  int64_t terms;
  F scale;
  const F* lse;  // in base 2
  F* out;
  int64_t out_stride;
  bool adds;
  int64_t first;
  const typename Simd<F>::Signed* visible;  // the end of the windows that a query sees; null: all see these rows
  Lines ask;  // in turn t of the loop, the line at `at` + t * step
};

template <class E, bool kProbability, int R, int C>
__attribute__((noinline)) void score_windows_block(const WindowProduct<E>& p) {
  using F = Sum<E>;
  constexpr int W = kWidth<F>;
  Vec<F> sum[R][C];
  if constexpr (Operands<E>::kTerms == 1) {
    sum_block<F, false, R, C>(p.k, p.k_stride, p.q, p.q_stride, p.terms, p.ask, sum);
  } else {
    const E* q[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) q[c] = p.q + c * p.q_column;
    clear_sums<F, R, C>(sum);
    add_terms<E, R, C>(p.k, p.k_stride, 1, q, p.q_stride, p.terms, sum);
  }
  const Vec<F> scale = set1(p.scale);
  if constexpr (!kProbability) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(p.out + r * p.out_stride + c * W, sum[r][c] * scale);
  } else {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Vec<F> lse = load(p.lse + c * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r][c] = exp2(fma(sum[r][c], scale, -lse));
    }
    if (p.visible) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        Mask<F> visible;
        __builtin_memcpy(&visible, p.visible + c * W, sizeof visible);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const auto window = static_cast<typename Simd<F>::Signed>(p.first + r);
          sum[r][c] = select(visible > window, sum[r][c], zero<F>());
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      F* out = p.out + r * p.out_stride;
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(out + c * W, p.adds ? load(out + c * W) + sum[r][c] : sum[r][c]);
    }
  }
}

template <class E>
using ScoreWindows = void (*)(const WindowProduct<E>&);
template <class E>
struct ScoreTable {
  ScoreWindows<E> block[kMostRows * kMaxColumns];
};
template <class E, bool kProbability, int I>
constexpr ScoreWindows<E> score_entry() {
  constexpr int R = I / kMaxColumns + 1, C = I % kMaxColumns + 1;
  if constexpr (R <= kMaxRows[C])
    return score_windows_block<E, kProbability, R, C>;
  else
    return nullptr;
}
template <class E, bool kProbability, int... I>
constexpr ScoreTable<E> score_table(std::integer_sequence<int, I...>) {
  return {{score_entry<E, kProbability, I>()...}};
}
template <class E, bool kProbability>
constexpr ScoreTable<E> kScoreWindows =
    score_table<E, kProbability>(std::make_integer_sequence<int, kMostRows * kMaxColumns>());

// Windows <= kMaxRows[columns], columns <= kMaxColumns (vectors of queries).
template <class E>
HK_INLINE void score_windows(int windows, int columns, const WindowProduct<E>& p) {
  const int at = (windows - 1) * kMaxColumns + columns - 1;
  p.lse ? kScoreWindows<E, true>.block[at](p) : kScoreWindows<E, false>.block[at](p);
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
