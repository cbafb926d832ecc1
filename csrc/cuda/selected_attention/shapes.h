// The tiles of selected attention, by the bytes of a row: what fits registers and 99 KiB of shared memory.
#pragma once
#include "../attention/shapes.h"
#include "columns.h"

namespace hierkernels::cuda {

// Forward and dQ: up to kRows rows, in tiles of 16, by kKeys keys in two stages. Warps that do not share the rows share
// the keys, 16 at a time, and add what they found at the end: a set has few rows. kSplit times as many warps each have a
// part of the result's columns.
template <class T, int kDim>
struct SelectedShape {
  static constexpr int kBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kWarps = kBytes <= 256 ? 4 : kBytes == 512 ? 2 : 1;
  static constexpr int kSplit = kBytes == 1024 ? 4 : 1;
  static constexpr int kRows = kBytes == 128 ? 64 : kBytes == 256 ? 32 : 16;
  static constexpr int kKeys = 16 * kWarps, kThreads = kWarp * kWarps * kSplit, kColumns = kDim / kSplit;
  static_assert(kThreads <= kAttentionThreads);
  static constexpr int kColumnBytes = kColumnSlots * kKeys * static_cast<int>(sizeof(KeyColumn));
  static constexpr int kWeightBytes = kRows / 16 * kKeys * static_cast<int>(sizeof(float));
  static constexpr int kForwardShared = Tile<T, kDim>::bytes(kRows + 4 * kKeys) + kColumnBytes;
  static constexpr int kQueryShared = Tile<T, kDim>::bytes(2 * kRows + 4 * kKeys) + kColumnBytes + kWeightBytes;
  static constexpr int kBlocksPerSM = kBytes == 128 ? 3 : kBytes <= 256 ? 2 : 1;  // as shared memory has it
};

// dK and dV: as attention's, but that a row is looked up before it is copied.
constexpr int kVisitorBytes = 24;
template <class T, int kDim>
struct SelectedKeyShape : KeyGradientShape<T, kDim> {
  using Base = KeyGradientShape<T, kDim>;
  static constexpr int kShared =
      Tile<T, kDim>::bytes(2 * Base::kKeys + 4 * Base::kRows) + kColumnSlots * Base::kRows * kVisitorBytes;
};

constexpr int kListThreads = 4 * kWarp;  // a warp for each set
constexpr int kSumThreads = 8 * kWarp;
constexpr int kSortRange = 8192;             // counters of a warp that sorts

}  // namespace hierkernels::cuda
