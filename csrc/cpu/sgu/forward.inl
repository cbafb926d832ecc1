// The forward: the mix of a block of rows, and while its sums are in cache, all that follows.
#pragma once
#include "activation.h"
#include "mix.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// out = act(c + bias + gate_residual) * residual, of one token; c holds columns column .. column + count.
template <Activation A, class F, class T>
void finish_row(const SguParams& p, const SguShape& s, int64_t h, int64_t n, F bias, const F* c, int64_t column,
                int64_t count, bool streamed) {
  constexpr int W = kWidth<F>;
  for_each_run(s, column, count, [&](int64_t b, int64_t channel, int64_t at, int64_t length) {
    const T* residual = element<T>(p.residual, s, b, n, h, channel);
    const T* gate_residual = p.gate_residual ? element<T>(p.gate_residual, s, b, n, h, channel) : nullptr;
    T* out = element<T>(p.out, s, b, n, h, channel);
    T* z = p.z ? element<T>(p.z, s, b, n, h, channel) : nullptr;
    prefetch_ahead(p.residual, residual, n, length);
    if (gate_residual) prefetch_ahead(p.gate_residual, gate_residual, n, length);
    const auto compute = [&](int64_t i, auto load_t, auto store_t) {
      Vec<F> x = load(c + at + i) + bias, value, slope;
      if (gate_residual) x += load_t(gate_residual + i);
      if (z) store_t(z + i, x);
      activate<A>(x, value, slope);
      store_t(out + i, value * load_t(residual + i));
    };
    int64_t i = 0;
    for (; i + W <= length; i += W)
      compute(i, [](const T* x) { return load_as<F>(x); }, [&](T* to, Vec<F> x) { put<F>(to, x, streamed); });
    if (const int rest = static_cast<int>(length - i); rest > 0)
      compute(i, [&](const T* x) { return load_as<F>(x, rest); }, [&](T* to, Vec<F> x) { store_as<F>(to, x, rest); });
  });
}

template <class F>
HK_INLINE F bias_of(const Tensor& bias, int64_t h, int64_t row) {
  const int64_t at = h * bias.stride[0] + row * bias.stride[1];
  switch (bias.dtype) {
    case DType::kFloat64:
      return static_cast<F>(bias.as<double>()[at]);
    case DType::kBFloat16:
      return static_cast<F>(to_float(bias.as<BFloat16>()[at]));
    case DType::kFloat16:
      return static_cast<F>(to_float(bias.as<Float16>()[at]));
    default:
      return static_cast<F>(bias.as<float>()[at]);
  }
}

template <class Engine, class T>
class Forward {
 public:
  explicit Forward(const SguParams& params)
      : p(params),
        s(params),
        mix(s, params.weight, false),
        tasks(s, Engine::kStrip, mix.blocks(), s.look_back ? kWindowedColumns : kChunkColumns),
        streamed(worth_streaming<T>(p.out, s) && (!p.z || worth_streaming<T>(p.z, s))) {
    with_activation(p.activation, [&]<Activation A>() { finish = finish_row<A, F, T>; });
  }
  void run() { s.look_back ? run_windowed() : run_global(); }

 private:
  using E = typename Engine::Element;
  using F = typename Engine::Sum;

  const SguParams& p;
  const SguShape s;
  Mix<Engine> mix;
  MixTasks tasks;
  const bool streamed;  // results are written past the caches
  void (*finish)(const SguParams&, const SguShape&, int64_t, int64_t, F, const F*, int64_t, int64_t, bool);

  int64_t chunk_columns() const { return tasks.chunk_strips * Engine::kStrip; }
  int64_t columns_of(int64_t chunk) const { return min_of(chunk_columns(), s.columns - chunk * chunk_columns()); }

  void finish_block(int64_t h, int64_t bucket, int64_t block, int64_t chunk, const F* c) const {
    const int64_t row = block * Engine::kBlockRows, rows = min_of(Engine::kBlockRows, s.tokens(bucket) - row);
    for (int64_t r = 0; r < rows; ++r)
      finish(p, s, h, bucket * s.w + row + r, bias_of<F>(p.bias, h, row + r), c + r * kChunkStride,
             chunk * chunk_columns(), columns_of(chunk), streamed);
    if (streamed) stream_fence();
  }

