// Products by fused multiply-adds, of float or double: strips [row][kStrip], panels [term][kPanel].
#pragma once
#include "../attention/products.h"
#include "panels.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class F>
struct SimdEngine {
  using Element = F;
  using Sum = F;
  static constexpr int kVectors = 2, W = kWidth<F>;
  static constexpr int64_t kStrip = kVectors * W, kPanel = kMaxRows[kVectors], kUnit = 1, kGroup = 1;
  static constexpr int64_t kBlockRows = 192;  // a multiple of every kPanel
  static constexpr int64_t kStepTerms = 1024 / sizeof(F) < kBlockRows ? kBlockRows : 1024 / sizeof(F);
  static constexpr bool kTiledGradient = false;
  static constexpr int64_t kAskParts = 0;  // it gained nothing
  struct Session {
    Session() {}
  };
  static_assert(kBlockRows % kPanel == 0 && kStepTerms % kStrip == 0);

  static int64_t strip_size(int64_t rows) { return rows * kStrip; }
  // Off the powers of two; a panel's last vector may reach beyond its end.
  static int64_t panel_size() { return kStepTerms * kPanel + 32; }

  static HK_INLINE void rows_to_strips(const F* const (&line)[1], int64_t count, int64_t row, F* strips, int64_t size) {
    F* to = strips + row * kStrip;
    for (int64_t at = 0; at < count; at += kStrip, to += size)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(to + v * W, load(line[0] + at + v * W));
  }

  static void rows_to_panel_strip(const F* x, int64_t stride, int64_t rows, int64_t count, F* out) {
    for (int64_t q = 0; q < count; q += W)
      for (int v = 0; v < kVectors; ++v) {
        Vec<F> block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = v * W + i < rows ? load(x + (v * W + i) * stride + q) : zero<F>();
        transpose<F>(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(out + (q + i) * kStrip + v * W, block[i]);
      }
  }

  static void pack_weight(const Tensor& weight, int64_t h, bool transposed, const WeightBlock& g, F* out) {
    if constexpr (kSame<F, double>) {
      pack_weight_of<double>(weight, h, transposed, g, out);
    } else {
      switch (weight.dtype) {
        case DType::kBFloat16:
          return pack_weight_of<BFloat16>(weight, h, transposed, g, out);
        case DType::kFloat16:
          return pack_weight_of<Float16>(weight, h, transposed, g, out);
        default:
          return pack_weight_of<float>(weight, h, transposed, g, out);
      }
    }
  }

  static HK_INLINE void multiply(int64_t rows, const F* panel, const F* strip, int64_t terms, F* c, int64_t c_stride,
                                 Update update, const F*) {
    HK_ISA::multiply<F, true>(static_cast<int>(rows), kVectors,
                              {panel, kPanel, strip, kStrip, terms, {c, c_stride, update}, nothing_to_ask(strip)});
  }

  // Rows row .. row + rows of strips as panels, terms first .. first + count.
  static void strips_to_panels(const F* strips, int64_t strip_rows, int64_t row, int64_t rows, int64_t first,
                               int64_t count, F* out) {
    constexpr int64_t R = kPanel, S = kStrip;
    for (int64_t p = 0; p < rows; p += R, out += panel_size()) {
      const int64_t n = min_of(R, rows - p);
      for (int64_t t = 0; t < count; t += W) {
        const F* x = strips + ((first + t) / S * strip_rows + row + p) * S + (first + t) % S;
        if constexpr (R <= W) {
          Vec<F> block[W];
#pragma GCC unroll 16
          for (int r = 0; r < W; ++r) block[r] = r < n ? load(x + r * S) : zero<F>();
          transpose<F>(block);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(out + (t + i) * R, block[i]);
        } else {
          for (int i = 0; i < W; ++i)
            for (int64_t r = 0; r < R; ++r) out[(t + i) * R + r] = r < n ? x[r * S + i] : F(0);
        }
      }
    }
  }

 private:
  template <class U>
  static void pack_weight_of(const Tensor& weight, int64_t h, bool transposed, const WeightBlock& g, F* out) {
    const U* x = weight.as<U>() + h * weight.stride[0] + g.column;
    if (transposed)
      pack_columns(x, weight.stride[1], weight.size[2] - g.column, g, out);
    else
      pack_rows(x, weight.stride[1], g, out);
  }

  template <class U>
  static void pack_rows(const U* weight, int64_t stride, const WeightBlock& g, F* out) {
    constexpr int64_t R = kPanel;
    const U* x = weight + g.row * stride + g.first;
    for (int64_t p = 0; p < g.rows; p += R, out += panel_size()) {
      const int64_t rows = min_of(R, g.rows - p);
      // Past these, nothing is read.
      const int64_t terms = g.own ? min_of(g.terms, g.row + p + rows - g.first) : g.terms;
      for (int64_t t = 0; t < terms; t += W) {
        if constexpr (R <= W) {
          Vec<F> block[W];
          const bool whole = rows == R && t + W <= g.terms && (!g.own || g.first + t + W <= g.row + p + 1);
          if (whole) {
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) block[r] = r < R ? load_as<F>(x + (p + r) * stride + t) : zero<F>();
          } else {
            for (int r = 0; r < W; ++r) {
              int64_t n = r < rows ? min_of(W, g.terms - t) : 0;
              if (g.own) n = min_of(n, g.row + p + r + 1 - g.first - t);
              const U* at = x + (p + r) * stride + t;
              block[r] = n >= W ? load_as<F>(at) : n > 0 ? load_as<F>(at, static_cast<int>(n)) : zero<F>();
            }
          }
          transpose<F>(block);
          const int64_t n = min_of(W, terms - t);
          if (n == W) {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(out + (t + i) * R, block[i]);
          } else {
            for (int i = 0; i < n; ++i) store(out + (t + i) * R, block[i]);
          }
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

  // The transpose: row r is column r of the weight, term t its row t. width: columns of the weight from here on.
  template <class U>
  static void pack_columns(const U* weight, int64_t stride, int64_t width, const WeightBlock& g, F* out) {
    constexpr int64_t R = kPanel;
    for (int64_t t = 0; t < g.terms; ++t) {
      const U* x = weight + (g.first + t) * stride + g.row;
      F* to = out + t * R;
      for (int64_t p = 0; p < g.rows; p += R, to += panel_size()) {
        int64_t n = min_of(R, g.rows - p);
        if (g.own) n = min_of(n, g.first + t + 1 - g.row - p);
        if (n <= 0) break;  // this panel's products start at a later term, and so do those of the panels below
        if constexpr (R <= W) {
          const bool whole = n == R && g.row + p + W <= width;
          store(to, whole ? load_as<F>(x + p) : load_as<F>(x + p, static_cast<int>(n)));
        } else {
          for (int r = 0; r < R; ++r) to[r] = r < n ? static_cast<F>(to_float(x[p + r])) : F(0);
        }
      }
    }
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
