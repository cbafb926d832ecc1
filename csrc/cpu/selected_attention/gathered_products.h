// Register-blocked products whose other operand lies in pieces: columns of scores come from any tiles of keys, and sums
// over keys run over any runs of rows.
#pragma once
#include "../attention/products.h"
#include "operands.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class E>
using Sum = typename Operands<E>::Sum;

// sum[r][c] += sum over t of a[r * a_step + t * a_next] * x[c] at t: the loop of every product, in registers.
template <class E, int R, int C>
HK_INLINE void add_terms(const E* a, int64_t a_step, int64_t a_next, const E* (&x)[C], int64_t x_next, int64_t terms,
                         Vec<Sum<E>> (&sum)[R][C]) {
  using O = Operands<E>;
  for (int64_t t = 0; t < terms; ++t) {
    decltype(O::vector(a)) column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = O::vector(x[c] + t * x_next);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto factor = O::broadcast(a + r * a_step);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = O::add_product(factor, column[c], sum[r][c]);
    }
    a += a_next;
  }
}

template <class F, int R, int C>
HK_INLINE void clear_sums(Vec<F> (&sum)[R][C]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = zero<F>();
}

// out[r * out_stride + c * W] = sum over t of a[r * a_stride + t] * x[c][t * W], times `factor` if tiles have none: a tile
// is W keys, channel by channel.
template <class E>
struct TileProduct {
  const E* a;
  int64_t a_stride;
  const E* const* x;
  int64_t terms;
  Sum<E>* out;
  int64_t out_stride;
  Sum<E> factor;
};

template <class E, int R, int C>
__attribute__((noinline)) void multiply_tiles(const TileProduct<E>& p) {
  using F = Sum<E>;
  constexpr int W = kWidth<F>;
  Vec<F> sum[R][C];
  clear_sums<F, R, C>(sum);
  const E* x[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) x[c] = p.x[c];
  add_terms<E, R, C>(p.a, p.a_stride, 1, x, W, p.terms, sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      if constexpr (!Operands<E>::kTilesHaveFactor) sum[r][c] *= set1(p.factor);
      store(p.out + r * p.out_stride + c * W, sum[r][c]);
    }
}

// Rows x[0], x[x_stride], ... that meet the weights a[at], a[at + 1], ... of each row of a.
template <class E>
struct Run {
  const E* x;
  int at, terms;
};

// out[r][c] = update(out[r][c], sum over the runs of a[r * a_step + at + t] * x[t * x_stride + column + c]); if
// transposed, of the one run: of a[r + t * a_step].
template <class E>
struct RunProduct {
  const E* a;
  int64_t a_step;
  const Run<E>* runs;
  int n_runs;
  int64_t x_stride, column;
  Target<Sum<E>> out;
};

template <class E, bool kTransposed, int R, int C>
__attribute__((noinline)) void multiply_runs(const RunProduct<E>& p) {
  using F = Sum<E>;
  constexpr int W = kWidth<F>;
  Vec<F> sum[R][C];
  clear_sums<F, R, C>(sum);
  for (int i = 0; i < p.n_runs; ++i) {
    const E* x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = p.runs[i].x + p.column + c * W;
    add_terms<E, R, C>(p.a + p.runs[i].at, kTransposed ? 1 : p.a_step, kTransposed ? p.a_step : 1, x, p.x_stride,
                       p.runs[i].terms, sum);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    F* out = p.out.data + r * p.out.stride;
    const Vec<F> factor = set1(p.out.update == Update::kRescale ? p.out.factors[r] : F(0));
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      if (p.out.update == Update::kAdd) sum[r][c] += load(out + c * W);
      if (p.out.update == Update::kRescale) sum[r][c] = fma(factor, load(out + c * W), sum[r][c]);
      store(out + c * W, sum[r][c]);
    }
  }
}

template <class Product>
using Block = void (*)(const Product&);
template <class Product>
struct BlockTable {
  Block<Product> block[kMostRows * kMaxColumns];
};
template <class E, int I>
constexpr Block<TileProduct<E>> tile_entry() {
  constexpr int R = I / kMaxColumns + 1, C = I % kMaxColumns + 1;
  if constexpr (R <= kMaxRows[C])
    return multiply_tiles<E, R, C>;
  else
    return nullptr;
}
template <class E, bool kTransposed, int I>
constexpr Block<RunProduct<E>> run_entry() {
  constexpr int R = I / kMaxColumns + 1, C = I % kMaxColumns + 1;
  if constexpr (R <= kMaxRows[C])
    return multiply_runs<E, kTransposed, R, C>;
  else
    return nullptr;
}
template <class E, int... I>
constexpr BlockTable<TileProduct<E>> tile_table(std::integer_sequence<int, I...>) {
  return {{tile_entry<E, I>()...}};
}
template <class E, bool kTransposed, int... I>
constexpr BlockTable<RunProduct<E>> run_table(std::integer_sequence<int, I...>) {
  return {{run_entry<E, kTransposed, I>()...}};
}
template <class E>
constexpr BlockTable<TileProduct<E>> kMultiplyTiles =
    tile_table<E>(std::make_integer_sequence<int, kMostRows * kMaxColumns>());
template <class E, bool kTransposed>
constexpr BlockTable<RunProduct<E>> kMultiplyRuns =
    run_table<E, kTransposed>(std::make_integer_sequence<int, kMostRows * kMaxColumns>());

// scores[r * stride + tile * W ...] = a(row r) . tile, for all rows and tiles.
template <class E>
void multiply_tile_list(int rows, const E* a, int64_t a_stride, const E* const* tiles, int n_tiles, int dim,
                        Sum<E> factor, Sum<E>* scores, int64_t stride) {
  for_each_part(n_tiles, kMaxColumns, [&](int tile, int columns) {
    for_each_part(rows, kMaxRows[columns], [&](int r, int part) {
      kMultiplyTiles<E>.block[(part - 1) * kMaxColumns + columns - 1](
          {a + r * a_stride, a_stride, tiles + tile, Operands<E>::terms(dim),
           scores + r * stride + tile * kWidth<Sum<E>>, stride, factor});
    });
  });
}

// out(row r) = update(out(row r), sum over the runs). Transposed: weights of row r are a[r], a[r + a_step], ...
template <class E, bool kTransposed = false>
void multiply_run_list(int rows, const E* a, int64_t a_step, const Run<E>* runs, int n_runs, int64_t x_stride, int dim,
                       const Target<Sum<E>>& out) {
  constexpr int W = kWidth<Sum<E>>;
  for_each_part((dim + W - 1) / W, kMaxColumns, [&](int column, int columns) {
    for_each_part(rows, kMaxRows[columns], [&](int r, int part) {
      kMultiplyRuns<E, kTransposed>.block[(part - 1) * kMaxColumns + columns - 1](
          {a + r * (kTransposed ? 1 : a_step), a_step, runs, n_runs, x_stride, column * W,
           {out.data + r * out.stride + column * W, out.stride, out.update, out.factors ? out.factors + r : nullptr}});
    });
  });
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
