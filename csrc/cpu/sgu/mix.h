// The products with the weight: the forward's mix, C = tril(W) X, and the gate's gradient, C = tril(W)^T X.
#pragma once
#include <omp.h>

#include "../attention/products.h"
#include "../scratch.h"
#include "panels.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Columns that a task computes at most: their sums stay in the second-level cache.
constexpr int64_t kChunkColumns = 1024;
constexpr int64_t kChunkStride = kChunkColumns + 16;  // off the powers of two
// The same with a window: two buckets stay there, too.
constexpr int64_t kWindowedColumns = 512;
// With a window up to this, a task packs the weight once for all of its buckets.
constexpr int64_t kSmallWindow = 256;

HK_INLINE bool has_small_window(const SguShape& s) { return s.look_back && s.w <= kSmallWindow; }

// Parts of one buffer, by type.
class Parts : public ScratchLayout {
 public:
  template <class T>
  size_t of(int64_t count) {
    return add(static_cast<size_t>(count) * sizeof(T));
  }
};
template <class T>
HK_INLINE T* part(char* base, size_t at) {
  return reinterpret_cast<T*>(base + at);
}

template <class Engine>
class Mix {
 public:
  using E = typename Engine::Element;
  using F = typename Engine::Sum;

  Mix(const SguShape& shape, const Tensor& weight, bool transposed)
      : s_(shape), weight_(weight), transposed_(transposed) {}

  RowsAhead* ahead = nullptr;  // asked between products

  int64_t blocks() const { return ceil_div(s_.w, Engine::kBlockRows); }
  // About how many products of a panel and a strip a bucket takes.
  int64_t products(int64_t n_strips) const { return n_strips * ceil_div(s_.w, Engine::kPanel) * 2; }
  bool keeps_panels() const { return has_small_window(s_); }
  int64_t panels_size() const { return (keeps_panels() ? blocks() * 2 * steps() : 1) * step_size(); }
  int64_t strip_size() const { return Engine::strip_size(s_.w); }

  // Before the products of a head; panels has room for panels_size().
  void begin(int64_t h, E* panels) {
    h_ = h;
    panels_ = panels;
    if (!keeps_panels()) return;
    for (int64_t block = 0; block < blocks(); ++block)
      for (int own = 0; own < 2; ++own) {
        const int64_t row = block * Engine::kBlockRows, rows = min_of(Engine::kBlockRows, s_.w - row);
        for_each_step(row, rows, own, s_.w, [&](int64_t step, int64_t first, int64_t terms) {
          pack(row, rows, own, first, terms, kept(block, own, step));
        });
      }
  }

  // c (rows x strips) = the mix of a block of rows of a bucket. strips(bucket): where the first strip of a bucket lies.
  template <class Strips>
  void multiply_block(int64_t bucket, int64_t block, int64_t n_strips, Strips strips, F* c, int64_t c_stride) const {
    const int64_t row = block * Engine::kBlockRows, rows = min_of(Engine::kBlockRows, s_.tokens(bucket) - row);
    const int64_t other = transposed_ ? bucket + 1 : bucket - 1;
    const bool has_other = s_.look_back && other >= 0 && other < s_.buckets;
    Update update = Update::kStore;
    for (int turn = 0; turn < 2; ++turn) {
      const bool own = transposed_ ? turn == 0 : turn == 1;
      if (!own && !has_other) continue;
      const E* x = strips(own ? bucket : other);
      const int64_t tokens = s_.tokens(own ? bucket : other);
      for_each_step(row, rows, own, tokens, [&](int64_t step, int64_t first, int64_t terms) {
        E* panels = keeps_panels() ? kept(block, own, step) : panels_;
        if (!keeps_panels()) pack(row, rows, own, first, terms, panels);
        multiply_step({row, rows, first, terms, 0, own}, panels, x, n_strips, c, c_stride, update);
        update = Update::kAdd;
      });
    }
  }

 private:
  const SguShape& s_;
  const Tensor& weight_;
  bool transposed_;
  int64_t h_ = 0;
  E* panels_ = nullptr;

