// Register-blocked matrix products on scratch memory: R rows x C vectors of accumulators.
#pragma once
#include <utility>  // std::integer_sequence: a type only

#include "../simd.h"
#include "next_inputs.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// The vectors of a row of accumulators, and the rows: as many as registers hold, with one vector of each column and
// one broadcast left over. Narrow blocks take more rows, so that enough sums are in flight.
#if defined(__AVX512F__)
constexpr int kMaxColumns = 4, kMostRows = 12;
constexpr int kMaxRows[kMaxColumns + 1] = {0, 12, 12, 8, 6};
#elif defined(__AVX2__)
constexpr int kMaxColumns = 2, kMostRows = 12;
constexpr int kMaxRows[kMaxColumns + 1] = {0, 12, 6};
#else
constexpr int kMaxColumns = 2, kMostRows = 8;
constexpr int kMaxRows[kMaxColumns + 1] = {0, 8, 4};
#endif

enum class Update {
  kStore,    // out = sum
  kAdd,      // out = out + sum
  kRescale,  // out = out * factor + sum
  kScale     // out = sum * factor
};

// Where results go. past_caches: without displacing what the caches hold; for whole vectors, aligned.
template <class F>
struct Target {
  F* data;
  int64_t stride;
  Update update;
  const F* factors = nullptr;  // of the rows
  bool past_caches = false;
};

// out[r][c] = update(out[r][c], sum over t of a(r, t) * x[t * x_stride + c])
template <class F>
struct Product {
  const F* a;
  int64_t a_stride;  // a(r, t) = a[r * a_stride + t]; of A transposed: a[t * a_stride + r]
  const F* x;
  int64_t x_stride;
  int64_t terms;
  Target<F> out;
  Lines ask;  // in turn t of the loop, the line at `at` + t * step
};

// sum[r][c] = sum over t of a(r, t) * x[t * x_stride + c * kWidth ...]: the loop of every product, in registers.
template <class F, bool kTransposed, int R, int C>
HK_INLINE void sum_block(const F* a, int64_t a_stride, const F* x, int64_t x_stride, int64_t terms, const Lines& lines,
                         Vec<F> (&sum)[R][C]) {
  constexpr int W = kWidth<F>;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = zero<F>();
  const char* ask = lines.at;
  const int64_t ask_step = lines.step;
  for (int64_t t = terms; t > 0; --t) {
    Vec<F> column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = load(x + c * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<F> factor = set1(kTransposed ? a[r] : a[r * a_stride]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(factor, column[c], sum[r][c]);
    }
    __builtin_prefetch(ask, 0, 2);
    ask += ask_step;
    a += kTransposed ? a_stride : 1;
    x += x_stride;
  }
}

template <class F, bool kTransposed, int R, int C>
__attribute__((noinline)) void multiply_block(const Product<F>& p) {
  constexpr int W = kWidth<F>;
  Vec<F> sum[R][C];
  sum_block<F, kTransposed, R, C>(p.a, p.a_stride, p.x, p.x_stride, p.terms, p.ask, sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    F* out = p.out.data + r * p.out.stride;
    if (p.out.update == Update::kAdd) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += load(out + c * W);
    } else if (p.out.update != Update::kStore) {
      const Vec<F> factor = set1(p.out.factors[r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        sum[r][c] = p.out.update == Update::kScale ? sum[r][c] * factor : fma(factor, load(out + c * W), sum[r][c]);
    }
    if (p.out.past_caches) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) stream(out + c * W, bit_cast<VecF>(sum[r][c]));
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(out + c * W, sum[r][c]);
    }
  }
}

template <class F>
using Multiply = void (*)(const Product<F>&);
template <class F>
struct MultiplyTable {
  Multiply<F> block[kMostRows * kMaxColumns];
};
template <class F, bool kTransposed, int I>
constexpr Multiply<F> multiply_entry() {
  constexpr int R = I / kMaxColumns + 1, C = I % kMaxColumns + 1;
  if constexpr (R <= kMaxRows[C])
    return multiply_block<F, kTransposed, R, C>;
  else
    return nullptr;
}
template <class F, bool kTransposed, int... I>
constexpr MultiplyTable<F> multiply_table(std::integer_sequence<int, I...>) {
  return {{multiply_entry<F, kTransposed, I>()...}};
}
template <class F, bool kTransposed>
constexpr MultiplyTable<F> kMultiply =
    multiply_table<F, kTransposed>(std::make_integer_sequence<int, kMostRows * kMaxColumns>());

// rows <= kMaxRows[columns], columns <= kMaxColumns (vectors).
template <class F, bool kTransposed>
HK_INLINE void multiply(int rows, int columns, const Product<F>& p) {
  kMultiply<F, kTransposed>.block[(rows - 1) * kMaxColumns + columns - 1](p);
}

// Cuts n into parts of at most `most`, as even as possible: for_each(begin, size).
template <class Body>
HK_INLINE void for_each_part(int n, int most, Body body) {
  const int parts = (n + most - 1) / most;
  for (int i = 0, begin = 0; i < parts; ++i) {
    const int end = static_cast<int>(static_cast<int64_t>(n) * (i + 1) / parts);
    body(begin, end - begin);
    begin = end;
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
