// Pairs of bfloat16: vdpbf16ps adds the products of two pairs to a float32 sum. Tiles of keys hold pairs of channels, rows
// that are summed over are zipped two by two.
#pragma once
#include "../attention/bf16_tiles.h"
#include "operands.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

struct Pair {
  uint32_t bits;  // the first number in the low half
};

alignas(64) constexpr uint16_t kZipHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

template <>
struct Operands<Pair> {
  using Sum = float;
  static constexpr int kTerms = 2;
  static constexpr int W = 16;

  static HK_INLINE __m512bh vector(const Pair* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static HK_INLINE __m512bh broadcast(const Pair* p) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(p->bits)));
  }
  static HK_INLINE VecF add_product(__m512bh a, __m512bh b, VecF sum) { return _mm512_dpbf16_ps(sum, a, b); }

  static int padded(int dim) { return round_up(dim, 32); }
  static int terms(int n) { return (n + 1) / 2; }
  static int64_t tile_size(int dim) { return static_cast<int64_t>(W) * padded(dim) / 2; }
  static bool in_place(const Storage<float>&) { return false; }
  static constexpr bool kTilesHaveFactor = false;

  static void make_tiles(const Storage<float>&, const Rows& rows, int64_t first, int n, int dim, float, Pair* to) {
    const int64_t stride = rows.token_stride;
    const bf16* row = reinterpret_cast<const bf16*>(rows.data) + first * stride;
    for (int j = 0; j < n; j += W, row += W * stride, to += tile_size(dim))
      pack_transposed([=](int i) { return row + i * stride; }, n - j < W ? n - j : W, dim, padded(dim) / 32,
                      reinterpret_cast<bf16*>(to));
  }
  static void make_rows(const Storage<float>&, const Rows& rows, int64_t first, int n, int dim, Pair* to) {
    const int64_t stride = rows.token_stride;
    const bf16* row = reinterpret_cast<const bf16*>(rows.data) + first * stride;
    zip_rows([=](int i) { return row + i * stride; }, n, dim, to);
  }

  static int row_stride(int dim) { return padded(dim) / 2; }
  static void load_rows(const Storage<float>&, const Rows& rows, int64_t first, int n, int dim, Pair* to) {
    RowCursor cursor(rows, first);
    for (int i = 0; i < n; ++i, cursor.next(), to += row_stride(dim))
      copy_row(reinterpret_cast<const bf16*>(rows.data) + cursor.offset(), dim, padded(dim) / 32, _mm512_setzero_si512(),
               reinterpret_cast<bf16*>(to));
  }

  // Rows 2 p and 2 p + 1 to row p, channel by channel; an odd last row meets zeros. row(i) is the address of row i.
  template <class Row>
  static HK_INLINE void zip_rows(Row row, int n, int dim, Pair* to) {
    const __m512i low = _mm512_load_si512(kPairLow), high = _mm512_load_si512(kPairHigh);
    const int width = padded(dim);
    for (int i = 0; i < n; i += 2, to += width)
      for (int c = 0; c < width; c += 32) {
        const __m512i a = load_channels(row(i), c, dim);
        const __m512i b = i + 1 < n ? load_channels(row(i + 1), c, dim) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + c + 16, _mm512_permutex2var_epi16(a, high, b));
      }
  }

  // The numbers [0, end) of a row, rounded, as pairs of neighbours; in whole vectors, `end` a multiple of W.
  static HK_INLINE void round_row(const float* x, int end, Pair* to) {
    for (int j = 0; j < end; j += W)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j / 2),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(x + j))));
  }
  // The numbers [0, end) of two rows, rounded and zipped; the second may be null.
  static HK_INLINE void zip_rounded(const float* first, const float* second, int end, Pair* to) {
    const __m512i zip = _mm512_load_si512(kZipHalves);
    for (int j = 0; j < end; j += W) {
      const VecF other = second ? load(second + j) : zero<float>();
      _mm512_storeu_si512(to + j, _mm512_permutexvar_epi16(zip, to_bf16(load(first + j), other)));
    }
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
