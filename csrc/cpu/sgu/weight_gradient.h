// The weight's gradient, tril(dmix gate^T) of one head: tiles above the diagonal are not computed.
#pragma once
#include <string.h>

#include "mix.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Rows row .. row + rows, strips of columns first .. first + strips of the gradient; the strips of the look-back come
// before those of the own bucket.
struct GradientRange {
  int64_t row, rows, first, strips, split;
};

template <class Engine>
class WeightGradient {
 public:
  using E = typename Engine::Element;
  using F = typename Engine::Sum;
  static constexpr int64_t S = Engine::kStrip;

  int64_t splits = 1;  // parts of the sum, which are kept apart and added in order

  WeightGradient(const SguShape& shape, const Tensor& dweight)
      : s_(shape),
        terms_(round_to(shape.columns, S)),
        half_(ceil_div(shape.w, S)),
        all_(half_ * (shape.look_back ? 2 : 1)) {
    chunks_ = ceil_div(all_, kChunkColumns / S);
    blocks_ = ceil_div(s_.w, Engine::kBlockRows);
    const int64_t threads = omp_get_max_threads();
    if (dweight && threads > 1) splits = max_of(1, min_of(s_.buckets, 2 * threads / (blocks_ * chunks_)));
  }
  // The same for so many of the head's columns.
  WeightGradient of_columns(int64_t columns) const {
    WeightGradient g = *this;
    g.terms_ = round_to(columns, S);
    return g;
  }

  int64_t blocks() const { return blocks_; }
  int64_t terms() const { return terms_; }
  int64_t columns() const { return all_ * S; }
  int64_t gate_strip_size() const { return Engine::strip_size(terms_); }
  int64_t gate_size() const { return half_ * gate_strip_size(); }  // of a bucket
  int64_t panels_size() const { return Engine::kBlockRows / Engine::kPanel * Engine::panel_size(); }
  // Of one part of the sum: whole panels, as an engine may store rows that nobody asked for.
  int64_t partial_size() const { return round_to(s_.w, Engine::kPanel) * columns(); }
  int64_t tasks() const { return splits * blocks_ * chunks_; }
  int64_t dmix_size() const { return (Engine::kTiledGradient ? round_to(s_.w, Engine::kPanel) : s_.w) * terms_; }

  // dmix: of all buckets, as strips of rows [strip][row][S], or for a tiling engine as panels [panel][term][kPanel];
  // gate: of all buckets, as strips of columns [strip of tokens][term][S].
  GradientRange compute(int64_t task, const E* dmix, const E* gate, E* panels, F* c) const {
    constexpr int64_t most = kChunkColumns / S;
    const int64_t chunk = task % chunks_, block = task / chunks_ % blocks_, split = task / (chunks_ * blocks_);
    GradientRange g{block * Engine::kBlockRows, 0, chunk * most, min_of(most, all_ - chunk * most), split};
    g.rows = min_of(Engine::kBlockRows, s_.w - g.row);
    for (int64_t r = 0; r < g.rows; ++r) memset(c + r * kChunkStride, 0, static_cast<size_t>(g.strips * S) * sizeof(F));
    if (!s_.look_back && g.first * S >= g.row + g.rows) return g;  // above the diagonal
    const int64_t end = s_.buckets * (split + 1) / splits;
    for (int64_t bucket = s_.buckets * split / splits; bucket < end; ++bucket)
      add_bucket(g, s_.tokens(bucket), dmix + bucket * dmix_size(), gate + bucket * gate_size(),
                 bucket == 0 ? nullptr : gate + (bucket - 1) * gate_size(), panels, c, kChunkStride);
    return g;
  }

