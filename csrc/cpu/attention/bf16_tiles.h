// The layouts in which bfloat16 matrices are multiplied, and packing into them. Included by *_bf16.inl and the products.
//
// C (16 x 16 floats) += A (16 rows x 32 bf16) * B (32 x 16): A lies as 16 rows of 64 bytes, B as 16 rows of
// 64 bytes in which row p holds the pairs (2p, 2p + 1) of all 16 columns. The levels that multiply them, amx_products.h
// and dot_products.h, give accumulate, score_tiles and ProductSession the same meaning.
#pragma once
#include "../../common/tensor.h"
#include "../scratch.h"
#include "../simd.h"

namespace hierkernels::HK_ISA {
namespace {

using bf16 = uint16_t;

constexpr int kTile = 512;      // bf16 elements of an A or B tile
constexpr int kTileC = 256;     // floats of a C tile
constexpr float kLog2ef = 1.4426950408889634f;
constexpr float kLn2f = 0.6931471805599453f;

// ---- buffers ----

// ScratchLayout in elements.
struct TypedLayout : ScratchLayout {
  template <class T>
  size_t add(int64_t count) {
    return ScratchLayout::add(static_cast<size_t>(count) * sizeof(T));
  }
  template <class T>
  static T* at(char* base, size_t offset) {
    return reinterpret_cast<T*>(base + offset);
  }
};

// ---- numbers ----

// 2^x to 1.03e-4 relative, enough for a bfloat16 result, and exact where x is whole: the minimax cubic p of 2^f with
// p(0) = 1 and p(1) = 2. vscalef takes floor(x) itself and sends -inf to 0.
HK_INLINE __m512 exp2_bf16(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 1);  // x - floor(x)
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.07826744f), _mm512_set1_ps(0.22630836f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6954242f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, x);
}
HK_INLINE __m512i to_bf16(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
HK_INLINE __m512 from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
HK_INLINE __mmask32 first_lanes32(int64_t n) {
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u;
}
HK_INLINE __mmask16 first_lanes16(int64_t n) {
  return n >= 16 ? 0xffffu : n <= 0 ? 0u : static_cast<__mmask16>((1u << n) - 1u);
}

// Lane r of the result is the sum, or the maximum, of the 16 floats at rows + 16 * r.
struct Add {
  static HK_INLINE __m512 apply(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};
struct Max {
  static HK_INLINE __m512 apply(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};
template <class Op>
HK_INLINE __m512 reduce16(const float* rows) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 x = _mm512_load_ps(rows + 32 * i), y = _mm512_load_ps(rows + 32 * i + 16);
    a[i] = Op::apply(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = Op::apply(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  for (int i = 0; i < 2; ++i)
    c[i] = Op::apply(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return Op::apply(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// ---- packing ----

alignas(64) constexpr uint16_t kPairLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                               8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
alignas(64) constexpr uint16_t kPairHigh[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

// 32 channels of a row from channel d on; those at or above dim read as 0.
HK_INLINE __m512i load_channels(const bf16* row, int d, int dim) {
  return dim - d >= 32 ? _mm512_loadu_si512(row + d)
                       : _mm512_maskz_loadu_epi16(first_lanes32(dim - d), row + d);
}

// Rows as columns of B = X^T (contraction over channels): 16 rows -> steps tiles, [step][pair of channels][row].
// row(i) is the address of row i, i < n; the rest are zeros.
template <class Row>
HK_INLINE void pack_transposed(Row row, int n, int dim, int steps, bf16* out) {
  for (int s = 0; s < steps; ++s) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = i < n ? load_channels(row(i), 32 * s, dim) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + s * kTile + i * 32, r[i]);
  }
}

// Rows as B = X (contraction over rows): 32 rows -> 2 * steps tiles, [16 channels][pair of rows][channel].
template <class Row>
HK_INLINE void pack_rows(Row row, int n, int dim, int steps, bf16* out) {
  const __m512i low = _mm512_load_si512(kPairLow), high = _mm512_load_si512(kPairHigh);
  for (int p = 0; p < 16; ++p)
    for (int s = 0; s < steps; ++s) {
      bf16* tile = out + 2 * s * kTile + p * 32;
      if (2 * p >= n) {
        _mm512_store_si512(tile, _mm512_setzero_si512());
        _mm512_store_si512(tile + kTile, _mm512_setzero_si512());
        continue;
      }
      const __m512i a = load_channels(row(2 * p), 32 * s, dim);
      const __m512i b = 2 * p + 1 < n ? load_channels(row(2 * p + 1), 32 * s, dim) : _mm512_setzero_si512();
      _mm512_store_si512(tile, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(tile + kTile, _mm512_permutex2var_epi16(a, high, b));
    }
}

// One row copied and padded with zeros to 32 * steps channels, its sign bits flipped by `flip` (0 or 0x8000).
HK_INLINE void copy_row(const bf16* row, int dim, int steps, __m512i flip, bf16* out) {
  for (int s = 0; s < steps; ++s)
    _mm512_store_si512(out + 32 * s, _mm512_xor_si512(load_channels(row, 32 * s, dim), flip));
}

// Whether to write a result past the caches: it is large, and its rows are whole cache lines.
HK_INLINE bool worth_streaming(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 64 == 0 && t.size[3] % 32 == 0;
  for (int d = 0; d < 3; ++d) aligned = aligned && t.stride[d] % 32 == 0;
  return aligned && static_cast<size_t>(t.span_bytes()) >= kLargeOutput;
}

HK_INLINE void zero_row(int steps, bf16* out) {
  for (int s = 0; s < steps; ++s) _mm512_store_si512(out + 32 * s, _mm512_setzero_si512());
}

// ---- operands of products ----

// Where the C tiles of a product lie: rows `stride` floats apart, the next tile down and right further on.
struct TileGrid {
  float* base;
  int64_t stride, down, right;
};

}  // namespace
}  // namespace hierkernels::HK_ISA
