// Products of bfloat16 by vdpbf16ps, the dot product of pairs: what amx_products.h does, on machines without tiles.
// Included by *_avx512bf16.cpp, before the kernels.
#pragma once
#include "bf16_tiles.h"

namespace hierkernels::HK_ISA {
namespace {

struct [[maybe_unused]] ProductSession {};  // nothing to set up

// Sixteen rows take as long each as more do.
[[maybe_unused]] constexpr bool kNarrowStrips = true;

// Eight rows x 16 CT columns in registers: sixteen sums hide the latency of their products. kAhead: lines from `ahead`
// on are asked for, two in each step of 32 terms. kPart: without the pairs of terms before `begin` in the first step, and
// those from `end` on in the last.
template <int CT, bool kAhead = false, bool kPart = false>
HK_INLINE void accumulate_rows(float* c, int64_t c_stride, int64_t c_right, bool first, const bf16* a, int64_t a_stride,
                               int64_t a_step, const bf16* b, int64_t b_right, int64_t b_step, int count,
                               const char* ahead = nullptr, int begin = 0, int end = 16) {
  constexpr int kRows = 8;
  __m512 sum[kRows][CT];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < CT; ++t) sum[r][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * c_stride + t * c_right);
  for (int s = 0; s < count; ++s, a += a_step, b += b_step) {
    if constexpr (kAhead) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + 64, 0, 2);
      ahead += 128;
    }
    const int from = kPart && s == 0 ? begin : 0, to = kPart && s + 1 == count ? end : 16;
    for (int pair = from; pair < to; ++pair) {
      __m512bh right[CT];
#pragma GCC unroll 2
      for (int t = 0; t < CT; ++t)
        right[t] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + t * b_right + pair * 32));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int bits;
        __builtin_memcpy(&bits, a + r * a_stride + pair * 2, 4);
        const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
#pragma GCC unroll 2
        for (int t = 0; t < CT; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], left, right[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < CT; ++t) _mm512_storeu_ps(c + r * c_stride + t * c_right, sum[r][t]);
}

// ahead: count times RT * 256 bytes that a later product reads, asked for meanwhile; none if null.
// begin, end: as in accumulate_rows; A is 0 in what they leave out. Not together with `ahead`.
template <int RT, int CT>
void accumulate(const TileGrid& c, bool first, const bf16* a, int64_t a_stride, int64_t a_down, int64_t a_step,
                const bf16* b, int64_t b_right, int64_t b_step, int count, const void* ahead = nullptr, int begin = 0,
                int end = 16) {
  static_assert(RT <= 2 && CT <= 2);
  const char* lines = static_cast<const char*>(ahead);
  for (int down = 0; down < RT; ++down)
    for (int r = 0; r < 16; r += 8) {
      float* to = c.base + down * c.down + r * c.stride;
      const bf16* rows = a + down * a_down + r * a_stride;
      if (lines) {
        accumulate_rows<CT, true>(to, c.stride, c.right, first, rows, a_stride, a_step, b, b_right, b_step, count, lines);
        lines += count * 128;
      } else if (begin != 0 || end != 16) {
        accumulate_rows<CT, false, true>(to, c.stride, c.right, first, rows, a_stride, a_step, b, b_right, b_step, count,
                                         nullptr, begin, end);
      } else {
        accumulate_rows<CT>(to, c.stride, c.right, first, rows, a_stride, a_step, b, b_right, b_step, count);
      }
    }
}

HK_INLINE void score_tiles(const bf16* a, int64_t a_stride, const bf16* b, int tiles, int steps, float* c,
                           int64_t c_stride) {
  const int64_t column = steps * kTile;
  for (int t = 0; t < tiles; t += 2, b += 2 * column) {
    const TileGrid to{c + 16 * t, c_stride, 0, 16};
    if (t + 1 < tiles)
      accumulate<1, 2>(to, true, a, a_stride, 0, 32, b, column, kTile, steps);
    else
      accumulate<1, 1>(to, true, a, a_stride, 0, 32, b, column, kTile, steps);
  }
}

}  // namespace
}  // namespace hierkernels::HK_ISA
