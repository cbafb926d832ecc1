// GELU of rows of channels, whole, in halves, or as the gate of a half.
#pragma once
#include "../../common/rowwise_params.h"
#include "../simd.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// F: what is computed in; T: the stored type.
template <class F, class T>
struct Gelu {
  using V = Vec<F>;
  static constexpr int kW = kWidth<F>;
  // Of a piece of a task; below so many elements the threads take longer to start than to compute.
  static constexpr int64_t kPiece = 4096, kParallel = 8192;

  const GeluParams& p;
  const int64_t rows, C;

  explicit Gelu(const GeluParams& params) : p(params), rows(rows_of(p.x)), C(p.x.size[p.x.ndim - 1]) {}

  static int64_t rows_of(const Tensor& x) {
    int64_t count = 1;
    for (int d = 0; d + 1 < x.ndim; ++d) count *= x.size[d];
    return count;
  }

  static HK_INLINE V take(const T* at, int n) { return n == kW ? load_as<F>(at) : load_as<F>(at, n); }
  static HK_INLINE void put(T* at, V v, int n) {
    if (n == kW)
      store_as<F>(at, v);
    else
      store_as<F>(at, v, n);
  }
  // body(i, n) for every vector of n of the elements [begin, end).
  template <class Body>
  static HK_INLINE void for_vectors(int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + kW <= end; i += kW) body(i, kW);
    if (i < end) body(i, static_cast<int>(end - i));
  }

  static HK_INLINE V value(V x) {
    V y, slope;
    gelu<T>(x, y, slope);
    return y;
  }
  static HK_INLINE V slope(V x) {
    V y, slope;
    gelu<T>(x, y, slope);
    return slope;
  }

  void forward() const {
    const T* x = p.x.as<T>();
    T *first = p.first.as<T>(), *second = p.second.as<T>();
    const int64_t half = C / 2;
    if (p.form == GeluForm::kPlain)
      for_pieces([&](int64_t begin, int64_t end) {
        for_vectors(begin, end, [&](int64_t i, int n) { put(first + i, value(take(x + i, n)), n); });
      });
    else if (p.form == GeluForm::kHalves)
      for_rows([&](int64_t row) {
        for_vectors(0, half, [&](int64_t c, int n) {
          const T* from = x + row * C + c;
          put(first + row * half + c, value(take(from, n)), n);
          put(second + row * half + c, value(take(from + half, n)), n);
        });
      });
    else
      for_rows([&](int64_t row) {
        for_vectors(0, half, [&](int64_t c, int n) {
          const T* from = x + row * C + c;
          put(first + row * half + c, take(from, n) * value(take(from + half, n)), n);
        });
      });
  }

  void backward() const {
    const T* x = p.x.as<T>();
    const T *first = p.first.as<T>(), *second = p.second.as<T>();
    T* dx = p.dx.as<T>();
    const int64_t half = C / 2;
    if (p.form == GeluForm::kPlain)
      for_pieces([&](int64_t begin, int64_t end) {
        for_vectors(begin, end, [&](int64_t i, int n) { put(dx + i, take(first + i, n) * slope(take(x + i, n)), n); });
      });
    else if (p.form == GeluForm::kHalves)
      for_rows([&](int64_t row) {
        for_vectors(0, half, [&](int64_t c, int n) {
          const int64_t at = row * C + c, to = row * half + c;
          put(dx + at, take(first + to, n) * slope(take(x + at, n)), n);
          put(dx + at + half, take(second + to, n) * slope(take(x + at + half, n)), n);
        });
      });
    else
      for_rows([&](int64_t row) {
        for_vectors(0, half, [&](int64_t c, int n) {
          const int64_t at = row * C + c;
          const V grad = take(first + row * half + c, n);
          V y, inclination;
          gelu<T>(take(x + at + half, n), y, inclination);
          put(dx + at, grad * y, n);
          put(dx + at + half, grad * take(x + at, n) * inclination, n);
        });
      });
  }

  template <class Body>
  HK_INLINE void for_rows(Body body) const {
#pragma omp parallel for schedule(dynamic, C < kPiece ? kPiece / C : 1) if (rows * C > kParallel)
    for (int64_t row = 0; row < rows; ++row) body(row);
  }
  template <class Body>
  HK_INLINE void for_pieces(Body body) const {
    const int64_t total = rows * C;
#pragma omp parallel for schedule(dynamic) if (total > kParallel)
    for (int64_t begin = 0; begin < total; begin += kPiece)
      body(begin, begin + kPiece < total ? begin + kPiece : total);
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
