// Dropout in CUDA kernels: the words of csrc/common/philox.h.
#pragma once
#include "../../common/philox.h"
#include "device.h"

namespace hierkernels::cuda {

struct Philox {
  uint32_t words[4];
};

// The words of the keys counter / 16 * 64 + counter % 16 + (0, 16, 32, 48).
__device__ __forceinline__ Philox philox(uint64_t seed, uint32_t counter, uint32_t i, uint32_t h, uint32_t b) {
  uint32_t c0 = counter, c1 = i, c2 = h, c3 = b;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t h0 = __umulhi(kPhiloxM0, c0), l0 = kPhiloxM0 * c0;
    const uint32_t h1 = __umulhi(kPhiloxM1, c2), l1 = kPhiloxM1 * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ uint32_t philox_counter(uint32_t j) { return j / 64 * 16 + j % 16; }
// Of the four words, that of key j.
__device__ __forceinline__ uint32_t philox_word(const Philox& p, uint32_t j) {
  const uint32_t w = j / 16 % 4;
  return w < 2 ? (w == 0 ? p.words[0] : p.words[1]) : (w == 2 ? p.words[2] : p.words[3]);
}

}  // namespace hierkernels::cuda