  int64_t steps() const { return ceil_div(s_.w, Engine::kStepTerms); }
  static int64_t step_size() { return Engine::kBlockRows / Engine::kPanel * Engine::panel_size(); }
  E* kept(int64_t block, int own, int64_t step) const {
    return panels_ + ((block * 2 + own) * steps() + step) * step_size();
  }

  // The terms of a block, of which there are `tokens`: body(step, first, terms). The first step of a triangle reaches
  // every panel, as a step is longer than a block.
  template <class Body>
  HK_INLINE void for_each_step(int64_t row, int64_t rows, bool own, int64_t tokens, Body body) const {
    const int64_t begin = own && transposed_ ? row : 0, end = own && !transposed_ ? row + rows : tokens;
    int64_t step = 0;
    for (int64_t first = begin; first < end; first += Engine::kStepTerms)
      body(step++, first, min_of(Engine::kStepTerms, end - first));
  }

  void pack(int64_t row, int64_t rows, bool own, int64_t first, int64_t terms, E* panels) const {
    Engine::pack_weight(weight_, h_, transposed_, {row, rows, first, terms, own ? s_.own : 0, own}, panels);
  }

  void multiply_step(const WeightBlock& g, const E* panels, const E* x, int64_t n_strips, F* c, int64_t c_stride,
                     Update update) const {
    constexpr int64_t R = Engine::kPanel;
    for (int64_t strip = 0; strip < n_strips; ++strip, x += strip_size()) {
      // The strips of a head are too many for the second-level cache: the first products ask for the next one.
      const E* follows = strip + 1 < n_strips ? x + strip_size() + g.first * Engine::kStrip : nullptr;
      const NextStrip<Engine> next(follows, g.terms);
      for (int64_t p = 0; p < g.rows; p += R) {
        const int64_t n = min_of(R, g.rows - p);
        int64_t begin = g.first, end = g.first + g.terms;
        if (g.own && transposed_) begin = max_of(begin, g.row + p);
        if (g.own && !transposed_) end = min_of(end, g.row + p + n);
        if (begin >= end) continue;
        Engine::multiply(n, panels + p / R * Engine::panel_size() + (begin - g.first) * R, x + begin * Engine::kStrip,
                         end - begin, c + p * c_stride + strip * Engine::kStrip, c_stride, update,
                         next.part(p / R));
        if (ahead) ahead->ask();
      }
    }
  }
};

// How the work of the mix is cut into tasks.
struct MixTasks {
  int64_t strips, chunk_strips, chunks;  // of a bucket's columns; of a task
  int64_t range, ranges;                 // buckets of a task, with a window

  MixTasks(const SguShape& s, int64_t strip_columns, int64_t blocks, int64_t most_columns) {
    const int64_t threads = omp_get_max_threads(), wanted = threads == 1 ? 1 : 4 * threads;
    strips = ceil_div(s.columns, strip_columns);
    chunk_strips = min_of(strips, most_columns / strip_columns);
    const int64_t rest = s.look_back ? s.H * ceil_div(s.buckets, kFewBuckets) : blocks;
    while (rest * ceil_div(strips, chunk_strips) < wanted && chunk_strips > 8) chunk_strips = ceil_div(chunk_strips, 2);
    chunks = ceil_div(strips, chunk_strips);
    range = s.look_back ? max_of(kFewBuckets, min_of(kManyBuckets, ceil_div(s.buckets * s.H * chunks, wanted))) : 1;
    ranges = ceil_div(s.buckets, range);
    range = ceil_div(s.buckets, ranges);
    heads = s.H;
  }
  // Heads change fastest: the channels of the next head follow in memory, and some of them have been prefetched.
  int64_t head(int64_t task) const { return task % heads; }
  int64_t chunk(int64_t task) const { return task / heads % chunks; }
  int64_t first_bucket(int64_t task) const { return task / (heads * chunks) * range; }
  // The tasks of a head, and their numbers.
  int64_t of_head() const { return ranges * chunks; }
  int64_t slot(int64_t task) const { return head(task) * of_head() + task / heads; }

 private:
  int64_t heads;
  // A task packs the weight, and one bucket more than it computes.
  static constexpr int64_t kFewBuckets = 4, kManyBuckets = 8;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
