// The row passes between the products of the backward kernel: from scores s and dP = dO V^T to the probabilities P
// (with dropout) and dS.
#pragma once
#include "softmax.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Where the gradient of the bias of a tile goes: dbias, or a copy of it that is added later.
template <class F>
struct TileBiasGradient {
  char* data = nullptr;  // for the batch and the first head of the group; null: not wanted
  int64_t head_stride = 0, query_stride = 0, key_stride = 0;  // 0 or as in dbias; the last is 0 or 1
  BiasSlots slots;
  bool once = false;  // no other pair adds to an element: it is stored, in the type of dbias
  DType dtype = DType::kFloat32;
  int64_t bytes = sizeof(F);  // of an element

  // Zeros for what query i of head g of the group does not see.
  void clear_unseen(int64_t g, int64_t i, int64_t lo, int64_t hi, int64_t n_keys) const {
    char* row = data + (g * head_stride + i * query_stride) * bytes;
    if (lo > hi) lo = hi;
    memset(row, 0, static_cast<size_t>(lo * bytes));
    memset(row + hi * bytes, 0, static_cast<size_t>((n_keys - hi) * bytes));
  }

  // Asks for the memory that add() changes.
  HK_INLINE void prefetch(const TileRows& tile, int r, int from, int to) const {
    if (!data || key_stride == 0) return;
    HK_ISA::prefetch(row_of(tile, r) + (slots.column(tile.query[r], tile.key) + from) * bytes, (to - from) * bytes);
  }

  // Adds the dS of row r, keys [from, to), which it sees: all of them have a slot.
  void add(const TileRows& tile, int r, int from, int to, const F* ds) const {
    constexpr int W = kWidth<F>;
    F* row = reinterpret_cast<F*>(row_of(tile, r));
    if (once) {
      if constexpr (kSame<F, float>) {
        if (dtype == DType::kBFloat16) return put(reinterpret_cast<BFloat16*>(row) + tile.key, from, to, ds);
        if (dtype == DType::kFloat16) return put(reinterpret_cast<Float16*>(row) + tile.key, from, to, ds);
      }
      return put(row + tile.key, from, to, ds);
    }
    if (key_stride == 0) {
      Vec<F> sum = zero<F>();
      for (int j = from; j < to; j += W) sum += j + W <= to ? load(ds + j) : load(ds + j, to - j);
      *row += reduce_add(sum);
      return;
    }
    row += slots.column(tile.query[r], tile.key);
    int j = from;
    for (; j + W <= to; j += W) store(row + j, load(row + j) + load(ds + j));
    if (j < to) store(row + j, load(row + j, to - j) + load(ds + j, to - j), to - j);
  }

 private:
  template <class T>
  static void put(T* row, int from, int to, const F* ds) {
    constexpr int W = kWidth<F>;
    int j = from;
    for (; j + W <= to; j += W) store_as<F>(row + j, load(ds + j));
    if (j < to) store_as<F>(row + j, load(ds + j, to - j), to - j);
  }

  char* row_of(const TileRows& tile, int r) const {
    return data + (tile.head[r] * head_stride + slots.row(tile.query[r]) * query_stride) * bytes;
  }
};

// What a row pass reads and writes besides scores and dP.
template <class F>
struct GradientRows {
  const F* lse;      // of each row, base 2, +inf where the row sees nothing
  const F* lse_low;  // what lse lacks in precision
  const F* delta;    // of each row: sum of P dP, less dlse; if the tile holds all keys, -dlse alone
  F scale;
  F* keep;   // work space, kTileKeys
  F* slope;  // work space like the scores, with a soft cap
};

// A row of C vectors of which the lanes [from, to) are visible, without modifiers, all in registers: scores become P, dp
// becomes scale * dS. The tile holds all keys: delta lacks the sum of P dP, and P is normalised here, which a rounded
// log-sum-exp of large scores does not do well enough.
template <int C, class F>
HK_INLINE void gradient_row(int from, int to, F lse, F delta, F scale, F* scores, F* dp) {
  constexpr int W = kWidth<F>;
  Vec<F> p[C], d[C], sum = zero<F>(), weighted = zero<F>();
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    p[c] = exp2(load(scores + c * W) - lse);
    d[c] = load(dp + c * W);
    // Products computed whole vectors: what a lane that is not visible holds may be anything.
    if (c == 0 && from > 0) {
      p[c] = select(lanes_below<F>(from), zero<F>(), p[c]);
      d[c] = select(lanes_below<F>(from), zero<F>(), d[c]);
    }
    if (c == C - 1) {
      p[c] = select(lanes_below<F>(to - c * W), p[c], zero<F>());
      d[c] = select(lanes_below<F>(to - c * W), d[c], zero<F>());
    }
    sum += p[c];
    weighted = fma(p[c], d[c], weighted);
  }
  const F total = reduce_add(sum), factor = total == F(0) ? F(0) : F(1) / total;
  const Vec<F> inverse = set1(factor), mean = set1(reduce_add(weighted) * factor + delta), by = set1(scale);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    p[c] *= inverse;
    store(scores + c * W, p[c]);
    store(dp + c * W, p[c] * (d[c] - mean) * by);
  }
}

