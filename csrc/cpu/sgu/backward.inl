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

template <class Engine, class T>
class Backward {
 public:
  explicit Backward(const SguParams& params)
      : p(params),
        s(params),
        mix(s, params.weight, true),
        tasks(s, S, mix.blocks()),
        gradient(s, params.dweight),
        write_dweight(choose_write<F>(params.dweight.dtype)) {
    with_activation(p.activation, [&]<Activation A>() { differentiate = differentiate_row<A, F, T>; });
  }

  void run() {
    const bool tiled = Engine::kTiledGradient && p.dweight;
    Parts parts;
    const auto dmix_at = parts.template of<E>(p.dgate || (p.dweight && !tiled) ? s.buckets * dmix_size() : 0);
    const auto tiles_at = parts.template of<E>(tiled ? s.buckets * gradient.tiled_size() : 0);
    const auto gate_at = parts.template of<E>(p.dweight ? s.buckets * gradient.gate_size() : 0);
    const auto sums_at = parts.template of<F>(s.N);
    const auto partial_at = parts.template of<F>(p.dweight ? gradient.partial_size() : 0);
    char* base = thread_scratch(ScratchUse::kShared, parts.total());
    Shared shared{part<E>(base, dmix_at), part<E>(base, tiles_at), part<E>(base, gate_at), part<F>(base, sums_at),
                  part<F>(base, partial_at)};
    if (p.dbias) memset(p.dbias.data, 0, static_cast<size_t>(p.dbias.span_bytes()));
#pragma omp parallel
    {
      Parts own;
      const auto c_at = own.template of<F>(Engine::kBlockRows * kChunkStride);
      const auto panels_at = own.template of<E>(max_of(mix.panels_size(), gradient.panels_size()));
      const auto lines_at = own.template of<E>(S * kLine);
      const auto line_at = own.template of<F>(kLine);
      char* mine = thread_scratch(ScratchUse::kTask, own.total());
      const typename Engine::Session session;
      for (int64_t h = 0; h < s.H; ++h)
        run_head(h, shared, {part<F>(mine, c_at), part<E>(mine, panels_at), part<E>(mine, lines_at), part<F>(mine, line_at)});
    }
  }

 private:
  using E = typename Engine::Element;
  using F = typename Engine::Sum;
  static constexpr int64_t S = Engine::kStrip;
  static constexpr int64_t kLine = kChunkColumns + kWidth<F>;  // off the powers of two

  // What threads share of a head: dmix as strips and as panels, the gate's transpose, sums of dmix by token, partial
  // sums of the weight's gradient.
  struct Shared {
    E *dmix, *tiles, *gate;
    F *sums, *partial;
  };
  // A thread's sums, panels, rows to transpose, and row of dmix.
  struct Own {
    F* c;
    E *panels, *lines;
    F* line;
  };

  const SguParams& p;
  const SguShape s;
  Mix<Engine> mix;
  MixTasks tasks;
  WeightGradient<Engine> gradient;
  F (*differentiate)(const SguParams&, const SguShape&, int64_t, int64_t, int64_t, int64_t, F*);
  WriteWeightGradient<F> write_dweight;

  int64_t chunk_columns() const { return tasks.chunk_strips * S; }
  int64_t dmix_size() const { return tasks.strips * mix.strip_size(); }  // of a bucket

  // By all threads together.
  void run_head(int64_t h, const Shared& shared, const Own& own) const {
    const int64_t row_strips = ceil_div(s.w, S);  // of a bucket's tokens
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.buckets * row_strips; ++task)
      prepare(h, task / row_strips, task % row_strips * S, shared, own);
    if (p.dbias) {
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < s.w; ++row) write_dbias(h, row, shared.sums);
    }
    if (p.dgate) {
      Mix<Engine> product = mix;
      product.begin(h, own.panels);
      const int64_t of_bucket = mix.blocks() * tasks.chunks;
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < s.buckets * of_bucket; ++task)
        compute_dgate(product, h, task / of_bucket, task / tasks.chunks % mix.blocks(), task % tasks.chunks, shared.dmix,
                      own.c);
    }
    if (p.dweight) {
      const E* dmix = Engine::kTiledGradient ? shared.tiles : shared.dmix;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < gradient.tasks(); ++task) {
        const auto range = gradient.compute(gradient.tasks() - 1 - task, dmix, shared.gate, own.panels, own.c);
        if (gradient.splits == 1)
          write_dweight(p.dweight, s, S, h, range, own.c, kChunkStride);
        else
          gradient.keep(range, own.c, shared.partial);
      }
      if (gradient.splits > 1) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s.w; ++row) {
          const auto range = gradient.sum(row, shared.partial);
          write_dweight(p.dweight, s, S, h, range, shared.partial + row * gradient.columns(), gradient.columns());
        }
      }
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < p.dweight.size[1]; ++row) clear_unused(h, row);
    }
