// The dropout generator, the same in every backend.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
//   key     = the low and high words of the seed
//   counter = (j / 64 * 16 + j % 16, i, head, batch)     for query i and key j
// gives four words; key j takes word (j / 16) % 4. So one call serves 4 keys that lie 16 apart, and 16 lanes
// serve 64 consecutive keys. A probability is kept iff its word >= dropout_threshold(p).
#pragma once
#include <cstdint>

namespace hierkernels {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

inline uint32_t dropout_threshold(double p) {
  const double t = p * 4294967296.0;
  return t >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(t);
}

}  // namespace hierkernels
