// The backward, head by head: d mix = dout residual act'(z) is computed once and packed for both products,
// dgate = tril(W)^T dmix and dW = tril(dmix gate^T). Sums have a fixed order.
#pragma once
#include <string.h>

#include "activation.h"
#include "mix.h"
#include "weight_gradient.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Of one token: dresidual = dout act(z), dmix = dout residual act'(z), columns column .. column + count, to d (and to
// dgate_residual, which it is). Returns the sum of dmix.
template <Activation A, class F, class T>
F differentiate_row(const SguParams& p, const SguShape& s, int64_t h, int64_t n, int64_t column, int64_t count, F* d) {
  constexpr int W = kWidth<F>;
  Vec<F> sum = zero<F>();
  for_each_run(s, column, count, [&](int64_t b, int64_t channel, int64_t at, int64_t length) {
    const T* residual = element<T>(p.residual, s, b, n, h, channel);
    const T* dout = element<T>(p.dout, s, b, n, h, channel);
    const T* z = element<T>(p.z, s, b, n, h, channel);
    T* dresidual = p.dresidual ? element<T>(p.dresidual, s, b, n, h, channel) : nullptr;
    T* dgate_residual = p.dgate_residual ? element<T>(p.dgate_residual, s, b, n, h, channel) : nullptr;
    const auto compute = [&](int64_t i, auto load_t, auto store_t, auto store_f) {
      Vec<F> value, slope;
      activate<A>(load_t(z + i), value, slope);
      const Vec<F> g = load_t(dout + i), dmix = g * load_t(residual + i) * slope;
      if (dresidual) store_t(dresidual + i, g * value);
      if (dgate_residual) store_t(dgate_residual + i, dmix);
      store_f(d + at + i, dmix);
      sum += dmix;
    };
    int64_t i = 0;
    for (; i + W <= length; i += W)
      compute(i, [](const T* x) { return load_as<F>(x); }, [](T* to, Vec<F> x) { store_as<F>(to, x); },
              [](F* to, Vec<F> x) { store(to, x); });
    if (const int rest = static_cast<int>(length - i); rest > 0)
      compute(i, [&](const T* x) { return load_as<F>(x, rest); }, [&](T* to, Vec<F> x) { store_as<F>(to, x, rest); },
              [&](F* to, Vec<F> x) { store(to, x, rest); });
  });
  return reduce_add(sum);
}

template <class F, class T>
HK_INLINE void store_columns(const Tensor& t, const SguShape& s, int64_t h, int64_t n, int64_t column, int64_t count,
                             const F* x) {
  constexpr int W = kWidth<F>;
  for_each_run(s, column, count, [&](int64_t b, int64_t channel, int64_t at, int64_t length) {
    T* out = element<T>(t, s, b, n, h, channel);
    int64_t i = 0;
    for (; i + W <= length; i += W) store_as<F>(out + i, load(x + at + i));
    if (const int rest = static_cast<int>(length - i); rest > 0) store_as<F>(out + i, load(x + at + i, rest), rest);
  });
}

template <class F, class T>
class Backward {
 public:
  explicit Backward(const SguParams& params)
      : p(params), s(params), mix(s, params.weight, true), tasks(s, kStrip<F>, mix.blocks()), gradient(s, params.dweight) {
    with_activation(p.activation, [&]<Activation A>() { differentiate = differentiate_row<A, F, T>; });
    write_dweight = choose_write<F>(p.dweight.dtype);
  }

