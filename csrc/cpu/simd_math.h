// exp2, log2, tanh and GELU of vectors (part of simd.h).
#pragma once
#include "simd.h"
#if defined(__AVX512F__)
#include "gelu_tables.h"
#endif

namespace hierkernels {
namespace HK_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// c[0] + c[1] x + c[2] x^2 + ...
template <class F, int N>
HK_INLINE Vec<F> polynomial(const F (&c)[N], Vec<F> x) {
  Vec<F> y = set1(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = fma(y, x, set1(c[i]));
  return y;
}

// 2^f for f in [0, 1]: minimax among those that are exact at 0, relative error 8.2e-8 before rounding.
constexpr float kExp2Float[] = {1.0f, 0.69315131f, 0.24016445f, 0.05579991f, 0.00901703f, 0.00186713f};
// The same for results of 16 bits: relative error 2.9e-6.
constexpr float kExp2Short[] = {1.0f, 0.69304484f, 0.24128021f, 0.05224247f, 0.01342669f};
// 2^f for f in [-1/2, 1/2]: Taylor, ln(2)^n / n!, relative error 2e-16.
constexpr double kExp2Double[] = {1.0,
                                  6.931471805599453094e-1,
                                  2.402265069591007123e-1,
                                  5.550410866482157995e-2,
                                  9.618129107628477232e-3,
                                  1.333355814642844342e-3,
                                  1.540353039338160995e-4,
                                  1.525273380405984028e-5,
                                  1.321548679014430949e-6,
                                  1.017808600923969973e-7,
                                  7.054911620801123330e-9,
                                  4.445538271870811498e-10,
                                  2.567843599348820514e-11};

// 2^x by the polynomial `power` for its fraction; 2^-inf = 0, 2^inf = inf, NaN stays NaN. Results below the normal range
// may be 0.
#if defined(__AVX512F__)
// vreduce gives 0 for infinities, and vscalef floors its second argument.
template <int N>
HK_INLINE VecF exp2_by(const float (&power)[N], VecF x) {
  constexpr int kFloor = 1;
  const VecF f = _mm512_reduce_ps(x, kFloor);
  return _mm512_scalef_ps(polynomial<float>(power, f), x);
}
HK_INLINE VecD exp2(VecD x) {
  constexpr int kNearest = 0;
  const VecD f = _mm512_reduce_pd(x, kNearest);
  return _mm512_scalef_pd(polynomial<double>(kExp2Double, f), x - f);
}
#else
// Adding 1.5 * 2^(digits of the fraction) leaves the nearest integer in the low bits.
template <int N>
HK_INLINE VecF exp2_by(const float (&power)[N], VecF x) {
  using U = Simd<float>::U;
  const VecF magic = set1(12582912.0f);
  const VecF clamped = x > 128.0f ? set1(128.0f) : x < -127.0f ? set1(-127.0f) : x;
  const VecF shifted = clamped - 0.5f + magic;
  const VecF f = clamped - (shifted - magic);
  const VecF whole = bit_cast<VecF>((bit_cast<U>(shifted) + 127u) << 23);
  return x < -126.0f ? zero<float>() : polynomial<float>(power, f) * whole;
}
HK_INLINE VecD exp2(VecD x) {
  using U = Simd<double>::U;
  const VecD magic = set1(6755399441055744.0);
  const VecD clamped = x > 1024.0 ? set1(1024.0) : x < -1023.0 ? set1(-1023.0) : x;
  const VecD shifted = clamped + magic;
  const VecD f = clamped - (shifted - magic);
  const VecD power = bit_cast<VecD>((bit_cast<U>(shifted) + 1023u) << 52);
  return x < -1022.0 ? zero<double>() : polynomial<double>(kExp2Double, f) * power;
}
#endif
HK_INLINE VecF exp2(VecF x) { return exp2_by(kExp2Float, x); }

// 1 / x of normal numbers whose inverse is one, to the last bit but one.
HK_INLINE VecF reciprocal(VecF x) {
#if defined(__AVX512F__)
  const VecF y = _mm512_rcp14_ps(x);  // and a step of Newton's: a division takes twice as long
  return fma(fma(-x, y, set1(1.0f)), y, y);
#else
  return 1.0f / x;
#endif
}

// log2 of positive normal numbers (0 gives -inf, NaN and inf stay), absolute error about 1e-7 plus rounding.
HK_INLINE VecF log2(VecF x) {
  using U = Simd<float>::U;
  using I = Simd<float>::I;
  // ln(1 + t) / t for t in [sqrt(1/2) - 1, sqrt(2) - 1]: minimax, relative error 2.6e-8.
  constexpr float kLog[] = {1.0f,           -0.4999998808f, 0.3333418667f,  -0.2500207424f, 0.1995683312f,
                            -0.1656239182f, 0.1495226771f,  -0.1436684877f, 0.0872236043f};
  constexpr uint32_t kSqrtHalf = 0x3f3504f3;
  const U shifted = bit_cast<U>(x) - kSqrtHalf;
  const I exponent = bit_cast<I>(shifted) >> 23;
  const VecF t = bit_cast<VecF>((shifted & 0x007fffffu) + kSqrtHalf) - 1.0f;
  const VecF y = t * polynomial<float>(kLog, t) * static_cast<float>(kLog2E) + __builtin_convertvector(exponent, VecF);
  const VecF special = x == 0.0f ? set1(-__builtin_inff()) : x;
  return (x > 0.0f) & (x < __builtin_inff()) ? y : special;
}
HK_INLINE VecD log2(VecD x) {
  VecD y{};
  for (int i = 0; i < kWidth<double>; ++i) y[i] = ::log2(x[i]);
  return y;
}

// For |x| small, tanh x = x + x^3 * (a polynomial, or a ratio of two, in x^2): Cephes, Moshier.
HK_INLINE VecF tanh_small(VecF x) {
  constexpr float kTanh[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f,
                             -5.70498872745e-3f};
  const VecF z = x * x;
  return fma(x * z, polynomial<float>(kTanh, z), x);
}
HK_INLINE VecD tanh_small(VecD x) {
  constexpr double kP[] = {-1.61468768441708447952e3, -9.92877231001918586564e1, -9.64399179425052238628e-1};
  constexpr double kQ[] = {4.84406305325125486048e3, 2.23548839060100448583e3, 1.12811678491632931402e2, 1.0};
  const VecD z = x * x;
  return fma(x * z, polynomial<double>(kP, z) / polynomial<double>(kQ, z), x);
}
template <class V>
HK_INLINE V tanh(V x) {
  using F = decltype(+V{}[0]);
  const V magnitude = x < F(0) ? -x : x;
  const V large = F(1) - F(2) / (exp2(magnitude * F(2 * kLog2E)) + F(1));
  const V signed_large = x < F(0) ? -large : large;
  return magnitude < F(0.625) ? tanh_small(x) : signed_large;
}

// GELU of float: out of tables that registers hold, or, where they are too short for tables, by a formula.
#if defined(__AVX512F__)
// The interval of the table in which |x| lies, a number in the low bits, and the distance from its middle in steps.
struct TablePlace {
  Mask<float> interval;
  VecF distance;
};
template <class Table>
HK_INLINE TablePlace place_in(VecF x) {
  // Integers end up in the low bits. A NaN passes through, and the rest of the bits is not looked at.
  const VecF magic = set1(12582912.0f);
  const VecF steps = min(set1(Table::kIntervals - 1.0f), _mm512_abs_ps(x) * Table::kPerStep);
  const VecF shifted = steps + magic;
  return {bit_cast<Mask<float>>(shifted), steps - (shifted - magic)};
}
template <int N>
HK_INLINE VecF look_up(const float (&table)[N], Mask<float> interval) {
  const __m512i index = bit_cast<__m512i>(interval);
  if constexpr (N == 16) return _mm512_permutexvar_ps(index, load(table));
  else return _mm512_permutex2var_ps(load(table), index, load(table + 16));
}
// The table's function f of |x| where x < 0, and 1 - f elsewhere.
template <class Table>
HK_INLINE VecF from_table(VecF x, TablePlace place) {
  VecF y = look_up(Table::kTerms[Table::kDegree], place.interval);
#pragma GCC unroll 8
  for (int i = Table::kDegree - 1; i >= 0; --i) y = fma(y, place.distance, look_up(Table::kTerms[i], place.interval));
  return x < 0.0f ? y : 1.0f - y;
}
// value = x P(X <= x) for a standard normal X, and its slope; as exact as T is.
template <class T = float>
HK_INLINE void gelu(VecF x, VecF& value, VecF& slope) {
  constexpr bool kShort = sizeof(T) == 2;
  using Tail = std::conditional_t<kShort, ShortNormalTailTable, NormalTailTable>;
  using Slope = std::conditional_t<kShort, ShortGeluSlopeTable, GeluSlopeTable>;
  static_assert(Tail::kPerStep == Slope::kPerStep && Tail::kIntervals == Slope::kIntervals);
  const TablePlace place = place_in<Tail>(x);
  value = x * from_table<Tail>(x, place);
  slope = from_table<Slope>(x, place);
}
#else
// For x >= 0 the tail of the standard normal distribution over its density times sqrt(2 pi): t times a polynomial in
// t = 1 / (1 + step x), in the manner of Abramowitz and Stegun 7.1.26; minimax. Relative error 2.4e-8, and 9.5e-5 for
// results of 16 bits.
struct NormalTail {
  static constexpr float kStep = 0.27f;
  static constexpr float kTerms[] = {0.107720173f,  0.107550647f, 0.101758160f,  0.0722443213f, 0.107389893f,
                                     -0.0686067906f, 0.169278588f, -0.126248825f, 0.0289138946f};
};
struct ShortNormalTail {
  static constexpr float kStep = 0.4f;
  static constexpr float kTerms[] = {0.15957282f, 0.16051003f, 0.12058337f, 0.14404358f, -0.08475722f};
};
template <class Tail>
HK_INLINE VecF normal_cdf(VecF x, VecF density) {
  const VecF magnitude = min(set1(64.0f), x < 0.0f ? -x : x);  // where the density is 0
  const VecF t = reciprocal(fma(magnitude, set1(Tail::kStep), set1(1.0f)));
  const VecF tail = polynomial<float>(Tail::kTerms, t) * (t * density);
  return x < 0.0f ? tail : 1.0f - tail;
}
// value = x P(X <= x) for a standard normal X, and its slope; as exact as T is.
template <class T = float>
HK_INLINE void gelu(VecF x, VecF& value, VecF& slope) {
  constexpr bool kShort = sizeof(T) == 2;
  const VecF exponent = x * x * static_cast<float>(-0.5 * kLog2E);
  const VecF density = kShort ? exp2_by(kExp2Short, exponent) : exp2(exponent);
  const VecF cdf = normal_cdf<std::conditional_t<kShort, ShortNormalTail, NormalTail>>(x, density);
  value = x * cdf;
  slope = fma(x * 0.39894228040143267794f, density, cdf);
}
#endif
template <class T = double>
HK_INLINE void gelu(VecD x, VecD& value, VecD& slope) {
  VecD cdf;
  for (int i = 0; i < kWidth<double>; ++i) cdf[i] = 0.5 * ::erfc(-0.70710678118654752440 * x[i]);
  value = x * cdf;
  slope = fma(x * 0.39894228040143267794, exp2(x * x * (-0.5 * kLog2E)), cdf);
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
