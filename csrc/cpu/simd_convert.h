// Loads and stores that convert between storage types and the vectors of float and double (part of simd.h).
#pragma once
#include "simd.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// One number.
HK_INLINE float to_float(float x) { return x; }
HK_INLINE double to_float(double x) { return x; }
HK_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
HK_INLINE float to_float(Float16 x) {
  // The exponent moves by 127 - 15, by a multiplication that also normalises subnormal numbers.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN
  return bit_cast<float>(bits | special | sign);
}

// 16-bit storage of a vector of floats, in the low half of 32-bit lanes.
using U32 = Simd<float>::U;
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));

HK_INLINE VecF decode(BFloat16*, U32 bits) { return bit_cast<VecF>(bits << 16); }
HK_INLINE VecF decode(Float16*, U32 bits) {
  const U32 magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const U32 scaled = bit_cast<U32>(bit_cast<VecF>(magnitude) * 0x1p112f);
  const U32 special = magnitude >= 0x0f800000u ? U32{} + 0x7f800000u : U32{};
  return bit_cast<VecF>(scaled | special | sign);
}
// Round to nearest, ties to even.
HK_INLINE U32 encode(BFloat16*, VecF x) {
  const U32 bits = bit_cast<U32>(x);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? (bits >> 16) | 0x40u : rounded;
}
HK_INLINE U32 encode(Float16*, VecF x) {
  const U32 bits = bit_cast<U32>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 shifts a subnormal result to the low bits, rounded.
  const U32 subnormal = bit_cast<U32>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 special = magnitude > 0x7f800000u ? U32{} + 0x7e00u : U32{} + 0x7c00u;
  const U32 finite = magnitude < (113u << 23) ? subnormal : normal;
  return sign | (magnitude >= (143u << 23) ? special : finite);
}

// p[0..kWidth) as F.
template <class F, class T>
HK_INLINE Vec<F> load_as(const T* p) {
  if constexpr (kSame<F, T>) {
    return load(p);
  } else if constexpr (kSame<F, float> && sizeof(T) == 2) {
#if defined(__AVX512F__)
    if constexpr (kSame<T, Float16>) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    if constexpr (kSame<T, Float16>) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
#if defined(__AVX512F__)
    // g++ converts by halves, or by permutations.
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return decode(static_cast<T*>(nullptr), bit_cast<U32>(bits));
#else
    U16 bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return decode(static_cast<T*>(nullptr), __builtin_convertvector(bits, U32));
#endif
  } else {
    Vec<F> v{};
    for (int i = 0; i < kWidth<F>; ++i) v[i] = static_cast<F>(to_float(p[i]));
    return v;
  }
}
// The first n; 0 in the other lanes.
template <class F, class T>
HK_INLINE Vec<F> load_as(const T* p, int n) {
  if constexpr (kSame<F, T>) {
    return load(p, n);
  } else {
    T whole[kWidth<F>] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load_as<F>(whole);
  }
}

template <class F, class T>
HK_INLINE void store_as(T* p, Vec<F> v) {
  if constexpr (kSame<F, T>) {
    store(p, v);
  } else {
    static_assert(kSame<F, float> && sizeof(T) == 2);
#if defined(__AVX512F__)
    if constexpr (kSame<T, Float16>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#elif defined(__F16C__)
    if constexpr (kSame<T, Float16>) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast<__m512i>(encode(p, v))));
#else
    const U16 bits = __builtin_convertvector(encode(p, v), U16);
    __builtin_memcpy(p, &bits, sizeof bits);
#endif
  }
}
template <class F, class T>
HK_INLINE void store_as(T* p, Vec<F> v, int n) {
  if constexpr (kSame<F, T>) {
    store(p, v, n);
  } else {
    T whole[kWidth<F>];
    store_as<F>(whole, v);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
  }
}

// True where the byte is not 0, for the bytes p[0..kWidth).
template <class F>
HK_INLINE Mask<F> load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  // g++ converts vectors to four times their size one element at a time.
  if constexpr (kSame<F, float>)
    return bit_cast<Mask<F>>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) != 0;
#elif defined(__AVX2__)
  if constexpr (kSame<F, float>)
    return bit_cast<Mask<F>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))) != 0;
#endif
  Mask<F> v{};
  for (int i = 0; i < kWidth<F>; ++i) v[i] = -static_cast<int>(p[i] != 0);
  return v;
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