  void run() {
    const bool packs = p.dgate || p.dweight;
    const int64_t row_strips = ceil_div(s.w, kStrip<F>);  // of a bucket's tokens
    ScratchLayout layout;
    const auto add = [&](bool needed, int64_t floats) { return layout.add(needed ? static_cast<size_t>(floats) * sizeof(F) : 0); };
    const auto dmix_at = add(packs, s.buckets * dmix_floats()), gate_at = add(bool(p.dweight), s.buckets * gradient.gate_floats());
    const auto sums_at = add(bool(p.dbias), s.N), partial_at = add(bool(p.dweight), gradient.partial_floats());
    char* shared = thread_scratch(ScratchUse::kShared, layout.total());
    F* const dmix = reinterpret_cast<F*>(shared + dmix_at);
    F* const gate = reinterpret_cast<F*>(shared + gate_at);
    F* const sums = reinterpret_cast<F*>(shared + sums_at);
    F* const partial = reinterpret_cast<F*>(shared + partial_at);
    if (p.dbias) memset(p.dbias.data, 0, static_cast<size_t>(p.dbias.span_bytes()));
#pragma omp parallel
    {
      ScratchLayout own;
      const auto c_at = own.add(static_cast<size_t>(kBlockRows * c_stride()) * sizeof(F));
      const auto panels_at = own.add(static_cast<size_t>(max_of(mix.panel_floats(), gradient.panel_floats())) * sizeof(F));
      const auto rows_at = own.add(static_cast<size_t>((kStrip<F> + 1) * line()) * sizeof(F));
      char* base = thread_scratch(ScratchUse::kTask, own.total());
      F* const c = reinterpret_cast<F*>(base + c_at);
      F* const panels = reinterpret_cast<F*>(base + panels_at);
      F* const rows = reinterpret_cast<F*>(base + rows_at);
      Mix<F> product = mix;
      for (int64_t h = 0; h < s.H; ++h) {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.buckets * row_strips; ++task)
          prepare(h, task / row_strips, task % row_strips * kStrip<F>, rows, packs ? dmix : nullptr, gate, sums);
        if (p.dbias) {
#pragma omp for schedule(static) nowait
          for (int64_t row = 0; row < s.w; ++row) write_dbias(h, row, sums);
        }
        if (p.dgate) {
          product.begin(h, panels);
          const int64_t units = s.buckets * tasks.blocks * tasks.chunks;
#pragma omp for schedule(dynamic) nowait
          for (int64_t task = 0; task < units; ++task)
            compute_dgate(product, h, task / (tasks.blocks * tasks.chunks), task / tasks.chunks % tasks.blocks,
                          task % tasks.chunks, dmix, c);
        }
        if (p.dweight) {
#pragma omp for schedule(dynamic)
          for (int64_t task = 0; task < gradient.tasks(); ++task) {
            const auto range = gradient.compute(gradient.tasks() - 1 - task, dmix, gate, panels, c, c_stride());
            if (gradient.splits == 1)
              write_dweight(p.dweight, s, h, range, c, c_stride());
            else
              gradient.keep(range, c, c_stride(), partial);
          }
          if (gradient.splits > 1) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.w; ++row) {
              const auto range = gradient.sum(row, partial);
              write_dweight(p.dweight, s, h, range, partial + row * gradient.columns(), gradient.columns());
            }
          }
#pragma omp for schedule(static) nowait
          for (int64_t row = 0; row < p.dweight.size[1]; ++row) clear_unused(h, row);
        }
#pragma omp barrier
      }
    }
  }

 private:
  const SguParams& p;
  const SguShape s;
  Mix<F> mix;
  MixTasks tasks;
  WeightGradient<F> gradient;
  F (*differentiate)(const SguParams&, const SguShape&, int64_t, int64_t, int64_t, int64_t, F*);
  WriteWeightGradient<F> write_dweight;

  int64_t chunk_floats() const { return tasks.chunk_strips * kStrip<F>; }
  int64_t c_stride() const { return kChunkColumns + kWidth<F>; }  // off the powers of two
  int64_t line() const { return kChunkColumns + kWidth<F>; }
  int64_t dmix_floats() const { return tasks.strips * s.w * kStrip<F>; }

  // kStrip tokens of a bucket, from `row` on: dmix to its strips, the gate's transpose to its strips, sums of dmix.
  void prepare(int64_t h, int64_t bucket, int64_t row, F* rows, F* dmix, F* gate, F* sums) const {
    const int64_t count = min_of(kStrip<F>, s.tokens(bucket) - row), first = bucket * s.w + row;
    if (p.dbias)
      for (int64_t r = 0; r < count; ++r) sums[first + r] = 0;
    F* const d = rows + kStrip<F> * line();
    for (int64_t column = 0; column < s.columns; column += kChunkColumns) {
      const int64_t width = min_of(kChunkColumns, s.columns - column), strip = column / kStrip<F>;
      for (int64_t r = 0; r < count; ++r) {
        const F sum = differentiate(p, s, h, first + r, column, width, d);
        if (p.dbias) sums[first + r] += sum;
        if (dmix) row_to_strips(d, width, dmix + bucket * dmix_floats() + (strip * s.w + row + r) * kStrip<F>, s.w);
      }
      if (!p.dweight) continue;
      const int64_t whole = ceil_div(width, kStrip<F>) * kStrip<F>;
      for (int64_t r = 0; r < count; ++r) {
        load_columns<F, T>(p.gate, s, h, first + r, column, width, rows + r * line());
        for (int64_t i = width; i < whole; ++i) rows[r * line() + i] = 0;
      }
      F* to = gate + bucket * gradient.gate_floats() + (row / kStrip<F> * gradient.terms() + column) * kStrip<F>;
      transpose_strip(rows, line(), count, whole, to);
    }
  }

  void write_dbias(int64_t h, int64_t row, const F* sums) const {
    F sum = 0;
    for (int64_t n = row; n < s.N; n += s.w) sum += sums[n];
    const int64_t at = h * p.dbias.stride[0] + row * p.dbias.stride[1];
    store_number(p.dbias, at, sum);
  }

  void compute_dgate(const Mix<F>& product, int64_t h, int64_t bucket, int64_t block, int64_t chunk, const F* dmix,
                     F* c) const {
    const int64_t row = block * kBlockRows, rows = min_of(kBlockRows, s.tokens(bucket) - row);
    if (rows <= 0) return;
    const int64_t first = chunk * tasks.chunk_strips, column = chunk * chunk_floats();
    product.multiply_block(
        bucket, block, min_of(tasks.chunk_strips, tasks.strips - first),
        [&](int64_t of) { return dmix + of * dmix_floats() + first * s.w * kStrip<F>; }, c, c_stride());
    for (int64_t r = 0; r < rows; ++r)
      store_columns<F, T>(p.dgate, s, h, bucket * s.w + row + r, column, min_of(chunk_floats(), s.columns - column),
                          c + r * c_stride());
  }

  // Weights that this length does not reach.
  void clear_unused(int64_t h, int64_t row) const {
    const int64_t bytes = p.dweight.dtype == DType::kFloat64 ? 8 : p.dweight.dtype == DType::kFloat32 ? 4 : 2;
    char* x = p.dweight.as<char>() + (h * p.dweight.stride[0] + row * p.dweight.stride[1]) * bytes;
    const int64_t begin = s.look_back ? 0 : s.own, end = row < s.w ? s.own + s.w : begin;
    memset(x, 0, static_cast<size_t>(begin * bytes));
    memset(x + end * bytes, 0, static_cast<size_t>((p.dweight.size[2] - end) * bytes));
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
