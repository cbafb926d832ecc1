// Products of bfloat16 by tiles: 32 rows x 32 columns, 32 terms at a time. Included by *_amx.cpp and *_avx512bf16.cpp
// after the products they chose, amx_products.h or dot_products.h, and kBf16BlockRows, the rows of a block: their sums
// with 1024 columns belong in the second-level cache.
//
// Panels are A tiles, [32 terms][half of the rows][16 rows][32 terms]; strips are B tiles,
// [32 terms][half of the columns][16 pairs of terms][16 columns][2].
#pragma once
#include "../attention/bf16_tiles.h"
#include "../attention/products.h"
#include "panels.h"

namespace hierkernels::HK_ISA {
namespace {

struct Bf16Engine {
  using Element = BFloat16;
  using Sum = float;
  using Session = ProductSession;
  static constexpr int64_t kStrip = 32, kPanel = 32, kUnit = 32, kGroup = 2;
  static constexpr int64_t kBlockRows = kBf16BlockRows, kStepTerms = 256;
  static constexpr bool kTiledGradient = true;
  static constexpr int64_t kAskParts = 4;

  static int64_t strip_size(int64_t rows) { return round_to(rows, kUnit) * kStrip; }
  static int64_t panel_size() { return kStepTerms * kPanel; }

  static HK_INLINE void rows_to_strips(const BFloat16* const (&line)[2], int64_t count, int64_t row, BFloat16* strips,
                                       int64_t size) {
    const __m512i low = _mm512_load_si512(kPairLow), high = _mm512_load_si512(kPairHigh);
    BFloat16* to = strips + row / 32 * 2 * kTile + row % 32 / 2 * 32;
    for (int64_t at = 0; at < count; at += 32, to += size) {
      const __m512i a = _mm512_loadu_si512(line[0] + at), b = _mm512_loadu_si512(line[1] + at);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(to + kTile, _mm512_permutex2var_epi16(a, high, b));
    }
  }

  static void rows_to_panel_strip(const BFloat16* x, int64_t stride, int64_t rows, int64_t count, BFloat16* out) {
    for (int64_t q = 0; q < count; q += 32, out += 2 * kTile)
      for (int half = 0; half < 2; ++half) {
        __m512i block[16];
        for (int i = 0; i < 16; ++i) {
          const int64_t row = 16 * half + i;
          block[i] = row < rows ? _mm512_loadu_si512(x + row * stride + q) : _mm512_setzero_si512();
        }
        transpose16(block);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + half * kTile + i * 32, block[i]);
      }
  }

  // Two rows of panels that run over all terms.
  static HK_INLINE void rows_to_tiles(const BFloat16* const (&line)[2], int64_t count, int64_t row, int64_t first,
                                      int64_t terms, BFloat16* panels) {
    BFloat16* to = panels + row / 32 * terms * 32 + first * 32 + row % 32 * 32;  // two halves of 16 rows: 32 rows
    for (int64_t at = 0; at < count; at += 32, to += 2 * kTile) {
      _mm512_store_si512(to, _mm512_loadu_si512(line[0] + at));
      _mm512_store_si512(to + 32, _mm512_loadu_si512(line[1] + at));
    }
  }

  static void pack_weight(const Tensor& weight, int64_t h, bool transposed, const WeightBlock& g, BFloat16* out) {
    if (weight.dtype == DType::kBFloat16)
      pack_weight_of<BFloat16>(weight, h, transposed, g, out);
    else
      pack_weight_of<float>(weight, h, transposed, g, out);
  }

  static HK_INLINE void multiply(int64_t rows, const BFloat16* panel, const BFloat16* strip, int64_t terms, float* c,
                                 int64_t c_stride, Update update, const BFloat16* ahead) {
    const TileGrid grid{c, c_stride, 16 * c_stride, 16};
    const bf16* a = reinterpret_cast<const bf16*>(panel);
    const bf16* b = reinterpret_cast<const bf16*>(strip);
    const int steps = static_cast<int>((terms + 31) / 32);
    if (rows > 16)
      accumulate<2, 2>(grid, update == Update::kStore, a, 32, kTile, 2 * kTile, b, kTile, 2 * kTile, steps, ahead);
    else
      accumulate<1, 2>(grid, update == Update::kStore, a, 32, kTile, 2 * kTile, b, kTile, 2 * kTile, steps, ahead);
  }

 private:
  // n numbers of a row, 0 <= n <= 32, as bfloat16; zeros after them.
  static HK_INLINE __m512i load_row(const float* x, int64_t n) {
    return n >= 32 ? to_bf16(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16))
                   : to_bf16(_mm512_maskz_loadu_ps(first_lanes16(n), x),
                             _mm512_maskz_loadu_ps(first_lanes16(n - 16), x + 16));
  }
  static HK_INLINE __m512i load_row(const BFloat16* x, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(first_lanes32(n), x);
  }

  template <class U>
  static void pack_weight_of(const Tensor& weight, int64_t h, bool transposed, const WeightBlock& g, BFloat16* out) {
    const U* x = weight.as<U>() + h * weight.stride[0] + g.column;
    const int64_t stride = weight.stride[1];
    for (int64_t p = 0; p < g.rows; p += kPanel, out += panel_size())
      if (transposed)
        pack_columns(x + g.first * stride + g.row + p, stride, g, p, out);
      else
        pack_rows(x + (g.row + p) * stride + g.first, stride, g, p, out);
  }

  template <class U>
  static HK_INLINE void pack_rows(const U* x, int64_t stride, const WeightBlock& g, int64_t p, BFloat16* out) {
    const int64_t rows = min_of(kPanel, g.rows - p);
    const int64_t terms = g.own ? min_of(g.terms, g.row + p + rows - g.first) : g.terms;
    for (int64_t r = 0; r < kPanel; ++r) {
      int64_t n = r < rows ? g.terms : 0;
      if (g.own) n = min_of(n, g.row + p + r + 1 - g.first);
      for (int64_t t = 0; t < terms; t += 32)
        _mm512_store_si512(out + t * kPanel + r * 32, load_row(x + r * stride + t, n - t));
    }
  }

  // Row j of the panel is column j of the weight; term i its row i.
  template <class U>
  static HK_INLINE void pack_columns(const U* x, int64_t stride, const WeightBlock& g, int64_t p, BFloat16* out) {
    const int64_t columns = min_of(kPanel, g.rows - p);
    const int64_t begin = g.own ? max_of(g.row + p - g.first, 0) / 32 * 32 : 0;
    const __m512i low = _mm512_load_si512(kPairLow), high = _mm512_load_si512(kPairHigh);
    for (int64_t t = begin; t < g.terms; t += 32) {
      __m512i left[16], right[16];  // pairs of terms of columns 0 .. 15 and 16 .. 31
      for (int i = 0; i < 16; ++i) {
        __m512i y[2];
        for (int e = 0; e < 2; ++e) {
          const int64_t term = t + 2 * i + e;
          int64_t n = term < g.terms ? columns : 0;
          if (g.own) n = min_of(n, g.first + term + 1 - g.row - p);
          y[e] = load_row(x + term * stride, n);
        }
        left[i] = _mm512_permutex2var_epi16(y[0], low, y[1]);
        right[i] = _mm512_permutex2var_epi16(y[0], high, y[1]);
      }
      transpose16(left);
      transpose16(right);
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(out + t * kPanel + i * 32, left[i]);
        _mm512_store_si512(out + t * kPanel + kTile + i * 32, right[i]);
      }
    }
  }
};

}  // namespace
}  // namespace hierkernels::HK_ISA
