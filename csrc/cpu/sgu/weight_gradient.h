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

template <class F>
class WeightGradient {
 public:
  int64_t splits = 1;  // of the buckets; their partial sums are added in order

  WeightGradient(const SguShape& shape, const Tensor& dweight)
      : s_(shape), half_(ceil_div(shape.w, kStrip<F>)), all_(half_ * (shape.look_back ? 2 : 1)) {
    constexpr int64_t most = kChunkColumns / kStrip<F>;
    chunks_ = ceil_div(all_, most);
    blocks_ = ceil_div(s_.w, kBlockRows);
    const int64_t threads = omp_get_max_threads();
    if (dweight && threads > 1) splits = max_of(1, min_of(s_.buckets, 2 * threads / (blocks_ * chunks_)));
  }

  int64_t terms() const { return ceil_div(s_.columns, kStrip<F>) * kStrip<F>; }
  int64_t columns() const { return all_ * kStrip<F>; }
  int64_t gate_floats() const { return half_ * terms() * kStrip<F>; }  // of a bucket
  int64_t panel_floats() const { return kBlockRows / kPanelRows * panel_stride<F>(kStepTerms<F>); }
  int64_t partial_floats() const { return splits > 1 ? splits * s_.w * columns() : 0; }
  int64_t tasks() const { return splits * blocks_ * chunks_; }

  // dmix: strips of rows; gate: strips of columns, [bucket][strip of tokens][column][kStrip].
  GradientRange compute(int64_t task, const F* dmix, const F* gate, F* panels, F* c, int64_t c_stride) const {
    constexpr int64_t most = kChunkColumns / kStrip<F>;
    const int64_t chunk = task % chunks_, block = task / chunks_ % blocks_, split = task / (chunks_ * blocks_);
    GradientRange g{block * kBlockRows, 0, chunk * most, min_of(most, all_ - chunk * most), split};
    g.rows = min_of(kBlockRows, s_.w - g.row);
    for (int64_t r = 0; r < g.rows; ++r) memset(c + r * c_stride, 0, static_cast<size_t>(g.strips * kStrip<F>) * sizeof(F));
    if (!s_.look_back && g.first * kStrip<F> >= g.row + g.rows) return g;  // above the diagonal
    const int64_t end = s_.buckets * (split + 1) / splits;
    for (int64_t bucket = s_.buckets * split / splits; bucket < end; ++bucket) {
      const int64_t rows = min_of(g.rows, s_.tokens(bucket) - g.row);
      if (rows <= 0) continue;
      const F* x = dmix + bucket * terms() * s_.w;
      for (int64_t first = 0; first < terms(); first += kStepTerms<F>) {
        const int64_t count = min_of(kStepTerms<F>, terms() - first);
        pack_panels_of_rows(x, g.row, rows, first, count, panels);
        for (int64_t i = 0; i < g.strips; ++i) {
          const int64_t strip = g.first + i;
          const bool own = !s_.look_back || strip >= half_;
          if (!own && bucket == 0) continue;
          const int64_t token_strip = own && s_.look_back ? strip - half_ : strip;
          const F* y = gate + (own ? bucket : bucket - 1) * gate_floats() + (token_strip * terms() + first) * kStrip<F>;
          multiply_strip(own ? token_strip * kStrip<F> - g.row : -1, rows, count, panels, y, c + i * kStrip<F>, c_stride);
        }
      }
    }
    return g;
  }

  void keep(const GradientRange& g, const F* c, int64_t c_stride, F* partial) const {
    for (int64_t r = 0; r < g.rows; ++r)
      memcpy(partial + (g.split * s_.w + g.row + r) * columns() + g.first * kStrip<F>, c + r * c_stride,
             static_cast<size_t>(g.strips * kStrip<F>) * sizeof(F));
  }
  // Adds a row of all splits into that of the first.
  GradientRange sum(int64_t row, F* partial) const {
    F* out = partial + row * columns();
    for (int64_t split = 1; split < splits; ++split) {
      const F* x = partial + (split * s_.w + row) * columns();
      for (int64_t i = 0; i < columns(); i += kWidth<F>) store(out + i, load(out + i) + load(x + i));
    }
    return {row, 1, 0, all_, 0};
  }

 private:
  const SguShape& s_;
  int64_t half_, all_;  // strips of a bucket's tokens, of all columns
  int64_t chunks_, blocks_;

  // Rows of dmix as panels[column][row].
  void pack_panels_of_rows(const F* dmix, int64_t row, int64_t rows, int64_t first, int64_t count, F* out) const {
    constexpr int W = kWidth<F>, R = kPanelRows, S = kStrip<F>;
    for (int64_t p = 0; p < rows; p += R, out += panel_stride<F>(kStepTerms<F>)) {
      const int64_t n = min_of(R, rows - p);
      for (int64_t t = 0; t < count; t += W) {
        const F* x = dmix + ((first + t) / S * s_.w + row + p) * S + (first + t) % S;
        if constexpr (R <= W) {
          Vec<F> block[W];
#pragma GCC unroll 16
          for (int r = 0; r < W; ++r) block[r] = r < n ? load(x + r * S) : zero<F>();
          transpose<F>(block);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(out + (t + i) * R, block[i]);
        } else {
          for (int i = 0; i < W; ++i)
            for (int64_t r = 0; r < R; ++r) out[(t + i) * R + r] = r < n ? x[r * S + i] : F(0);
        }
      }
    }
  }

  // diagonal: the strip's first column, relative to the first row; rows before it see nothing of the strip.
  static void multiply_strip(int64_t diagonal, int64_t rows, int64_t count, const F* panels, const F* y, F* c,
                             int64_t c_stride) {
    constexpr int R = kPanelRows;
    const int64_t begin = diagonal <= 0 ? 0 : diagonal / R * R;
    for (int64_t p = begin; p < rows; p += R)
      multiply<F, true>(static_cast<int>(min_of(R, rows - p)), kStripVectors,
                        {panels + p / R * panel_stride<F>(kStepTerms<F>), R, y, kStrip<F>, count, c + p * c_stride, c_stride,
                         Update::kAdd, nullptr});
  }
};

template <class F>
using WriteWeightGradient = void (*)(const Tensor& dweight, const SguShape& s, int64_t h, const GradientRange& g, const F* c,
                                     int64_t c_stride);

// c to the gradient; what lies above the diagonal becomes 0.
template <class F, class U>
void write_weight_gradient(const Tensor& dweight, const SguShape& s, int64_t h, const GradientRange& g, const F* c,
                           int64_t c_stride) {
  constexpr int W = kWidth<F>, S = kStrip<F>;
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
