// A head's tokens as rows of B dim columns, batch by batch, and the strips that products read them from.
#pragma once
#include "../attention/products.h"
#include "../attention/storage.h"
#include "../simd.h"
#include "sgu.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// A block of accumulators is kPanel rows of kStrip columns: see products.h.
constexpr int kStripVectors = 2;
template <class F>
constexpr int kStrip = kStripVectors * kWidth<F>;
constexpr int kPanelRows = kMaxRows[kStripVectors];

HK_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
HK_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
HK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns first .. first + count as runs of one batch entry: body(b, channel of the head, distance from first, length).
template <class Body>
HK_INLINE void for_each_run(const SguShape& s, int64_t first, int64_t count, Body body) {
  int64_t b = first / s.dim, c = first % s.dim;
  for (int64_t at = 0; at < count; ++b, c = 0) {
    const int64_t length = min_of(s.dim - c, count - at);
    body(b, c, at, length);
    at += length;
  }
}

// Channel c of head h of token n, batch entry b.
template <class T>
HK_INLINE T* element(const Tensor& t, const SguShape& s, int64_t b, int64_t n, int64_t h, int64_t c) {
  return t.as<T>() + b * t.stride[0] + n * t.stride[1] + h * s.dim + c;
}

// out[i] = column first + i of token n; up to whole vectors, what follows is undefined but may be written.
template <class F, class T>
HK_INLINE void load_columns(const Tensor& t, const SguShape& s, int64_t h, int64_t n, int64_t first, int64_t count, F* out) {
  constexpr int W = kWidth<F>;
  for_each_run(s, first, count, [&](int64_t b, int64_t c, int64_t at, int64_t length) {
    const T* x = element<T>(t, s, b, n, h, c);
    int64_t i = 0;
    for (; i + W <= length; i += W) store(out + at + i, load_as<F>(x + i));
    if (i < length) store(out + at + i, load_as<F>(x + i, static_cast<int>(length - i)), static_cast<int>(length - i));
  });
}

// One row of `count` columns into strips, [strip][row][kStrip]; the last strip is filled up with zeros. row has
// room for whole strips.
template <class F>
HK_INLINE void row_to_strips(F* row, int64_t count, F* strips, int64_t strip_rows) {
  constexpr int W = kWidth<F>, S = kStrip<F>;
  const int64_t whole = ceil_div(count, S) * S;
  for (int64_t i = count; i < whole; ++i) row[i] = 0;
  for (int64_t at = 0; at < whole; at += S, strips += strip_rows * S)
#pragma GCC unroll 2
    for (int v = 0; v < kStripVectors; ++v) store(strips + v * W, load(row + at + v * W));
}

// Tokens first .. first + rows of a head, columns [column, column + count), as strips of strip_rows rows.
template <class F, class T>
void pack_strips(const Tensor& t, const SguShape& s, int64_t h, int64_t first, int64_t rows, int64_t column, int64_t count,
                 F* row, F* strips, int64_t strip_rows) {
  for (int64_t r = 0; r < rows; ++r) {
    load_columns<F, T>(t, s, h, first + r, column, count, row);
    row_to_strips(row, count, strips + r * kStrip<F>, strip_rows);
  }
}

// The transpose of up to kStrip rows `stride` apart: out[q][i] = x[i][q] for q < count; 0 where i >= rows. count is
// a multiple of kWidth.
template <class F>
void transpose_strip(const F* x, int64_t stride, int64_t rows, int64_t count, F* out) {
  constexpr int W = kWidth<F>, S = kStrip<F>;
  for (int64_t q = 0; q < count; q += W)
    for (int v = 0; v < kStripVectors; ++v) {
      Vec<F> block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = v * W + i < rows ? load(x + (v * W + i) * stride + q) : zero<F>();
      transpose<F>(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (q + i) * S + v * W, block[i]);
    }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
