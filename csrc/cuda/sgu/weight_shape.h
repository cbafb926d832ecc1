// The tiles of the weight's gradient.
#pragma once
#include "args.h"
#include "operands.h"

namespace hierkernels::cuda {

template <class T>
struct WeightShape {
  static constexpr int kM = sizeof(T) == 4 ? 2 : 4, kN = 2 * kM;  // of a warp, in tiles of 16 x 8
  static constexpr int kWarpRows = 2, kWarpColumns = 2, kThreads = kWarp * kWarpRows * kWarpColumns;
  static_assert(kThreads == kMixThreads);
  static constexpr int kSize = 16 * kM * kWarpRows;  // rows of a tile, and columns
  static_assert(kSize == 8 * kN * kWarpColumns);
  static constexpr int kTerms = 64 / static_cast<int>(sizeof(T));  // channels: two steps
  static constexpr int kStages = 3;
  using TileT = Tile<T, kTerms>;
  static constexpr int kTileBytes = TileT::bytes(kSize), kStageBytes = 2 * kTileBytes;
  static constexpr int kShared = kStages * kStageBytes;
};

}  // namespace hierkernels::cuda
