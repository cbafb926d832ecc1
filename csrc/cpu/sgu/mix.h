// The products with the weight: the forward's mix, C = tril(W) X, and the gate's gradient, C = tril(W)^T X.
#pragma once
#include <omp.h>

#include "../scratch.h"
#include "panels.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Rows of a block and terms of a step: the panels of one step stay in the second-level cache, a strip in the first. A
// multiple of kPanelRows; steps are longer than blocks, so that the first step of a triangle reaches every panel.
constexpr int64_t kBlockRows = 192;
template <class F>
constexpr int64_t kStepTerms = 1024 / sizeof(F) < kBlockRows ? kBlockRows : 1024 / sizeof(F);
// Columns that a task computes at most: their sums stay in the second-level cache.
constexpr int64_t kChunkColumns = 1024;
// With a window up to this, a task packs the weight once for all of its buckets.
constexpr int64_t kSmallWindow = 256;

template <class F>
using PackWeight = void (*)(const Tensor& weight, int64_t h, bool transposed, const WeightBlock& g, F* out, int64_t stride);

template <class F, class U>
void pack_weight(const Tensor& weight, int64_t h, bool transposed, const WeightBlock& g, F* out, int64_t stride) {
  const U* x = weight.as<U>() + h * weight.stride[0];
  if (transposed)
    pack_transposed_panels<F, U>(x, weight.stride[1], weight.size[2], g, out, stride);
  else
    pack_panels<F, U>(x, weight.stride[1], g, out, stride);
}

template <class F>
PackWeight<F> choose_pack_weight(DType weight) {
  if constexpr (kSame<F, double>) {
    return pack_weight<double, double>;
  } else {
    switch (weight) {
      case DType::kBFloat16:
        return pack_weight<float, BFloat16>;
      case DType::kFloat16:
        return pack_weight<float, Float16>;
      default:
        return pack_weight<float, float>;
    }
  }
}

template <class F>
class Mix {
 public:
  Mix(const SguShape& shape, const Tensor& weight, bool transposed)
      : s_(shape), weight_(weight), transposed_(transposed), pack_(choose_pack_weight<F>(weight.dtype)) {}

  int64_t blocks() const { return ceil_div(s_.w, kBlockRows); }
  bool keeps_panels() const { return s_.look_back && s_.w <= kSmallWindow; }
  int64_t panel_floats() const { return (keeps_panels() ? blocks() * 2 * steps() : 1) * step_floats(); }

  // Before a task: the head, its room for panels.
  void begin(int64_t h, F* panels) {
    h_ = h;
    panels_ = panels;
    if (!keeps_panels()) return;
    for (int64_t block = 0; block < blocks(); ++block)
      for (int own = 0; own < 2; ++own) {
        const int64_t row = block * kBlockRows, rows = min_of(kBlockRows, s_.w - row);
        for_each_step(row, rows, own, s_.w, [&](int64_t step, int64_t first, int64_t terms) {
          pack(row, rows, own, first, terms, kept(block, own, step));
        });
      }
  }

  // c (rows x strips) = the mix of rows row .. row + rows of a bucket. strips(bucket): where the first strip of a
  // bucket lies; each has s.w rows.
  template <class Strips>
  void multiply_block(int64_t bucket, int64_t block, int64_t n_strips, Strips strips, F* c, int64_t c_stride) const {
    const int64_t row = block * kBlockRows, rows = min_of(kBlockRows, s_.tokens(bucket) - row);
    bool begun = false;
    const int64_t other = transposed_ ? bucket + 1 : bucket - 1;
    const bool has_other = s_.look_back && other >= 0 && other < s_.buckets;
    for (int turn = 0; turn < 2; ++turn) {
      const bool own = transposed_ ? turn == 0 : turn == 1;
      if (!own && !has_other) continue;
      const F* x = strips(own ? bucket : other);
      const int64_t tokens = s_.tokens(own ? bucket : other);
      for_each_step(row, rows, own, tokens, [&](int64_t step, int64_t first, int64_t terms) {
        F* panels = panels_;
        if (keeps_panels())
          panels = kept(block, own, step);
        else
          pack(row, rows, own, first, terms, panels);
        multiply_step(row, rows, own, first, terms, panels, x, n_strips, c, c_stride, begun ? Update::kAdd : Update::kStore);
        begun = true;
      });
    }
  }

