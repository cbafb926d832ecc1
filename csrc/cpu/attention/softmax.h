// The row passes between the products of the forward kernel. Scores are in base 2: exp(x) = 2^(x log2 e).
#pragma once
#include "score_modifiers.h"
#include "tiles.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// The log-sum-exp is handed from the forward to the backward in base e, and used in base 2. Large scores leave it few
// digits after the point, so the conversions round once only: in twice the precision.
template <class F>
struct WideOf;
template <>
struct WideOf<float> {
  using Type = double;
};
template <>
struct WideOf<double> {
  using Type = long double;
};
template <class F>
using Wide = typename WideOf<F>::Type;

// ln(2^largest * 2^log2_sum).
template <class F>
HK_INLINE F natural_lse(F largest, F log2_sum) {
  return static_cast<F>((Wide<F>(largest) + Wide<F>(log2_sum)) * Wide<F>(0.693147180559945309417232121458L));
}
// A finite lse in base 2, as the sum of two numbers.
template <class F>
HK_INLINE void split_lse(F lse, F& high, F& low) {
  const Wide<F> x = Wide<F>(lse) * Wide<F>(1.442695040888963407359924681002L);
  high = static_cast<F>(x);
  low = static_cast<F>(x - Wide<F>(high));
}

// The rounding of a log-sum-exp is a factor in every P of its row, larger than that of eager PyTorch's softmax, which
// divides by a sum, from here on. There the backward takes the sum of P first, and with it what the log-sum-exp lacks.
// (Also where P is computed from other scores than the forward's: by another backend, whose products round differently.)
constexpr double kLargeLse = 16;

// Whether one of n log-sum-exps is so large that its rounding matters in F.
template <class F>
inline bool any_large_lse(const F* lse, int64_t n) {
  const F large = static_cast<F>(kLargeLse), infinite = static_cast<F>(__builtin_inff());
  bool any = false;
  for (int64_t i = 0; i < n; ++i) {
    const F x = lse[i] < F(0) ? -lse[i] : lse[i];
    any |= (x > large) & (x < infinite);
  }
  return any;
}
// What corrects a log-sum-exp (base 2) that leaves the row's P with this sum.
template <class F>
HK_INLINE Vec<F> lse_correction(Vec<F> sum) {
  return select(sum > F(0), log2(sum), zero<F>());
}

// The factor of q . k in the scores: with a soft cap the argument of tanh, else base-2 scores.
template <class F>
F score_factor(const AttentionParams& p) {
  return static_cast<F>(p.softcap ? p.scale / p.softcap : p.scale * kLog2E);
}

// The modifiers of one call, and for one (batch, kv head, tile) the additive rows that all queries share.
template <class F>
class TileModifiers {
 public:
  TileModifiers(const AttentionParams& p, F* additive_rows)
      : modifiers_(ScoreModifiers::from(p)),
        cap_(static_cast<F>(p.softcap * kLog2E)),
        rows_(additive_rows),
        shared_(modifiers_.additive && modifiers_.same_for_queries),
        group_(p.group()) {}

  // How many rows of kMostTileKeys the additive rows take.
  static int64_t additive_rows(const AttentionParams& p) {
    const ScoreModifiers m = ScoreModifiers::from(p);
    return m.same_for_queries && !m.same_for_heads ? p.group() : 1;
  }

  bool change_scores() const { return modifiers_.additive || cap_ != F(0); }
  bool capped() const { return cap_ != F(0); }
  bool dropout() const { return modifiers_.dropout; }

  void set_tile(int64_t b, int64_t kv_head, const TileRows& tile) {
    batch_ = b;
    first_head_ = kv_head * group_;
    if (!shared_) return;
    const int64_t heads = modifiers_.same_for_heads ? 1 : group_;
    for (int64_t g = 0; g < heads; ++g)
      modifiers_.additive_row(b, first_head_ + g, 0, tile.key, tile.n_keys, rows_ + g * kMostTileKeys);
  }

  // scores[begin, end) of row r: soft cap and additive row. `begin` and `end` are multiples of a vector; beyond the
  // tile's keys the result is arbitrary. If `slope` is given, it becomes d (capped score) / d (score).
  void apply(const TileRows& tile, int r, int begin, int end, F* scores, F* slope) const {
    constexpr int W = kWidth<F>;
    if (capped()) {
      for (int j = begin; j < end; j += W) {
        const Vec<F> t = tanh(load(scores + j));
        store(scores + j, t * cap_);
        if (slope) store(slope + j, F(1) - t * t);
      }
    }
    if (!modifiers_.additive) return;
    const F* row = rows_;
    if (shared_) {
      if (!modifiers_.same_for_heads) row += static_cast<int64_t>(tile.head[r]) * kMostTileKeys;
    } else {
      const int n = (end < tile.n_keys ? end : tile.n_keys) - begin;
      if (!modifiers_.bias)
        return modifiers_.hide_row(batch_, first_head_ + tile.head[r], tile.query[r], tile.key + begin, n, scores + begin);
      modifiers_.additive_row(batch_, first_head_ + tile.head[r], tile.query[r], tile.key + begin, n, rows_ + begin);
    }
    const F hidden = -static_cast<F>(__builtin_inff());
    for (int j = begin; j < end; j += W) {
      // A hidden key stays hidden whatever its score is, NaN included.
      const Vec<F> added = load(row + j);
      store(scores + j, select(added == hidden, added, load(scores + j) + added));
    }
  }

