// The CUDA language for the host's compiler: what kernel sources use of it, and nothing else.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "kernels use shared_memory() of device.h");
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (::hierkernels::emulation::thread_index())
#define blockIdx (::hierkernels::emulation::block_index())
#define blockDim (::hierkernels::emulation::block_size())
#define gridDim (::hierkernels::emulation::grid_size())

namespace hierkernels::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

// ---- synchronisation, shuffles, votes ----

inline void __syncthreads() { emulation::barrier(0, 0, true); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::sync_warp(mask); }

namespace language {
template <class T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle(mask, bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// The lane `from` if it is in this lane's segment of `width` lanes, else this lane.
inline int within_segment(int from, int width) {
  const int own = emulation::lane();
  return from / width == own / width && from >= 0 ? from : own;
}
}  // namespace language

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return language::shuffle(mask, value, emulation::lane() / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return language::shuffle(mask, value, language::within_segment(emulation::lane() ^ bits, width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32) {
  return language::shuffle(mask, value, language::within_segment(emulation::lane() + by, width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
  return language::shuffle(mask, value, language::within_segment(emulation::lane() - by, width));
}
inline unsigned __ballot_sync(unsigned mask, bool vote) { return emulation::ballot(mask, vote); }
inline bool __any_sync(unsigned mask, bool vote) { return emulation::ballot(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return emulation::ballot(mask, vote) == mask; }

// ---- arithmetic ----

inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

}  // namespace hierkernels::cuda
