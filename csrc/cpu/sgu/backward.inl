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
template <Activation A, class F, class T, class E>
F differentiate_row(const SguParams& p, const SguShape& s, int64_t h, int64_t n, int64_t column, int64_t count, E* d,
                    bool streamed) {
  constexpr int W = kWidth<F>;
  Vec<F> sum = zero<F>();
  for_each_run(s, column, count, [&](int64_t b, int64_t channel, int64_t at, int64_t length) {
    const T* residual = element<T>(p.residual, s, b, n, h, channel);
    const T* dout = element<T>(p.dout, s, b, n, h, channel);
    const T* z = element<T>(p.z, s, b, n, h, channel);
    T* dresidual = p.dresidual ? element<T>(p.dresidual, s, b, n, h, channel) : nullptr;
    T* dgate_residual = p.dgate_residual ? element<T>(p.dgate_residual, s, b, n, h, channel) : nullptr;
    prefetch_ahead(p.residual, residual, n, length);
    prefetch_ahead(p.dout, dout, n, length);
    prefetch_ahead(p.z, z, n, length);
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
      compute(i, [](const T* x) { return load_as<F>(x); }, [&](T* to, Vec<F> x) { put<F>(to, x, streamed); },
              [](E* to, Vec<F> x) { put<F>(to, x, false); });
    if (const int rest = static_cast<int>(length - i); rest > 0)
      compute(i, [&](const T* x) { return load_as<F>(x, rest); }, [&](T* to, Vec<F> x) { store_as<F>(to, x, rest); },
              [&](E* to, Vec<F> x) { store_as<F>(to, x, rest); });
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
        tasks(s, S, mix.blocks(), has_small_window(s) ? kWindowedColumns : kChunkColumns),
        gradient(s, params.dweight),
        streamed((!p.dresidual || worth_streaming<T>(p.dresidual, s)) &&
                 (!p.dgate_residual || worth_streaming<T>(p.dgate_residual, s))),
        stream_dgate(worth_streaming<T>(p.dgate, s)),
        write_dweight(choose_write<F>(params.dweight.dtype)) {
    with_activation(p.activation, [&]<Activation A>() { differentiate = differentiate_row<A, F, T, E>; });
    if (has_small_window(s)) gradient.splits = p.dweight ? tasks.chunks * tasks.ranges : 1;
  }

  void run() {
    if (p.dbias) memset(p.dbias.data, 0, static_cast<size_t>(p.dbias.span_bytes()));
    has_small_window(s) ? run_windowed() : run_by_heads();
  }

 private:
  using E = typename Engine::Element;
  using F = typename Engine::Sum;
  static constexpr int64_t S = Engine::kStrip;
  static constexpr int64_t kLine = kChunkColumns + kWidth<F>;  // off the powers of two

  const SguParams& p;
  const SguShape s;
  Mix<Engine> mix;
  MixTasks tasks;
  WeightGradient<Engine> gradient;
  const bool streamed, stream_dgate;  // results are written past the caches
  F (*differentiate)(const SguParams&, const SguShape&, int64_t, int64_t, int64_t, int64_t, E*, bool);
  WriteWeightGradient<F> write_dweight;

  int64_t chunk_columns() const { return tasks.chunk_strips * S; }
  int64_t columns_of(int64_t chunk) const { return min_of(chunk_columns(), s.columns - chunk * chunk_columns()); }
  bool needs_strips() const { return p.dgate || (p.dweight && !Engine::kTiledGradient); }
  bool needs_tiles() const { return p.dweight && Engine::kTiledGradient; }

  // What is computed of a bucket before its products: dmix as strips and as tiles, the gate's transpose, the sums of
  // dmix by token. Not computed where null.
  struct Prepared {
    E *dmix, *tiles, *gate;
    F* sums;
  };
  // A thread's sums, panels, and rows to transpose.
  struct Own {
    F* c;
    E *panels, *lines;
  };
  struct OwnParts {
    size_t c, panels, lines;
    template <class Backward>
    OwnParts(Parts& parts, const Backward& f)
        : c(parts.of<F>(Engine::kBlockRows * kChunkStride)),
          panels(parts.of<E>(max_of(f.mix.panels_size(), f.gradient.panels_size()))),
          lines(parts.of<E>(S * kLine)) {}
    Own at(char* base) const { return {part<F>(base, c), part<E>(base, panels), part<E>(base, lines)}; }
  };

  // ---- one head after another, by all threads together ----

  void run_by_heads() {
    Parts parts;
    const auto dmix_at = parts.template of<E>(needs_strips() ? s.buckets * tasks.strips * mix.strip_size() : 0);
    const auto tiles_at = parts.template of<E>(needs_tiles() ? s.buckets * gradient.dmix_size() : 0);
    const auto gate_at = parts.template of<E>(p.dweight ? s.buckets * gradient.gate_size() : 0);
    const auto sums_at = parts.template of<F>(s.N);
    const int64_t kept_apart = p.dweight && gradient.splits > 1 ? gradient.splits : 0;
    const auto partial_at = parts.template of<F>(kept_apart * gradient.partial_size());
    char* base = thread_scratch(ScratchUse::kShared, parts.total());
    const Prepared prepared{part<E>(base, dmix_at), part<E>(base, tiles_at), part<E>(base, gate_at),
                            part<F>(base, sums_at)};
#pragma omp parallel
    {
      Parts own;
      const OwnParts own_parts(own, *this);
      const Own mine = own_parts.at(thread_scratch(ScratchUse::kTask, own.total()));
      const typename Engine::Session session;
      for (int64_t h = 0; h < s.H; ++h) run_head(h, prepared, part<F>(base, partial_at), mine);
    }
  }

  void run_head(int64_t h, const Prepared& all, F* partial, const Own& own) const {
    const int64_t row_strips = ceil_div(s.w, S), dmix_size = tasks.strips * mix.strip_size();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.buckets * row_strips; ++task) {
      const int64_t bucket = task / row_strips;
      const Prepared to{needs_strips() ? all.dmix + bucket * dmix_size : nullptr,
                        needs_tiles() ? all.tiles + bucket * gradient.dmix_size() : nullptr,
                        p.dweight ? all.gate + bucket * gradient.gate_size() : nullptr, all.sums + bucket * s.w};
      prepare(p, h, bucket, task % row_strips * S, 0, s.columns, gradient, to, own);
    }
    if (p.dbias) {
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < s.w; ++row) write_dbias(h, row, all.sums, s.w, s.N);
    }
    if (p.dgate) {
      Mix<Engine> product = mix;
      product.begin(h, own.panels);
      const int64_t of_bucket = mix.blocks() * tasks.chunks;
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < s.buckets * of_bucket; ++task) {
        const int64_t chunk = task % tasks.chunks, skipped = chunk * tasks.chunk_strips * mix.strip_size();
        compute_dgate(product, h, task / of_bucket, task / tasks.chunks % mix.blocks(), chunk,
                      [&](int64_t bucket) { return all.dmix + bucket * dmix_size + skipped; }, own.c);
      }
    }
    if (p.dweight) {
      const E* dmix = Engine::kTiledGradient ? all.tiles : all.dmix;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < gradient.tasks(); ++task) {
        const auto range = gradient.compute(gradient.tasks() - 1 - task, dmix, all.gate, own.panels, own.c);
        if (gradient.splits == 1)
          write_dweight(p.dweight, s, S, h, range, own.c, kChunkStride);
        else
          gradient.keep(range, own.c, partial);
      }
      if (gradient.splits > 1) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s.w; ++row) add_splits(h, row, partial);
      }
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < p.dweight.size[1]; ++row) clear_unused(h, row);
    }
