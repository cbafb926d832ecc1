// The tiles of keys and values that forward and dQ go through: two stages in shared memory, filled while the stage before
// is used, and the columns of the tiles, which are looked up one tile earlier still.
#pragma once
#include "shapes.h"

namespace hierkernels::cuda {

template <class T, int kDim>
struct KeyStages {
  using S = SelectedShape<T, kDim>;
  using TileT = Tile<T, kDim>;
  static constexpr int kBytes = TileT::bytes(S::kKeys);

  const SelectedArgs& p;
  const RowTile& tile;
  const ColumnSource source;
  unsigned char *const keys, *const values;
  KeyColumn* const columns;
  const T *const k0, *const v0;

  // From `memory` on lie two tiles of keys, two of values, and the columns.
  __device__ __forceinline__ KeyStages(const SelectedArgs& args, const RowTile& t, unsigned char* memory)
      : p(args),
        tile(t),
        source(column_source(args, t)),
        keys(memory),
        values(memory + 2 * kBytes),
        columns(reinterpret_cast<KeyColumn*>(memory + 4 * kBytes)),
        k0(args.k.at<const T>(t.b, t.kv_head, 0)),
        v0(args.v.at<const T>(t.b, t.kv_head, 0)) {}

  __device__ __forceinline__ KeyColumn* slot_at(int slot) const { return columns + slot % kColumnSlots * S::kKeys; }
  __device__ __forceinline__ void look_up(int n0, int slot) const {
    fill_columns<S::kKeys, S::kThreads>(p, tile, source, slot_at(slot), n0);
  }
  __device__ __forceinline__ void copy(const KeyColumn* at, int stage) const {
    const auto row = [&](const T* first, int64_t token) {
      return [=](int r) { return at[r].key < 0 ? nullptr : first + at[r].key * token; };
    };
    copy_rows<T, S::kKeys, kDim, S::kThreads>(keys + stage * kBytes, p.k, row(k0, p.k.token));
    copy_rows<T, S::kKeys, kDim, S::kThreads>(values + stage * kBytes, p.v, row(v0, p.v.token));
  }

  // Starts with the first tile, and commits what the caller started to copy before.
  __device__ __forceinline__ void start() const {
    look_up(0, 0);
    look_up(S::kKeys, 1);
    __syncthreads();
    if (source.count > 0) copy(columns, 0);
    ptx::cp_async_commit();
  }
  // Waits for the tile of the columns from n0 on, in `stage`, while the next ones are on their way.
  __device__ __forceinline__ void wait(int n0, int stage, int slot) const {
    if (n0 + S::kKeys < source.count) copy(slot_at(slot + 1), stage ^ 1);
    ptx::cp_async_commit();  // perhaps empty: waiting for all but one means this tile in any case
    look_up(n0 + 2 * S::kKeys, slot + 2);
    ptx::cp_async_wait<1>();
    __syncthreads();         // every thread's part of the tile, and of the next tile but one's columns, is there
  }
};

}  // namespace hierkernels::cuda
