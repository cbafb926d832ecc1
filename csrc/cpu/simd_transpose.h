// Transposes blocks of vectors in registers (part of simd.h).
#pragma once
#include "simd_convert.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

#if defined(__AVX512F__)
HK_INLINE void transpose16(__m512i r[16]) {  // 16 x 16 dwords
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#endif

// a = the even, b = the odd elements of the result's first (low) and second (high) half, alternating.
template <class V>
HK_INLINE void zip(V a, V b, V& low, V& high) {
#if defined(__AVX512F__)
  if constexpr (kSame<V, VecF>) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = _mm512_permutex2var_ps(a, first, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
  } else {
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    low = _mm512_permutex2var_pd(a, first, b);
    high = _mm512_permutex2var_pd(a, _mm512_add_epi64(first, _mm512_set1_epi64(4)), b);
  }
#elif defined(__AVX2__)
  if constexpr (kSame<V, VecF>) {
    const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20);
    high = _mm256_permute2f128_ps(even, odd, 0x31);
  } else {
    const __m256d even = _mm256_unpacklo_pd(a, b), odd = _mm256_unpackhi_pd(a, b);
    low = _mm256_permute2f128_pd(even, odd, 0x20);
    high = _mm256_permute2f128_pd(even, odd, 0x31);
  }
#else
  constexpr int W = sizeof(V) / sizeof(a[0]);
  V x = a, y = b;
  for (int i = 0; i < W / 2; ++i) {
    x[2 * i] = a[i];
    x[2 * i + 1] = b[i];
    y[2 * i] = a[W / 2 + i];
    y[2 * i + 1] = b[W / 2 + i];
  }
  low = x;
  high = y;
#endif
}

// kWidth x kWidth, in registers: each round is a perfect shuffle of the rows.
template <class F>
HK_INLINE void transpose(Vec<F> (&rows)[kWidth<F>]) {
  constexpr int W = kWidth<F>;
#if defined(__AVX512F__)
  if constexpr (kSame<F, float>) {  // shuffles within lanes: a permutation of two vectors takes three times as long
    __m512i bits[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) bits[i] = bit_cast<__m512i>(rows[i]);
    transpose16(bits);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = bit_cast<VecF>(bits[i]);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    Vec<F> next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) zip(rows[i], rows[i + W / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