#pragma omp barrier
  }

  // ---- small windows: a task takes its buckets one after another; what it prepares of two is in cache ----

  void run_windowed() {
    const int64_t n_tasks = s.H * tasks.chunks * tasks.ranges, partial_size = p.dweight ? gradient.partial_size() : 0;
    const int64_t dmix_size = tasks.chunk_strips * mix.strip_size();
    const auto narrow = gradient.of_columns(chunk_columns());
    Parts parts;
    const auto partial_at = parts.template of<F>(n_tasks * partial_size), sums_at = parts.template of<F>(n_tasks * s.w);
    char* base = thread_scratch(ScratchUse::kShared, parts.total());
    F* const partial = part<F>(base, partial_at);
    F* const sums = part<F>(base, sums_at);
#pragma omp parallel
    {
      Parts own;
      const OwnParts own_parts(own, *this);
      const auto dmix_at = own.template of<E>(needs_strips() ? 2 * dmix_size : 0);
      const auto tiles_at = own.template of<E>(needs_tiles() ? narrow.dmix_size() : 0);
      const auto gate_at = own.template of<E>(p.dweight ? 2 * narrow.gate_size() : 0);
      const auto row_sums_at = own.template of<F>(s.w);
      char* mine = thread_scratch(ScratchUse::kTask, own.total());
      const Prepared ring{part<E>(mine, dmix_at), part<E>(mine, tiles_at), part<E>(mine, gate_at),
                          part<F>(mine, row_sums_at)};
      const Own buffers = own_parts.at(mine);
      Mix<Engine> product = mix;
      RowsAhead ahead;
      product.ahead = &ahead;
      const typename Engine::Session session;
      int64_t packed_head = -1;
      // The panels of the weight are kept: those of dmix need room of their own.
      Parts more;
      const auto panels_at = more.template of<E>(gradient.panels_size());
      E* const panels = part<E>(thread_scratch(ScratchUse::kBias, more.total()), panels_at);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < n_tasks; ++task) {
        const int64_t h = tasks.head(task);
        if (p.dgate && h != packed_head) product.begin(packed_head = h, buffers.panels);
        const int64_t slot = tasks.slot(task);
        run_range(task, product, ring, buffers, panels, partial + slot * partial_size, sums + slot * s.w);
      }
      const int64_t of_head = tasks.of_head();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < s.H * s.w; ++i) {
        const int64_t h = i / s.w, row = i % s.w;
        if (p.dweight) add_splits(h, row, partial + h * of_head * partial_size);
        if (p.dbias) write_dbias(h, row, sums + h * of_head * s.w, s.w, of_head * s.w);
      }
    }
  }

  void run_range(int64_t task, const Mix<Engine>& product, const Prepared& ring, const Own& own, E* panels, F* partial,
                 F* sums) const {
    const int64_t h = tasks.head(task), chunk = tasks.chunk(task), begin = tasks.first_bucket(task);
    const int64_t end = min_of(begin + tasks.range, s.buckets), width = columns_of(chunk);
    const int64_t dmix_size = tasks.chunk_strips * mix.strip_size(), c_stride = gradient.columns();
    const auto narrow = gradient.of_columns(width);
    const int64_t n_products = product.products(ceil_div(width, S));
    SguParams quiet = p;  // the bucket after the last is another task's to write
    quiet.dresidual = quiet.dgate_residual = Tensor{};
    const auto dmix = [&](int64_t bucket) { return ring.dmix + bucket % 2 * dmix_size; };
    const auto gate = [&](int64_t bucket) { return ring.gate + bucket % 2 * narrow.gate_size(); };
    memset(sums, 0, static_cast<size_t>(s.w) * sizeof(F));
    if (p.dweight) memset(partial, 0, static_cast<size_t>(gradient.partial_size()) * sizeof(F));
    if (p.dweight && begin > 0)
      for (int64_t row = 0; row < s.w; row += S)
        transpose_gate(h, begin - 1, row, min_of(S, s.w - row), chunk * chunk_columns(), width, narrow, gate(begin - 1),
                       own.lines);
    for (int64_t bucket = begin; bucket <= end; ++bucket) {
      const bool mine = bucket < end;
      if (bucket < s.buckets && (mine || p.dgate)) {
        const Prepared to{needs_strips() ? dmix(bucket) : nullptr, mine && needs_tiles() ? ring.tiles : nullptr,
                          mine && p.dweight ? gate(bucket) : nullptr, ring.sums};
        for (int64_t row = 0; row < s.tokens(bucket); row += S)
          prepare(mine ? p : quiet, h, bucket, row, chunk * chunk_columns(), width, narrow, to, own);
      }
      if (mine)
        for (int64_t row = 0; row < s.tokens(bucket); ++row) sums[row] += ring.sums[row];
      aim_at_next(*product.ahead, task, bucket + 1, n_products);
      if (p.dgate && bucket > begin)
        for (int64_t block = 0; block < mix.blocks(); ++block)
          compute_dgate(product, h, bucket - 1, block, chunk, dmix, own.c);
      if (mine && p.dweight)
        for (int64_t block = 0; block < gradient.blocks(); ++block) {
          const int64_t row = block * Engine::kBlockRows;
          const GradientRange g{row, min_of(Engine::kBlockRows, s.w - row), 0, c_stride / S, 0};
          narrow.add_bucket(g, s.tokens(bucket), Engine::kTiledGradient ? ring.tiles : dmix(bucket), gate(bucket),
                            bucket > 0 ? gate(bucket - 1) : nullptr, panels, partial + row * c_stride, c_stride,
                            product.ahead);
        }
    }
  }

  // Inputs of a task's next bucket, to be asked for during so many products.
  void aim_at_next(RowsAhead& ahead, int64_t task, int64_t bucket, int64_t n_products) const {
    const int64_t end = tasks.first_bucket(task) + tasks.range, chunk = tasks.chunk(task);
    const bool needed = bucket < s.buckets && (bucket < end || (bucket == end && p.dgate));
    ahead.aim(s, tasks.head(task), bucket * s.w, needed ? s.tokens(bucket) : 0, chunk * chunk_columns(),
              columns_of(chunk));
    ahead.add(p.dout);
    ahead.add(p.residual);
    ahead.add(p.z);
    if (p.dweight && bucket < end) ahead.add(p.gate);
    if (bucket < end && !streamed) ahead.add(p.dresidual, true), ahead.add(p.dgate_residual, true);
    if (bucket < end && !stream_dgate) ahead.add(p.dgate, true);
    ahead.spread(n_products);
  }

  // ---- parts of both ----

  // S tokens of a bucket from `row` on, `count` columns from `first_column` on, which are all that g and `to` know.
  void prepare(const SguParams& q, int64_t h, int64_t bucket, int64_t row, int64_t first_column, int64_t count,
               const WeightGradient<Engine>& g, const Prepared& to, const Own& own) const {
    constexpr int64_t G = Engine::kGroup;
    const int64_t rows = min_of(S, s.tokens(bucket) - row), token = bucket * s.w + row;
    for (int64_t r = 0; r < rows; ++r) to.sums[row + r] = 0;
    for (int64_t at = 0; at < count; at += kChunkColumns) {
      const int64_t width = min_of(kChunkColumns, count - at), whole = round_to(width, S);
      for (int64_t r = 0; r < round_to(max_of(rows, 0), Engine::kUnit); r += G) {
        const E* line[G];
        for (int i = 0; i < G; ++i) {
          E* x = own.lines + i * kLine;
          const bool there = r + i < rows;
          if (there)
            to.sums[row + r + i] += differentiate(q, s, h, token + r + i, first_column + at, width, x, streamed);
          for (int64_t column = there ? width : 0; column < whole; ++column) x[column] = E{};
          line[i] = x;
        }
        if (to.dmix) {
          E* const strips = to.dmix + at / S * mix.strip_size();
          Engine::rows_to_strips(line, whole, row + r, strips, mix.strip_size());
        }
        if constexpr (Engine::kTiledGradient)
          if (to.tiles) Engine::rows_to_tiles(line, whole, row + r, at, g.terms(), to.tiles);
      }
      if (to.gate && rows > 0)
        transpose_gate(h, bucket, row, rows, first_column + at, width, g, to.gate + at * S, own.lines);
    }
    if (streamed) stream_fence();
  }

  // gate: that of the bucket, at the first of these columns.
  void transpose_gate(int64_t h, int64_t bucket, int64_t row, int64_t rows, int64_t column, int64_t width,
                      const WeightGradient<Engine>& g, E* gate, E* lines) const {
    const int64_t token = bucket * s.w + row;
    E* to = gate + row / S * g.gate_strip_size();
    if (kSame<E, T> && s.dim % S == 0) {
      for_each_run(s, column, width, [&](int64_t b, int64_t c, int64_t at, int64_t length) {
        const E* x = reinterpret_cast<const E*>(element<T>(p.gate, s, b, token, h, c));
        Engine::rows_to_panel_strip(x, p.gate.stride[1], rows, length, to + at * S);
      });
      return;
    }
    for (int64_t r = 0; r < rows; ++r)
      load_columns<E, T>(p.gate, s, h, token + r, column, width, round_to(width, S), lines + r * kLine);
    Engine::rows_to_panel_strip(lines, kLine, rows, round_to(width, S), to);
  }

  void add_splits(int64_t h, int64_t row, F* partial) const {
    const auto range = gradient.sum(row, partial);
    write_dweight(p.dweight, s, S, h, range, partial + row * gradient.columns(), gradient.columns());
  }

  // The sum of every step-th of n sums.
  void write_dbias(int64_t h, int64_t row, const F* sums, int64_t step, int64_t n) const {
    F sum = 0;
    for (int64_t i = row; i < n; i += step) sum += sums[i];
    store_number(p.dbias, h * p.dbias.stride[0] + row * p.dbias.stride[1], sum);
  }

  template <class Strips>
  void compute_dgate(const Mix<Engine>& product, int64_t h, int64_t bucket, int64_t block, int64_t chunk, Strips strips,
                     F* c) const {
    const int64_t row = block * Engine::kBlockRows, rows = min_of(Engine::kBlockRows, s.tokens(bucket) - row);
    if (rows <= 0) return;
    product.multiply_block(bucket, block, ceil_div(columns_of(chunk), S), strips, c, kChunkStride);
    for (int64_t r = 0; r < rows; ++r)
      store_columns<F, T>(p.dgate, s, h, bucket * s.w + row + r, chunk * chunk_columns(), columns_of(chunk),
                          c + r * kChunkStride, stream_dgate);
    if (stream_dgate) stream_fence();
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
