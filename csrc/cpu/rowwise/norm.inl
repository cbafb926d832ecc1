// Root-mean-square norm and layer norm of rows, some channels of which come from an earlier row of the sequence.
#pragma once
#include "../../common/rowwise_params.h"
#include "../scratch.h"
#include "../simd.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// F: what is computed in; TX, TO: stored types of x and out; kCentred: the mean is taken away, a bias added.
template <class F, class TX, class TO, bool kCentred>
struct Norm {
  using V = Vec<F>;
  static constexpr int kW = kWidth<F>;
  // Below so many elements the threads take longer to start than to compute; a task has about a quarter of it.
  static constexpr int64_t kParallel = 16384;
  // The gradients of weight and bias are summed in so many parts of the rows, whatever the number of threads: their bits
  // do not depend on that.
  static constexpr int64_t kParts = 64;

  const NormParams& p;
  const int64_t N, C, rows;

  explicit Norm(const NormParams& params)
      : p(params), N(p.x.size[1]), C(p.x.size[2]), rows(p.x.size[0] * N) {}

  int64_t rows_of_task() const { return C < kParallel / 4 ? kParallel / 4 / C : 1; }

  // The two pieces of a row: [begin, end) of its channels, and by how many elements earlier they lie; -1: zeros.
  struct Piece {
    int64_t begin, end, back;
  };
  Piece piece(int i, int64_t row) const {
    if (i == 0) return {0, p.kept, 0};
    return {p.kept, C, row % N >= p.shift ? p.shift * C : -1};
  }

  // body(c, n, piece) for every vector of n channels from c.
  template <class Body>
  HK_INLINE void for_channels(int64_t row, Body body) const {
    for (int i = 0; i < 2; ++i) {
      const Piece q = piece(i, row);
      int64_t c = q.begin;
      for (; c + kW <= q.end; c += kW) body(c, kW, q);
      if (c < q.end) body(c, static_cast<int>(q.end - c), q);
    }
  }

  template <class T>
  static HK_INLINE V take(const T* at, int n) {
    return n == kW ? load_as<F>(at) : load_as<F>(at, n);
  }
  template <class T>
  static HK_INLINE void put(T* at, V v, int n) {
    if (n == kW)
      store_as<F>(at, v);
    else
      store_as<F>(at, v, n);
  }
  // The shifted row.
  HK_INLINE V source(int64_t row, int64_t c, int n, const Piece& q) const {
    return q.back < 0 ? V{} : take(p.x.as<TX>() + row * C + c - q.back, n);
  }
  // The same less its mean; 0 in lanes from n on.
  HK_INLINE V centred(int64_t row, int64_t c, int n, const Piece& q, F mean) const {
    const V s = source(row, c, n, q);
    if constexpr (!kCentred) return s;
    const V d = s - mean;
    return n == kW ? d : select(lanes_below<F>(n), d, V{});
  }

  void forward() const {
    const F floor = static_cast<F>(p.floor), scale = static_cast<F>(p.scale);
#pragma omp parallel for schedule(dynamic, rows_of_task()) if (rows * C > kParallel)
    for (int64_t row = 0; row < rows; ++row) {
      F mean = 0;
      if constexpr (kCentred) {
        V sum{};
        for_channels(row, [&](int64_t c, int n, const Piece& q) { sum += source(row, c, n, q); });
        p.mean.as<F>()[row] = mean = reduce_add(sum) / static_cast<F>(C);
      }
      V squares{};
      for_channels(row, [&](int64_t c, int n, const Piece& q) {
        const V s = centred(row, c, n, q, mean);
        squares = fma(s, s, squares);
      });
      const F length = square_root(reduce_add(squares) + static_cast<F>(p.addend));
      // NaN stays NaN.
      const F inverse = F(1) / (length < floor ? floor : length);
      p.inverse.as<F>()[row] = inverse;
      const F factor = inverse * scale;
      TO* out = p.out.as<TO>() + row * C;
      for_channels(row, [&](int64_t c, int n, const Piece& q) {
        const V scaled = centred(row, c, n, q, mean) * factor;
        const V weight = take(p.weight.as<F>() + c, n);
        if constexpr (kCentred)
          put(out + c, fma(scaled, weight, take(p.bias.as<F>() + c, n)), n);
        else
          put(out + c, scaled * weight, n);
      });
    }
  }