  // Asks for what apply() reads for row r, keys [from, to) of the tile.
  HK_INLINE void prefetch(const TileRows& tile, int r, int from, int to) const {
    if (modifiers_.additive && !shared_)
      modifiers_.prefetch_row(batch_, first_head_ + tile.head[r], tile.query[r], tile.key + from, to - from);
  }

  // row[begin, end) = 0 or 1 / (1 - p) for the keys of row r.
  void keep(const TileRows& tile, int r, int begin, int end, F* row) const {
    modifiers_.keep_row(batch_, first_head_ + tile.head[r], tile.query[r], tile.key + begin, end - begin, row + begin);
  }

 private:
  ScoreModifiers modifiers_;
  F cap_;  // softcap * log2(e)
  F* rows_;
  bool shared_;
  int64_t group_, batch_ = 0, first_head_ = 0;
};

// Hides the lanes of the first and last vector of [from, to) that lie outside, so that loops over whole vectors need
// no masks.
template <class F>
HK_INLINE void hide_outside(F* scores, int from, int to, F value) {
  constexpr int W = kWidth<F>;
  const int first = from / W * W, last = (to - 1) / W * W;
  if (from > first) store(scores + first, select(lanes_below<F>(from - first), set1(value), load(scores + first)));
  if (to < last + W) store(scores + last, select(lanes_below<F>(to - last), load(scores + last), set1(value)));
}

template <class F>
HK_INLINE void clear(F* x, int begin, int end) {
  for (int j = begin; j < end; j += kWidth<F>) store(x + j, zero<F>());
}

// The state of the online softmax, of each row of a block; whole vectors.
template <class F>
struct SoftmaxRows {
  F* max;      // the largest score so far, -inf if there is none
  F* sum;      // of 2^(score - max)
  F* rescale;  // 2^(max before the tile - max), 0 for the first
  F* origin;   // max, or 0 if it is -inf: then 2^(-inf - 0) = 0
};

// Scores of the tile with modifiers, and -inf in the lanes of the first and last vector that are not visible. If
// wanted, the largest score of every row goes to `largest`; with a soft cap, the derivative of each to `slope`.
template <class F>
void prepare_scores(const TileRows& tile, const TileModifiers<F>& modifiers, F* scores, int64_t stride, F* largest,
                    F* slope) {
  constexpr int W = kWidth<F>;
  const F hidden = -static_cast<F>(__builtin_inff());
  for (int r = 0; r < tile.n; ++r, scores += stride) {
    const int from = tile.from[r], to = tile.to[r];
    if (largest) largest[r] = hidden;
    if (from >= to) continue;
    const int begin = from / W * W, end = round_up(to, W);
    if (modifiers.change_scores()) modifiers.apply(tile, r, begin, end, scores, slope ? slope + r * stride : nullptr);
    hide_outside(scores, from, to, hidden);
    if (!largest) continue;
    Vec<F> most = load(scores + begin), most_2 = load(scores + end - W);
    for (int j = begin + W; j + 2 * W <= end; j += 2 * W) {
      most = max(most, load(scores + j));
      most_2 = max(most_2, load(scores + j + W));
    }
    largest[r] = reduce_max(max(most, most_2));
  }
}

// One step of the online softmax for every row of the tile: scores become 2^(score - max), zeros where `readable` but
// not visible, times what dropout keeps.
template <class F>
void softmax_tile(const TileRows& tile, const TileModifiers<F>& modifiers, F* scores, int64_t stride, F* keep,
                  const SoftmaxRows<F>& rows) {
  constexpr int W = kWidth<F>;
  prepare_scores(tile, modifiers, scores, stride, rows.origin, static_cast<F*>(nullptr));
  const Vec<F> hidden = set1(-static_cast<F>(__builtin_inff()));
  for (int r = 0; r < tile.n; r += W) {
    const Vec<F> before = load(rows.max + r), now = max(before, load(rows.origin + r));
    const Vec<F> origin = select(now == hidden, zero<F>(), now);
    const Vec<F> rescale = select(before == now, set1(F(1)), exp2(before - origin));
    store(rows.max + r, now);
    store(rows.origin + r, origin);
    store(rows.rescale + r, rescale);
    store(rows.sum + r, load(rows.sum + r) * rescale);
  }
  for (int r = 0; r < tile.n; ++r, scores += stride) {
    const Span readable = tile.readable(r, W);
    const int from = tile.from[r], to = tile.to[r];
    if (from >= to) {
      clear(scores, readable.begin, readable.end);
      continue;
    }
    const int begin = from / W * W, end = round_up(to, W);
    Vec<F> sum = zero<F>(), sum_2 = zero<F>();
    const Vec<F> origin = set1(rows.origin[r]);
    int j = begin;
    for (; j + 2 * W <= end; j += 2 * W) {
      const Vec<F> x = exp2(load(scores + j) - origin), y = exp2(load(scores + j + W) - origin);
      store(scores + j, x);
      store(scores + j + W, y);
      sum += x;
      sum_2 += y;
    }
    if (j < end) {
      const Vec<F> x = exp2(load(scores + j) - origin);
      store(scores + j, x);
      sum += x;
    }
    rows.sum[r] += reduce_add(sum + sum_2);
    clear(scores, readable.begin, begin);
    clear(scores, end, readable.end);
    if (modifiers.dropout()) {
      modifiers.keep(tile, r, begin, end, keep);
      for (j = begin; j < end; j += W) store(scores + j, load(scores + j) * load(keep + j));
    }
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
