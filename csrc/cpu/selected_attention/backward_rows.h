// A tile of the backward: rows gathered from the queries that visit a block, and the keys of the block.
#pragma once
#include "../attention/softmax.h"
#include "gathered_products.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Rows of a tile: two operands of the products over rows then fit the first-level cache. And keys at most.
constexpr int kGatheredRows = 128, kSelectedKeys = 128;

template <class F>
struct GatheredRows {
  int to[kGatheredRows];  // keys of the tile that the row sees: the first ones
  F lse[kGatheredRows], lse_low[kGatheredRows];  // base 2, the sum of both; +inf where the row sees nothing
  F delta[kGatheredRows];                        // sum of P dP, less dlse
  F* p_sum[kGatheredRows];                       // where add_probabilities adds
  F weight[kGatheredRows];                       // of the block
  F* dweight[kGatheredRows];                     // where its gradient goes, or null
  F weight_sum[kGatheredRows];                   // what this tile adds to it
  F* dq[kGatheredRows];
};

// scores[r * stride + key] = a(row r) . key, for the whole tiles that hold the keys.
template <class E>
void multiply_block_keys(int rows, const E* a, int64_t a_stride, const E* tiles, int keys, int dim, Sum<E> factor,
                         Sum<E>* scores, int64_t stride) {
  constexpr int W = kWidth<Sum<E>>;
  const E* list[kSelectedKeys / W];
  const int n_tiles = (keys + W - 1) / W;
  for (int t = 0; t < n_tiles; ++t) list[t] = tiles + t * Operands<E>::tile_size(dim);
  multiply_tile_list<E>(rows, a, a_stride, list, n_tiles, dim, factor, scores, stride);
}

// Scores become P, dp becomes scale * dS (with respect to q . k); both 0 where not visible.
template <class F>
void gradient_rows(GatheredRows<F>& rows, int n, int keys, bool weighted, F scale, F* scores, F* dp, int64_t stride) {
  constexpr int W = kWidth<F>;
  const int end = round_up(keys, W);
  const Vec<F> zeros = zero<F>();
  for (int r = 0; r < n; ++r, scores += stride, dp += stride) {
    const int to = rows.to[r], whole = to / W * W;
    const Vec<F> lse = set1(rows.lse[r]), low = set1(rows.lse_low[r]), delta = set1(rows.delta[r]);
    const Vec<F> weight = set1(rows.weight[r]), factor = set1(weighted ? rows.weight[r] * scale : scale);
    Vec<F> weight_sum = zeros;
    const auto step = [&](int j, Mask<F> visible) {
      const Vec<F> raw = load(scores + j);
      const Vec<F> score = weighted ? raw * weight : raw;
      // No P is above 1, but scores so large that rounding hides their differences could say so.
      const Vec<F> p = select(visible, exp2(min(zeros, score - lse - low)), zeros);
      const Vec<F> ds = select(visible, p * (load(dp + j) - delta), zeros);
      if (weighted) weight_sum += select(visible, ds * raw, zeros);
      store(scores + j, p);
      store(dp + j, ds * factor);
    };
    const Mask<F> all = lanes_below<F>(W);
    for (int j = 0; j < whole; j += W) step(j, all);
    if (to > whole) step(whole, lanes_below<F>(to - whole));
    for (int j = round_up(to, W); j < end; j += W) {
      store(scores + j, zeros);
      store(dp + j, zeros);
    }
    rows.weight_sum[r] = reduce_add(weight_sum) * static_cast<F>(kLn2);
  }
}

// *p_sum += what the P of each row, as gradient_rows computes it, adds up to.
template <class F>
void add_probabilities(const GatheredRows<F>& rows, int n, const F* scores, int64_t stride) {
  constexpr int W = kWidth<F>;
  for (int r = 0; r < n; ++r, scores += stride) {
    const int to = rows.to[r];
    const Vec<F> lse = set1(rows.lse[r]), low = set1(rows.lse_low[r]), weight = set1(rows.weight[r]);
    Vec<F> sum = zero<F>();
    for (int j = 0; j < to; j += W) {
      const Vec<F> p = exp2(load(scores + j) * weight - lse - low);
      sum += j + W <= to ? p : select(lanes_below<F>(to - j), p, zero<F>());
    }
    *rows.p_sum[r] += reduce_add(sum);
  }
}

// out(key) = update(out(key), sum over rows of weights[r * stride + key] * x(row r)), both in operands of rows.
template <class E>
void sum_over_rows(int n, const E* weights, int64_t stride, int keys, const E* x, int64_t x_stride, int dim,
                   const Target<Sum<E>>& out) {
  const Run<E> run = {x, 0, Operands<E>::terms(n)};
  multiply_run_list<E, true>(keys, weights, stride, &run, 1, x_stride, dim, out);
}

// out(row r) = sum over keys of weights[r * stride + key] * x(key), both in operands of keys.
template <class E>
void sum_over_keys(int n, const E* weights, int64_t stride, int keys, const E* x, int64_t x_stride, int padded,
                   Sum<E>* out) {
  const Run<E> run = {x, 0, Operands<E>::terms(keys)};
  multiply_run_list<E>(n, weights, stride, &run, 1, x_stride, padded, {out, padded, Update::kStore});
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