  void backward() const {
    if (!p.dweight) {
#pragma omp parallel for schedule(dynamic, rows_of_task()) if (rows * C > kParallel)
      for (int64_t row = 0; row < rows; ++row) backward_row(row, nullptr, nullptr);
      return;
    }
    const int64_t parts = rows < kParts ? rows : kParts, most = (rows + parts - 1) / parts;
    F* const sums = reinterpret_cast<F*>(thread_scratch(ScratchUse::kShared, sizeof(F) * 2 * parts * C));
#pragma omp parallel for schedule(dynamic) if (rows * C > kParallel)
    for (int64_t part = 0; part < parts; ++part) {
      F* const of_part = sums + 2 * part * C;
      for (int64_t c = 0; c < 2 * C; ++c) of_part[c] = F(0);
      const int64_t end = (part + 1) * most < rows ? (part + 1) * most : rows;
      for (int64_t row = part * most; row < end; ++row) backward_row(row, of_part, of_part + C);
    }
    add_parts(sums, parts, p.dweight.as<F>());
    if constexpr (kCentred) add_parts(sums + C, parts, p.dbias.as<F>());
  }

  void add_parts(const F* sums, int64_t parts, F* out) const {
    for (int64_t c = 0; c < C; c += kW) {
      const int n = C - c < kW ? static_cast<int>(C - c) : kW;
      V sum{};
      for (int64_t part = 0; part < parts; ++part) sum += take(sums + 2 * part * C + c, n);
      put(out + c, sum, n);
    }
  }

  HK_INLINE void backward_row(int64_t row, F* sums, F* bias_sums) const {
    const F scale = static_cast<F>(p.scale), inverse = p.inverse.as<F>()[row];
    const F mean = kCentred ? p.mean.as<F>()[row] : F(0);
    const TO* dout = p.dout.as<TO>() + row * C;
    const F* weight = p.weight.as<F>();
    V dots{}, total{};
    for_channels(row, [&](int64_t c, int n, const Piece& q) {
      const V s = centred(row, c, n, q, mean), g = take(dout + c, n), grad = g * take(weight + c, n);
      dots = fma(grad, s, dots);
      if constexpr (kCentred) total += grad;
      if (!sums) return;
      put(sums + c, fma(g * (inverse * scale), s, take(sums + c, n)), n);
      if constexpr (kCentred) put(bias_sums + c, take(bias_sums + c, n) + g, n);
    });
    if (!p.dx) return;
    // Below the floor the length has no effect.
    const bool floored = inverse * static_cast<F>(p.floor) >= F(1);
    const F factor = inverse * scale;
    const F along = floored ? F(0) : factor * (inverse * inverse) * reduce_add(dots);
    // What is taken away with the mean; the row less its mean has none itself.
    const F constant = kCentred ? factor * reduce_add(total) / static_cast<F>(C) : F(0);
    TX* dx = p.dx.as<TX>() + row * C;
    for_channels(row, [&](int64_t c, int n, const Piece& q) {
      if (q.back < 0) return;
      V grad = take(dout + c, n) * take(weight + c, n) * factor - centred(row, c, n, q, mean) * along;
      if constexpr (kCentred) grad -= constant;
      put(dx + c - q.back, grad, n);
    });
    if (p.kept < C && row % N >= N - p.shift)  // read by no later token
      for (int64_t c = p.kept; c < C; ++c) dx[c] = TX{};
  }

  static HK_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
  static HK_INLINE double square_root(double x) { return __builtin_sqrt(x); }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
