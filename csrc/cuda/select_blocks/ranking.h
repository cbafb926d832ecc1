// The best blocks so far of a query, in shared memory, best first: a warp inserts what 32 lanes bring.
//
// An entry is a score's bits, in an order that integers have as well, above the block's number, negated: of equal scores
// the lower block is larger, and no two entries are equal. 0: no entry.
#pragma once
#include "../common/ptx.h"

namespace hierkernels::cuda {

__device__ __forceinline__ uint64_t entry_of(float score, int block) {
  const uint32_t bits = __float_as_uint(score == 0.f ? 0.f : score);  // -0 is 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(block);
}
__device__ __forceinline__ float score_of(uint64_t entry) {
  const uint32_t ordered = static_cast<uint32_t>(entry >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int block_of(uint64_t entry) { return static_cast<int>(~static_cast<uint32_t>(entry)); }

// Puts an entry in its place; what is then one too many is lost.
__device__ __forceinline__ void insert(uint64_t* list, int length, uint64_t entry) {
  const int lane = threadIdx.x % kWarp;
  int at = 0;
  for (int i0 = 0; i0 < length; i0 += kWarp)
    at += __popc(__ballot_sync(kAllLanes, i0 + lane < length && list[i0 + lane] > entry));
  for (int i0 = (length - 1) / kWarp * kWarp; i0 >= at / kWarp * kWarp; i0 -= kWarp) {
    const int i = i0 + lane;
    const bool moves = i >= at && i < length;
    const uint64_t moved = !moves ? 0 : i == at ? entry : list[i - 1];
    __syncwarp();
    if (moves) list[i] = moved;
    __syncwarp();
  }
}

// Each lane brings an entry, or 0.
__device__ __forceinline__ void merge(uint64_t* list, int length, uint64_t entry) {
  unsigned better = __ballot_sync(kAllLanes, entry > list[length - 1]);
  while (better) {
    const int from = __ffs(better) - 1;
    better &= better - 1;
    const uint64_t next = __shfl_sync(kAllLanes, entry, from);
    if (next > list[length - 1]) insert(list, length, next);
  }
}

// Writes the blocks of a list that keeps(entry) in ascending order, then -1.
template <class Keeps>
__device__ __forceinline__ void store_ascending(int* to, int count, const uint64_t* list, int length, Keeps keeps) {
  const int lane = threadIdx.x % kWarp;
  int kept = 0;
  for (int i0 = 0; i0 < length; i0 += kWarp) {
    const uint64_t entry = i0 + lane < length ? list[i0 + lane] : 0;
    const bool keep = entry && keeps(entry);
    int before = 0;
    for (int j = 0; j < length; ++j) before += list[j] && keeps(list[j]) && block_of(list[j]) < block_of(entry);
    if (keep) to[before] = block_of(entry);
    kept += __popc(__ballot_sync(kAllLanes, keep));
  }
  for (int i = kept + lane; i < count; i += kWarp) to[i] = -1;
}

}  // namespace hierkernels::cuda