  // Adds a bucket's part of a range to c. before: the gate of the bucket before, if there is one; ahead: asked between
  // products.
  void add_bucket(const GradientRange& g, int64_t tokens, const E* dmix, const E* gate, const E* before, E* panels,
                  F* c, int64_t c_stride, RowsAhead* ahead = nullptr) const {
    const int64_t rows = min_of(g.rows, tokens - g.row);
    if (rows <= 0) return;
    for (int64_t first = 0; first < terms_; first += Engine::kStepTerms) {
      const int64_t count = min_of(Engine::kStepTerms, terms_ - first);
      const E* a = panels;
      int64_t a_size = Engine::panel_size();
      if constexpr (Engine::kTiledGradient) {
        a_size = terms_ * Engine::kPanel;
        a = dmix + g.row / Engine::kPanel * a_size + first * Engine::kPanel;
      } else {
        Engine::strips_to_panels(dmix, s_.w, g.row, rows, first, count, panels);
      }
      for (int64_t i = 0; i < g.strips; ++i) {
        const int64_t strip = g.first + i;
        const bool own = !s_.look_back || strip >= half_;
        if (!own && !before) continue;
        const int64_t token_strip = own && s_.look_back ? strip - half_ : strip;
        const E* y = (own ? gate : before) + token_strip * gate_strip_size() + first * S;
        const bool goes_on = i + 1 < g.strips && !(s_.look_back && strip + 1 == half_);  // in the same bucket
        const NextStrip<Engine> next(goes_on ? y + gate_strip_size() : nullptr, count);
        // Rows before the strip's first token see nothing of it.
        const int64_t unseen = own ? max_of(token_strip * S - g.row, 0) / Engine::kPanel : 0;
        for (int64_t p = unseen * Engine::kPanel; p < rows; p += Engine::kPanel) {
          Engine::multiply(min_of(Engine::kPanel, rows - p), a + p / Engine::kPanel * a_size, y, count,
                           c + p * c_stride + i * S, c_stride, Update::kAdd, next.part(p / Engine::kPanel - unseen));
          if (ahead) ahead->ask();
        }
      }
    }
  }

  void keep(const GradientRange& g, const F* c, F* partial) const {
    for (int64_t r = 0; r < g.rows; ++r)
      memcpy(partial + g.split * partial_size() + (g.row + r) * columns() + g.first * S, c + r * kChunkStride,
             static_cast<size_t>(g.strips * S) * sizeof(F));
  }
  // Adds a row of all splits into that of the first.
  GradientRange sum(int64_t row, F* partial) const {
    F* out = partial + row * columns();
    for (int64_t split = 1; split < splits; ++split) {
      const F* x = partial + split * partial_size() + row * columns();
      for (int64_t i = 0; i < columns(); i += kWidth<F>) store(out + i, load(out + i) + load(x + i));
    }
    return {row, 1, 0, all_, 0};
  }

 private:
  const SguShape& s_;
  int64_t terms_;
  int64_t half_, all_;  // strips of a bucket's tokens, of all columns
  int64_t chunks_, blocks_;
};

template <class F>
using WriteWeightGradient = void (*)(const Tensor& dweight, const SguShape& s, int64_t strip, int64_t h,
                                     const GradientRange& g, const F* c, int64_t c_stride);

// c to the gradient; what lies above the diagonal becomes 0. S: columns of a strip.
template <class F, class U>
void write_weight_gradient(const Tensor& dweight, const SguShape& s, int64_t S, int64_t h, const GradientRange& g,
                           const F* c, int64_t c_stride) {
  constexpr int W = kWidth<F>;
  const int64_t half = ceil_div(s.w, S);
  for (int64_t r = 0; r < g.rows; ++r) {
    const int64_t row = g.row + r;
    U* out = dweight.as<U>() + h * dweight.stride[0] + row * dweight.stride[1];
    for (int64_t i = 0; i < g.strips; ++i) {
      const int64_t strip = g.first + i;
      const bool own = !s.look_back || strip >= half;
      const int64_t token = (own && s.look_back ? strip - half : strip) * S;
      U* to = out + (own ? s.own : 0) + token;
      for (int v = 0; v < S && token + v < s.w; v += W) {
        const Vec<F> x = load(c + r * c_stride + i * S + v);
        const Vec<F> kept = own ? select(lanes_below<F>(row + 1 - token - v), x, zero<F>()) : x;
        const int64_t n = s.w - token - v;
        if (n >= W)
          store_as<F>(to + v, kept);
        else
          store_as<F>(to + v, kept, static_cast<int>(n));
      }
    }
  }
}

template <class F>
WriteWeightGradient<F> choose_write(DType dtype) {
  if constexpr (kSame<F, double>) {
    return write_weight_gradient<double, double>;
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        return write_weight_gradient<float, BFloat16>;
      case DType::kFloat16:
        return write_weight_gradient<float, Float16>;
      default:
        return write_weight_gradient<float, float>;
    }
  }
}

// One number in the tensor's type.
template <class F>
void store_number(const Tensor& t, int64_t at, F x) {
  Vec<F> v = set1(x);
  if constexpr (kSame<F, double>) {
    store(t.as<double>() + at, v, 1);
  } else {
    switch (t.dtype) {
      case DType::kBFloat16:
        return store_as<float>(t.as<BFloat16>() + at, v, 1);
      case DType::kFloat16:
        return store_as<float>(t.as<Float16>() + at, v, 1);
      default:
        return store(t.as<float>() + at, v, 1);
    }
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