 private:
  const SguShape& s_;
  const Tensor& weight_;
  bool transposed_;
  PackWeight<F> pack_;
  int64_t h_ = 0;
  F* panels_ = nullptr;

  int64_t steps() const { return ceil_div(s_.w, kStepTerms<F>); }
  static int64_t step_floats() { return kBlockRows / kPanelRows * panel_stride<F>(kStepTerms<F>); }
  F* kept(int64_t block, int own, int64_t step) const {
    return panels_ + ((block * 2 + own) * steps() + step) * step_floats();
  }

  // The terms of a block, of which there are `tokens`: body(step, first, terms).
  template <class Body>
  HK_INLINE void for_each_step(int64_t row, int64_t rows, bool own, int64_t tokens, Body body) const {
    const int64_t begin = own && transposed_ ? row : 0, end = own && !transposed_ ? row + rows : tokens;
    int64_t step = 0;
    for (int64_t first = begin; first < end; first += kStepTerms<F>)
      body(step++, first, min_of(kStepTerms<F>, end - first));
  }

  void pack(int64_t row, int64_t rows, bool own, int64_t first, int64_t terms, F* panels) const {
    pack_(weight_, h_, transposed_, {row, rows, first, terms, own ? s_.own : 0, own}, panels,
          panel_stride<F>(kStepTerms<F>));
  }

  void multiply_step(int64_t row, int64_t rows, bool own, int64_t first, int64_t terms, const F* panels, const F* x,
                     int64_t n_strips, F* c, int64_t c_stride, Update update) const {
    constexpr int R = kPanelRows, S = kStrip<F>;
    for (int64_t strip = 0; strip < n_strips; ++strip) {
      const F* x_strip = x + strip * s_.w * S;
      for (int64_t p = 0; p < rows; p += R) {
        const int64_t n = min_of(R, rows - p);
        int64_t begin = first, end = first + terms;
        if (own && transposed_) begin = max_of(begin, row + p);
        if (own && !transposed_) end = min_of(end, row + p + n);
        if (begin >= end) continue;
        const F* panel = panels + p / R * panel_stride<F>(kStepTerms<F>) + (begin - first) * R;
        multiply<F, true>(static_cast<int>(n), kStripVectors,
                          {panel, R, x_strip + begin * S, S, end - begin, c + p * c_stride + strip * S, c_stride, update,
                           nullptr});
      }
    }
  }
};

// How the work of the mix is cut into tasks.
struct MixTasks {
  int64_t strips, chunk_strips, chunks;   // of a bucket's columns; of a task
  int64_t range, ranges;                  // buckets of a task, with a window
  int64_t blocks;                         // of rows, without one

  MixTasks(const SguShape& s, int64_t strip_columns, int64_t n_blocks) : blocks(n_blocks) {
    const int64_t wanted = omp_get_max_threads() == 1 ? 1 : 4 * omp_get_max_threads();
    strips = ceil_div(s.columns, strip_columns);
    chunk_strips = min_of(strips, kChunkColumns / strip_columns);
    const int64_t rest = s.H * (s.look_back ? s.buckets : blocks);
    while (rest * ceil_div(strips, chunk_strips) < wanted && chunk_strips > 8) chunk_strips = ceil_div(chunk_strips, 2);
    chunks = ceil_div(strips, chunk_strips);
    range = max_of(1, min_of(32, s.buckets * s.H * chunks / wanted));
    if (!s.look_back) range = 1;
    ranges = ceil_div(s.buckets, range);
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
