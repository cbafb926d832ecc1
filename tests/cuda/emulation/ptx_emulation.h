// The wrappers of csrc/cuda/common/ptx.h, same names and meaning, for the host's compiler.
#pragma once
#include <cmath>
#include <cstring>

namespace hierkernels::cuda::ptx {

inline uint32_t shared_address(const void* p) { return emulation::shared_offset(p); }

// ---- conversions ----

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                   : __uint_as_float((exponent + 112) << 23 | fraction << 13);
  return sign ? -size : size;
}

// x with the lower `drop` bits rounded away, to nearest: ties to even, or away from zero.
inline uint32_t round_bits(uint32_t x, int drop, bool ties_even) {
  const uint32_t half = 1u << (drop - 1);
  const uint32_t up = ties_even ? half - 1 + (x >> drop & 1) : half;
  return (x + up) >> drop << drop;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>(round_bits(__float_as_uint(x), 16, true) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000u);
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 6.103515625e-5f)  // subnormal: multiples of 2^-24, ties to even as nearbyint's default mode
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))))};
  const uint32_t rounded = round_bits(__float_as_uint(size), 13, true);
  return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline uint32_t to_tf32(float x) {
  return std::isfinite(x) ? round_bits(__float_as_uint(x), 13, false) : __float_as_uint(x);
}

// ---- elementary functions ----

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;  // .ftz: no subnormal results
}

// ---- tiles, products, copies, barriers ----

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulation::ldmatrix(r, false, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulation::ldmatrix(r, true, row); }
inline void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma(emulation::Element::kBFloat16, d, a, b0, b1);
}
inline void mma(Float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma(emulation::Element::kFloat16, d, a, b0, b1);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma(emulation::Element::kTf32, d, a, b0, b1);
}
inline void cp_async16(void* to, const void* from, int bytes) { emulation::cp_async(to, from, 16, bytes); }
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int kGroups>
void cp_async_wait() {
  emulation::cp_async_wait(kGroups);
}
inline void barrier_sync(int id, int threads) { emulation::barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { emulation::barrier(id, threads, false); }

}  // namespace hierkernels::cuda::ptx
