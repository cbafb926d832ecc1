// The tiles of the attention kernels: for each type and width of a head, what fits 255 registers a thread and the
// shared memory of every device from sm_80 on (99 KiB a block).
#pragma once
#include "../common/device.h"
#include "../common/products.h"

namespace hierkernels::cuda {

constexpr int kAttentionThreads = 4 * kWarp;  // of a block at most, whatever the type

// Forward and dQ: kWarps x 16 kM rows by kKeys keys, keys and values in two stages. kSplit warps have the same rows, each
// with a part of the result's columns, which would not fit the registers of one; the scores they compute each for itself.
template <class T, int kDim>
struct ForwardShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kSplit = kWide && kDim == 256 ? 2 : 1;
  static constexpr int kWarps = kWide && kDim == 256 ? 2 : 4;
  static constexpr int kM = !kWide && kDim == 64 ? 2 : 1;
  static constexpr int kKeys = kWide ? (kDim == 64 ? 32 : 16) : kDim == 256 ? 32 : 64;
  static constexpr int kRows = 16 * kM * kWarps, kThreads = kWarp * kWarps * kSplit;
  static_assert(kThreads <= kAttentionThreads);
  static constexpr int kShared = Tile<T, kDim>::bytes(kRows + 4 * kKeys);
  static constexpr int kBlocksPerSM = kDim * sizeof(T) <= 256 ? 2 : 1;
};

template <class T, int kDim>
struct QueryGradientShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kSplit = kWide && kDim == 256 ? 4 : 1;
  static constexpr int kWarps = kWide && kDim == 256 ? 1 : 4;
  static constexpr int kM = 1;
  static constexpr int kKeys = kDim == 256 || (kWide && kDim == 128) ? 16 : kWide || kDim == 128 ? 32 : 64;
  static constexpr int kRows = 16 * kM * kWarps, kThreads = kWarp * kWarps * kSplit;
  static_assert(kThreads <= kAttentionThreads);
  static constexpr int kShared = Tile<T, kDim>::bytes(2 * kRows + 4 * kKeys);
  static constexpr int kBlocksPerSM = kDim * sizeof(T) <= 256 ? 2 : 1;
};

// dK and dV: kKeyWarps x 16 keys by kRows rows, rows in two stages. kSplit warps share 16 keys, each with a part of
// the gradients' columns: they would not fit the registers of one.
template <class T, int kDim>
struct KeyGradientShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kSplit = kWide && kDim == 256 ? 4 : kDim == 256 || (kWide && kDim == 128) ? 2 : 1;
  static constexpr int kKeyWarps = 4 / kSplit;
  static constexpr int kKeys = 16 * kKeyWarps, kThreads = kWarp * kKeyWarps * kSplit;
  static_assert(kThreads <= kAttentionThreads);
  static constexpr int kRows = kWide || kDim == 256 ? 16 : kDim == 128 ? 32 : 64;
  static constexpr int kStatistics = 2 * kRows * static_cast<int>(sizeof(float));  // a stage's lse and delta
  static constexpr int kShared = Tile<T, kDim>::bytes(2 * kKeys + 4 * kRows) + 2 * kStatistics;
  static constexpr int kBlocksPerSM = kDim * sizeof(T) <= 128 ? 2 : 1;
};

// The gradient of the bias: 64 rows by 64 keys, the heads in parts of 64 columns.
template <class T>
struct BiasGradientShape {
  static constexpr int kWarps = 4, kRows = 64, kKeys = 64, kPart = 64, kThreads = kWarp * kWarps;
  static constexpr int kShared = Tile<T, kPart>::bytes(kRows + kKeys);
};

// Of the warps that share rows or keys, which part of the columns this one has: its first column.
template <int kWarps, int kColumns>
__device__ __forceinline__ int first_column() {
  return static_cast<int>(threadIdx.x) / kWarp / kWarps * kColumns;
}

constexpr int kDeltaThreads = 8 * kWarp;  // a warp for each row

constexpr int kCombineThreads = 8 * kWarp, kCombineChannels = 256;
constexpr int kCombineShared = kCombineThreads / kWarp * kCombineChannels * static_cast<int>(sizeof(float));

}  // namespace hierkernels::cuda