  // The gate of a head is packed once and read by all blocks of rows.
  void run_global() {
    const int64_t strip_size = mix.strip_size();
    Parts shared;
    const auto strips_at = shared.template of<E>(tasks.strips * strip_size);
    E* const strips = part<E>(thread_scratch(ScratchUse::kShared, shared.total()), strips_at);
#pragma omp parallel
    {
      Parts own;
      const auto c_at = own.template of<F>(Engine::kBlockRows * kChunkStride);
      const auto panels_at = own.template of<E>(mix.panels_size());
      const auto lines_at = own.template of<E>(Engine::kGroup * chunk_columns());
      char* base = thread_scratch(ScratchUse::kTask, own.total());
      F* const c = part<F>(base, c_at);
      Mix<Engine> product = mix;
      const typename Engine::Session session;
      for (int64_t h = 0; h < s.H; ++h) {
        constexpr int64_t kRows = 64;
        const int64_t parts = ceil_div(s.N, kRows);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < parts * tasks.chunks; ++task) {
          const int64_t first = task % parts * kRows, chunk = task / parts;
          pack_strips<Engine, T>(p.gate, s, h, first, min_of(kRows, s.N - first), first, chunk * chunk_columns(),
                                 columns_of(chunk), part<E>(base, lines_at),
                                 strips + chunk * tasks.chunk_strips * strip_size, strip_size);
        }
        product.begin(h, part<E>(base, panels_at));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < mix.blocks() * tasks.chunks; ++task) {
          const int64_t block = mix.blocks() - 1 - task / tasks.chunks;  // the longest first
          const int64_t chunk = task % tasks.chunks;
          const int64_t first = chunk * tasks.chunk_strips;
          product.multiply_block(0, block, min_of(tasks.chunk_strips, tasks.strips - first),
                                 [&](int64_t) { return strips + first * strip_size; }, c, kChunkStride);
          finish_block(h, 0, block, chunk, c);
        }
      }
    }
  }

  // A task packs the gate of its buckets itself, one after another: two are in cache.
  void run_windowed() {
    const int64_t bucket_size = tasks.chunk_strips * mix.strip_size();
#pragma omp parallel
    {
      Parts own;
      const auto c_at = own.template of<F>(Engine::kBlockRows * kChunkStride);
      const auto panels_at = own.template of<E>(mix.panels_size());
      const auto lines_at = own.template of<E>(Engine::kGroup * chunk_columns());
      const auto strips_at = own.template of<E>(2 * bucket_size);
      char* base = thread_scratch(ScratchUse::kTask, own.total());
      F* const c = part<F>(base, c_at);
      E* const strips = part<E>(base, strips_at);
      Mix<Engine> product = mix;
      RowsAhead ahead;
      product.ahead = &ahead;
      const typename Engine::Session session;
      int64_t packed_head = -1;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < s.H * tasks.chunks * tasks.ranges; ++task) {
        const int64_t h = tasks.head(task), chunk = tasks.chunk(task);
        const int64_t n_strips = ceil_div(columns_of(chunk), Engine::kStrip);
        const auto bucket_strips = [&](int64_t bucket) { return strips + bucket % 2 * bucket_size; };
        if (h != packed_head) product.begin(packed_head = h, part<E>(base, panels_at));
        const int64_t begin = tasks.first_bucket(task), end = min_of(begin + tasks.range, s.buckets);
        for (int64_t bucket = max_of(begin - 1, 0); bucket < end; ++bucket) {
          pack_strips<Engine, T>(p.gate, s, h, bucket * s.w, s.tokens(bucket), 0, chunk * chunk_columns(),
                                 columns_of(chunk), part<E>(base, lines_at), bucket_strips(bucket), mix.strip_size());
          if (bucket < begin) continue;
          ahead.aim(s, h, bucket * s.w, s.tokens(bucket), chunk * chunk_columns(), columns_of(chunk));
          ahead.add(p.residual);
          ahead.add(p.gate_residual);
          if (!streamed) ahead.add(p.out, true), ahead.add(p.z, true);
          ahead.spread(product.products(n_strips));
          for (int64_t block = 0; block * Engine::kBlockRows < s.tokens(bucket); ++block) {
            product.multiply_block(bucket, block, n_strips, bucket_strips, c, kChunkStride);
            finish_block(h, bucket, block, chunk, c);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