#pragma omp barrier
  }

  // S tokens of a bucket, from `row` on: dmix to its strips, the gate's transpose to its strips, sums of dmix.
  void prepare(int64_t h, int64_t bucket, int64_t row, const Shared& shared, const Own& own) const {
    constexpr int64_t G = Engine::kGroup;
    const int64_t count = min_of(S, s.tokens(bucket) - row), first = bucket * s.w + row;
    for (int64_t r = 0; r < count; ++r) shared.sums[first + r] = 0;
    for (int64_t column = 0; column < s.columns; column += kChunkColumns) {
      const int64_t width = min_of(kChunkColumns, s.columns - column), whole = round_to(width, S);
      for (int64_t r = 0; r < round_to(max_of(count, 0), Engine::kUnit); r += G) {
        const E* line[G];
        for (int g = 0; g < G; ++g) {
          E* to = own.lines + g * kLine;
          if (r + g < count) {
            F* d = kSame<E, F> ? reinterpret_cast<F*>(to) : own.line;
            shared.sums[first + r + g] += differentiate(p, s, h, first + r + g, column, width, d);
            if constexpr (!kSame<E, F>) Engine::round_row(own.line, width, to);
          }
          for (int64_t i = r + g < count ? width : 0; i < whole; ++i) to[i] = E{};
          line[g] = to;
        }
        if (p.dgate || (p.dweight && !Engine::kTiledGradient))
          Engine::rows_to_strips(line, whole, row + r, shared.dmix + bucket * dmix_size() + column / S * mix.strip_size(),
                                 mix.strip_size());
        if constexpr (Engine::kTiledGradient) {
          E* tiles = shared.tiles + bucket * gradient.tiled_size();
          if (p.dweight) Engine::rows_to_tiles(line, whole, row + r, column, gradient.terms(), tiles);
        }
      }
      if (p.dweight && count > 0) transpose_gate(h, bucket, row, count, column, width, shared.gate, own.lines);
    }
  }

  void transpose_gate(int64_t h, int64_t bucket, int64_t row, int64_t count, int64_t column, int64_t width, E* gate,
                      E* lines) const {
    const int64_t first = bucket * s.w + row;
    E* to = gate + bucket * gradient.gate_size() + row / S * gradient.gate_strip_size() + column * S;
    if (kSame<E, T> && s.dim % S == 0) {
      for_each_run(s, column, width, [&](int64_t b, int64_t c, int64_t at, int64_t length) {
        const E* x = reinterpret_cast<const E*>(element<T>(p.gate, s, b, first, h, c));
        Engine::rows_to_panel_strip(x, p.gate.stride[1], count, length, to + at * S);
      });
      return;
    }
    for (int64_t r = 0; r < count; ++r)
      load_columns<E, T>(p.gate, s, h, first + r, column, width, round_to(width, S), lines + r * kLine);
    Engine::rows_to_panel_strip(lines, kLine, count, round_to(width, S), to);
  }

  void write_dbias(int64_t h, int64_t row, const F* sums) const {
    F sum = 0;
    for (int64_t n = row; n < s.N; n += s.w) sum += sums[n];
    store_number(p.dbias, h * p.dbias.stride[0] + row * p.dbias.stride[1], sum);
  }

  void compute_dgate(const Mix<Engine>& product, int64_t h, int64_t bucket, int64_t block, int64_t chunk, const E* dmix,
                     F* c) const {
    const int64_t row = block * Engine::kBlockRows, rows = min_of(Engine::kBlockRows, s.tokens(bucket) - row);
    if (rows <= 0) return;
    const int64_t first = chunk * tasks.chunk_strips, column = chunk * chunk_columns();
    product.multiply_block(
        bucket, block, min_of(tasks.chunk_strips, tasks.strips - first),
        [&](int64_t of) { return dmix + of * dmix_size() + first * mix.strip_size(); }, c, kChunkStride);
    for (int64_t r = 0; r < rows; ++r)
      store_columns<F, T>(p.dgate, s, h, bucket * s.w + row + r, column, min_of(chunk_columns(), s.columns - column),
                          c + r * kChunkStride);
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
