// Register-blocked products whose other operand lies in pieces: columns of scores come from any tiles of keys, and sums
// over keys run over any runs of rows.
#pragma once
#include "../attention/products.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// out[r * out_stride + c * W] = sum over t of a[r * a_stride + t] * x[c][t * W]: a tile is W keys, channel by channel.
template <class F>
struct TileProduct {
  const F* a;
  int64_t a_stride;
  const F* const* x;
  int64_t terms;
  F* out;
  int64_t out_stride;
};

template <class F, int R, int C>
__attribute__((noinline)) void multiply_tiles(const TileProduct<F>& p) {
  constexpr int W = kWidth<F>;
  Vec<F> sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = zero<F>();
  const F* a = p.a;
  const F* x[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) x[c] = p.x[c];
  const int64_t a_stride = p.a_stride, terms = p.terms;
  for (int64_t t = 0; t < terms; ++t) {
    Vec<F> column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = load(x[c] + t * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<F> factor = set1(a[r * a_stride]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(factor, column[c], sum[r][c]);
    }
    ++a;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(p.out + r * p.out_stride + c * W, sum[r][c]);
}

// Rows x[0], x[x_stride], ... that meet the weights a[at], a[at + 1], ... of each row of a.
template <class F>
struct Run {
  const F* x;
  int at, terms;
};

// out[r][c] = update(out[r][c], sum over the runs of a[r * a_stride + at + t] * x[t * x_stride + column + c])
template <class F>
struct RunProduct {
  const F* a;
  int64_t a_stride;
  const Run<F>* runs;
  int n_runs;
  int64_t x_stride, column;
  Target<F> out;
};

template <class F, int R, int C>
__attribute__((noinline)) void multiply_runs(const RunProduct<F>& p) {
  constexpr int W = kWidth<F>;
  Vec<F> sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = zero<F>();
  const int64_t a_stride = p.a_stride, x_stride = p.x_stride;
  for (int i = 0; i < p.n_runs; ++i) {
    const F* a = p.a + p.runs[i].at;
    const F* x = p.runs[i].x + p.column;
    for (int t = p.runs[i].terms; t > 0; --t) {
      Vec<F> column[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) column[c] = load(x + c * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec<F> factor = set1(a[r * a_stride]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[r][c] = fma(factor, column[c], sum[r][c]);
      }
      ++a;
      x += x_stride;
    }
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
template <class F, int I>
constexpr Block<TileProduct<F>> tile_entry() {
  constexpr int R = I / kMaxColumns + 1, C = I % kMaxColumns + 1;
  if constexpr (R <= kMaxRows[C])
    return multiply_tiles<F, R, C>;
  else
    return nullptr;
}
template <class F, int I>
constexpr Block<RunProduct<F>> run_entry() {
  constexpr int R = I / kMaxColumns + 1, C = I % kMaxColumns + 1;
  if constexpr (R <= kMaxRows[C])
    return multiply_runs<F, R, C>;
  else
    return nullptr;
}
template <class F, int... I>
constexpr BlockTable<TileProduct<F>> tile_table(std::integer_sequence<int, I...>) {
  return {{tile_entry<F, I>()...}};
}
template <class F, int... I>
constexpr BlockTable<RunProduct<F>> run_table(std::integer_sequence<int, I...>) {
  return {{run_entry<F, I>()...}};
}
template <class F>
constexpr BlockTable<TileProduct<F>> kMultiplyTiles =
    tile_table<F>(std::make_integer_sequence<int, kMostRows * kMaxColumns>());
template <class F>
constexpr BlockTable<RunProduct<F>> kMultiplyRuns =
    run_table<F>(std::make_integer_sequence<int, kMostRows * kMaxColumns>());

// scores[r * stride + tile * W ...] = a(row r) . tile, for all rows and tiles.
template <class F>
void multiply_tile_list(int rows, const F* a, int64_t a_stride, const F* const* tiles, int n_tiles, int dim, F* scores,
                        int64_t stride) {
  for_each_part(n_tiles, kMaxColumns, [&](int tile, int columns) {
    for_each_part(rows, kMaxRows[columns], [&](int r, int part) {
      kMultiplyTiles<F>.block[(part - 1) * kMaxColumns + columns - 1](
          {a + r * a_stride, a_stride, tiles + tile, dim, scores + r * stride + tile * kWidth<F>, stride});
    });
  });
}

// out(row r) = update(out(row r), sum over the runs).
template <class F>
void multiply_run_list(int rows, const F* a, int64_t a_stride, const Run<F>* runs, int n_runs, int64_t x_stride,
                       int dim, const Target<F>& out) {
  constexpr int W = kWidth<F>;
  for_each_part((dim + W - 1) / W, kMaxColumns, [&](int column, int columns) {
    for_each_part(rows, kMaxRows[columns], [&](int r, int part) {
      kMultiplyRuns<F>.block[(part - 1) * kMaxColumns + columns - 1](
          {a + r * a_stride, a_stride, runs, n_runs, x_stride, column * W,
           {out.data + r * out.stride + column * W, out.stride, out.update, out.factors ? out.factors + r : nullptr}});
    });
  });
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
