// Vectors of floating-point numbers, written once and compiled for each instruction set.
//
// A file that includes this header is compiled for one instruction set and names it: HK_ISA is the namespace inside
// hierkernels (generic, avx2, avx512, avx512bf16, amx). Everything has internal linkage and nothing of the standard library's
// templates is used: the linker must never replace a function of one instruction set by that of another.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#if defined(__x86_64__)
// g++ 12 takes the undefined operands of its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if !defined(HK_ISA)
#error "define HK_ISA, the namespace of this file's instruction set, first"
#endif
#define HK_INLINE inline __attribute__((always_inline))

namespace hierkernels {
namespace HK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

// Storage types.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class F>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct IntegerOf<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
};

// The vector types of F; a mask is a vector of integers, each 0 or -1.
template <class F>
struct Simd {
  using Signed = typename IntegerOf<F>::Signed;
  using Unsigned = typename IntegerOf<F>::Unsigned;
  typedef F V __attribute__((vector_size(kVectorBytes)));
  typedef Signed I __attribute__((vector_size(kVectorBytes)));
  typedef Unsigned U __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(F));
};
template <class F>
using Vec = typename Simd<F>::V;
template <class F>
using Mask = typename Simd<F>::I;
template <class F>
constexpr int kWidth = Simd<F>::kWidth;

using VecF = Vec<float>;
using VecD = Vec<double>;

template <class To, class From>
HK_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <class F>
HK_INLINE Vec<F> set1(F x) {
  return x - Vec<F>{};
}
template <class F>
HK_INLINE Vec<F> zero() {
  return Vec<F>{};
}
// 0, 1, 2, ...
template <class F>
HK_INLINE Mask<F> lanes() {
  Mask<F> v{};
  for (int i = 0; i < kWidth<F>; ++i) v[i] = i;
  return v;
}
// True in the lanes before n; any n.
template <class F>
HK_INLINE Mask<F> lanes_below(int64_t n) {
  const int64_t m = n < 0 ? 0 : n < kWidth<F> ? n : kWidth<F>;
  return lanes<F>() < (static_cast<typename Simd<F>::Signed>(m) - Mask<F>{});
}
// a where the mask is set, else b.
template <class V, class M>
HK_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
template <class V>
HK_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// The rest of the arithmetic that intrinsics do better than the compiler: max(a, b) and min(a, b) are b if either is NaN.
#if defined(__AVX512F__)
HK_INLINE VecF max(VecF a, VecF b) { return _mm512_max_ps(a, b); }
HK_INLINE VecD max(VecD a, VecD b) { return _mm512_max_pd(a, b); }
HK_INLINE VecF min(VecF a, VecF b) { return _mm512_min_ps(a, b); }
HK_INLINE VecD min(VecD a, VecD b) { return _mm512_min_pd(a, b); }
HK_INLINE float reduce_add(VecF v) { return _mm512_reduce_add_ps(v); }
HK_INLINE double reduce_add(VecD v) { return _mm512_reduce_add_pd(v); }
HK_INLINE float reduce_max(VecF v) { return _mm512_reduce_max_ps(v); }
HK_INLINE double reduce_max(VecD v) { return _mm512_reduce_max_pd(v); }
#else
#if defined(__AVX2__)
HK_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
HK_INLINE VecD max(VecD a, VecD b) { return _mm256_max_pd(a, b); }
HK_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(a, b); }
HK_INLINE VecD min(VecD a, VecD b) { return _mm256_min_pd(a, b); }
#elif defined(__x86_64__)
HK_INLINE VecF max(VecF a, VecF b) { return _mm_max_ps(a, b); }
HK_INLINE VecD max(VecD a, VecD b) { return _mm_max_pd(a, b); }
HK_INLINE VecF min(VecF a, VecF b) { return _mm_min_ps(a, b); }
HK_INLINE VecD min(VecD a, VecD b) { return _mm_min_pd(a, b); }
#else
template <class V>
HK_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
HK_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
#endif
template <class F, class V, class Op>
HK_INLINE F reduce(V v, Op op) {
  F x[sizeof(V) / sizeof(F)];
  __builtin_memcpy(x, &v, sizeof v);
  for (int half = sizeof(V) / sizeof(F) / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = op(x[i], x[i + half]);
  return x[0];
}
HK_INLINE float reduce_add(VecF v) {
  return reduce<float>(v, [](float a, float b) { return a + b; });
}
HK_INLINE double reduce_add(VecD v) {
  return reduce<double>(v, [](double a, double b) { return a + b; });
}
HK_INLINE float reduce_max(VecF v) {
  return reduce<float>(v, [](float a, float b) { return a > b ? a : b; });
}
HK_INLINE double reduce_max(VecD v) {
  return reduce<double>(v, [](double a, double b) { return a > b ? a : b; });
}
#endif

// Unaligned vectors in memory; with a count, only that many elements are touched and the other lanes are 0.
template <class F>
HK_INLINE Vec<F> load(const F* p) {
  Vec<F> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class F>
HK_INLINE void store(F* p, Vec<F> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
#if defined(__AVX512F__)
HK_INLINE VecF load(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
HK_INLINE VecD load(const double* p, int n) { return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p); }
HK_INLINE void store(float* p, VecF v, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
HK_INLINE void store(double* p, VecD v, int n) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v); }
#else
template <class F>
HK_INLINE Vec<F> load(const F* p, int n) {
  Vec<F> v{};
  for (int i = 0; i < kWidth<F>; ++i)
    if (i < n) v[i] = p[i];
  return v;
}
template <class F>
HK_INLINE void store(F* p, Vec<F> v, int n) {
  for (int i = 0; i < kWidth<F>; ++i)
    if (i < n) p[i] = v[i];
}
#endif

// Asks for `bytes` of memory, to the second-level cache, before they are read. Inline all the way up to a function
// with other effects: g++ drops calls of functions that do nothing but prefetch.
HK_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at, 0, 2);
}
// The same of memory that is written next.
HK_INLINE void prefetch_to_write(void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<char*>(p) + at, 1, 2);
}

// Past the caches, to an address that is a multiple of kVectorBytes. End with stream_fence().
HK_INLINE void stream(void* p, VecF v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), v);
#elif defined(__x86_64__)
  _mm_stream_ps(static_cast<float*>(p), v);
#else
  __builtin_memcpy(p, &v, sizeof v);
#endif
}
HK_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

#include "simd_convert.h"
#include "simd_math.h"
#include "simd_transpose.h"
