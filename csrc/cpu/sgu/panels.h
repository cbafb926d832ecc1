// The weight, or its transpose, as panels of kPanelRows rows: panel[t][row]. What lies above the diagonal is 0.
#pragma once
#include "columns.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// A block of the matrix that is multiplied: rows row .. row + rows of the bucket, terms first .. first + terms.
struct WeightBlock {
  int64_t row, rows, first, terms;
  int64_t column;  // of the weight, for term 0 (transposed: for row 0)
  bool own;        // terms and rows are of one bucket: only terms <= row are not 0 (transposed: terms >= row)
};

// Panels lie so far apart; a panel's last vector may reach beyond its end.
template <class F>
HK_INLINE int64_t panel_stride(int64_t terms) {
  return terms * kPanelRows + 32;
}

template <class F, class U>
void pack_panels(const U* weight, int64_t stride, const WeightBlock& g, F* out, int64_t out_stride) {
  constexpr int W = kWidth<F>, R = kPanelRows;
  const U* x = weight + g.row * stride + g.column + g.first;
  for (int64_t p = 0; p < g.rows; p += R, out += out_stride) {
    const int64_t rows = min_of(R, g.rows - p);
    const int64_t terms = g.own ? min_of(g.terms, g.row + p + rows - g.first) : g.terms;  // past these, nothing is read
    for (int64_t t = 0; t < terms; t += W) {
      if constexpr (R <= W) {
        Vec<F> block[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
          int64_t n = r < rows ? min_of(W, g.terms - t) : 0;
          if (g.own) n = min_of(n, g.row + p + r + 1 - g.first - t);
          const U* at = x + (p + r) * stride + t;
          block[r] = n >= W ? load_as<F>(at) : n > 0 ? load_as<F>(at, static_cast<int>(n)) : zero<F>();
        }
        transpose<F>(block);
        const int64_t n = min_of(W, terms - t);
        for (int i = 0; i < n; ++i) store(out + (t + i) * R, block[i]);
      } else {
        for (int64_t i = t; i < min_of(t + W, terms); ++i)
          for (int64_t r = 0; r < R; ++r) {
            const bool there = r < rows && (!g.own || g.first + i <= g.row + p + r);
            out[i * R + r] = there ? static_cast<F>(to_float(x[(p + r) * stride + i])) : F(0);
          }
      }
    }
  }
}

// Of the transpose: row r is the weight's column g.column + r, term t its row t. width: columns of the weight in all.
template <class F, class U>
void pack_transposed_panels(const U* weight, int64_t stride, int64_t width, const WeightBlock& g, F* out,
                            int64_t out_stride) {
  constexpr int W = kWidth<F>, R = kPanelRows;
  for (int64_t t = 0; t < g.terms; ++t) {
    const int64_t from = g.column + g.row;
    const U* x = weight + (g.first + t) * stride + from;
    F* to = out + t * R;
    for (int64_t p = 0; p < g.rows; p += R, to += out_stride) {
      int64_t n = min_of(R, g.rows - p);
      if (g.own) n = min_of(n, g.first + t + 1 - g.row - p);
      if (n <= 0 && g.own) break;  // this panel's products start later, and so do those of the panels below
      if constexpr (R <= W) {
        const bool whole = n == R && from + p + W <= width;
        store(to, whole ? load_as<F>(x + p) : load_as<F>(x + p, static_cast<int>(n)));
      } else {
        for (int r = 0; r < R; ++r) to[r] = r < n ? static_cast<F>(to_float(x[p + r])) : F(0);
      }
    }
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