// For every row of the tile: scores become P (times keep: what multiplies dO), dp becomes scale * dS. Both are zero
// where `readable` but not visible. kWhole: the tile holds all keys, so that sums are taken here.
template <bool kWhole, class F>
void gradient_tile(const TileRows& tile, const TileModifiers<F>& modifiers, const GradientRows<F>& rows,
                   const TileBiasGradient<F>& dbias, F* scores, F* dp, int64_t stride) {
  constexpr int W = kWidth<F>;
  const F hidden = -static_cast<F>(__builtin_inff());
  const bool capped = modifiers.capped(), plain = !dbias.data && !capped;
  const bool unmodified = plain && !modifiers.change_scores() && !modifiers.dropout();
  if (modifiers.change_scores())
    prepare_scores(tile, modifiers, scores, stride, static_cast<F*>(nullptr), capped ? rows.slope : nullptr);
  for (int r = 0; r < tile.n; ++r, scores += stride, dp += stride) {
    const Span readable = tile.readable(r, W);
    const int from = tile.from[r], to = tile.to[r];
    if (from >= to) {
      clear(scores, readable.begin, readable.end);
      clear(dp, readable.begin, readable.end);
      continue;
    }
    const int begin = from / W * W, end = round_up(to, W), vectors = (end - begin) / W;
    const Vec<F> scale = set1(rows.scale);
    if (kWhole && unmodified && vectors <= 4) {
      const auto row = [&]<int C>() {
        gradient_row<C, F>(from - begin, to - begin, rows.lse[r], rows.delta[r], rows.scale, scores + begin, dp + begin);
      };
      if (vectors == 1) row.template operator()<1>();
      if (vectors == 2) row.template operator()<2>();
      if (vectors == 3) row.template operator()<3>();
      if (vectors == 4) row.template operator()<4>();
    } else {
      if (!modifiers.change_scores()) hide_outside(scores, from, to, hidden);
      if (modifiers.dropout()) {
        modifiers.keep(tile, r, begin, end, rows.keep);
        for (int j = begin; j < end; j += W) store(dp + j, load(dp + j) * load(rows.keep + j));
      }
      const Vec<F> lse = set1(rows.lse[r]);
      if constexpr (kWhole) {
        Vec<F> sum = zero<F>(), weighted = zero<F>();
        for (int j = begin; j < end; j += W) {
          const Vec<F> x = exp2(load(scores + j) - lse);
          store(scores + j, x);
          sum += x;
          weighted = fma(x, load(dp + j), weighted);
        }
        const F total = reduce_add(sum), factor = total == F(0) ? F(0) : F(1) / total;
        const Vec<F> inverse = set1(factor), delta = set1(reduce_add(weighted) * factor + rows.delta[r]);
        for (int j = begin; j < end; j += W) {
          const Vec<F> p = load(scores + j) * inverse, ds = p * (load(dp + j) - delta);
          store(scores + j, p);
          store(dp + j, plain ? ds * scale : ds);
        }
      } else {
        const Vec<F> low = set1(rows.lse_low[r]), delta = set1(rows.delta[r]);
        for (int j = begin; j < end; j += W) {
          // No P is above 1, but scores so large that rounding hides their differences could say so.
          const Vec<F> p = exp2(min(zero<F>(), load(scores + j) - lse - low)), ds = p * (load(dp + j) - delta);
          store(scores + j, p);
          store(dp + j, plain ? ds * scale : ds);
        }
      }
      if (!plain) {
        if (dbias.data) dbias.add(tile, r, from, to, dp);
        for (int j = begin; j < end; j += W) {
          const Vec<F> factor = capped ? load(rows.slope + r * stride + j) * scale : scale;
          store(dp + j, load(dp + j) * factor);
        }
      }
      if (modifiers.dropout())
        for (int j = begin; j < end; j += W) store(scores + j, load(scores + j) * load(rows.keep + j));
    }
    clear(scores, readable.begin, begin);
    clear(scores, end, readable.end);
    clear(dp, readable.begin, begin);
    clear(dp, end, readable.end);
  }
}

// sums[r] += what the P of row r, as gradient_tile<false> computes it, adds up to in the tile.
template <class F>
void add_probabilities(const TileRows& tile, const TileModifiers<F>& modifiers, const F* lse, const F* lse_low, F* scores,
                       int64_t stride, F* sums) {
  constexpr int W = kWidth<F>;
  prepare_scores(tile, modifiers, scores, stride, static_cast<F*>(nullptr), static_cast<F*>(nullptr));
  for (int r = 0; r < tile.n; ++r, scores += stride) {
    const int from = tile.from[r], to = tile.to[r];
    if (from >= to) continue;
    const Vec<F> high = set1(lse[r]), low = set1(lse_low[r]);
    Vec<F> sum = zero<F>();
    for (int j = from / W * W; j < to; j += W) sum += exp2(load(scores + j) - high - low);
    sums[r] += reduce_add(sum);
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
