// What the attention kernels of sm_90a take, and which of their tiles a block computes.
//
// An item is a batch entry with `pack` query heads that share a key/value head: all of the group where their number
// divides 64, else one. Its rows are the queries of these heads: row r is query r / pack of head r % pack.
#pragma once
#include "../../common/attention_params.h"
#include "../attention/args.h"
#include "../attention/scores.h"
#include "tiles.h"

namespace hierkernels::cuda {

struct HopperArgs {
  TensorMap q, k, v, dout;
  Rows out, dq, dk, dv;
  float* lse;          // (B, Hq, Nq)
  const float* delta;  // (B, Hq, Nq), of the backward
  KeyRange range;
  int n_queries, n_keys, heads, kv_heads;
  int pack, packs;     // heads of an item; items that share a key/value head
  int items, rows;     // of a launch; of an item
  int tiles_per_item, section;
  float scale;
};

// The shared memory of every kernel begins with tiles; its mbarriers follow.
constexpr int kBarrierBytes = 128;

// Blocks stay and compute one tile after the other: those of a section of items, whose keys fit the cache, from the
// longest to the shortest, which for a causal range is from the last rows to the first, or from the first keys on.
__device__ __forceinline__ int tile_of_block(int total, int round) {
  const int blocks = gridDim.x, block = blockIdx.x;
  // Back and forth, so that no block gets the longer one each time.
  const int index = round * blocks + (round % 2 ? blocks - 1 - block : block);
  return index < total ? index : -1;  // only the last round can be incomplete
}

struct TilePlace {
  int item, tile;  // in the order in which they are computed
};
__device__ __forceinline__ TilePlace place_of(const HopperArgs& p, int index) {
  const int section = index / (p.section * p.tiles_per_item), first = section * p.section;
  const int items = min(p.section, p.items - first), rest = index - first * p.tiles_per_item;
  return {first + rest % items, rest / items};
}

// Rows of an item, and the keys that they see.
struct RowTile {
  int batch, head, kv_head;  // head: the item's first
  int row0, begin, tiles;    // tiles of keys from key `begin` on
};

template <int kRows, int kKeys>
__device__ __forceinline__ RowTile row_tile(const HopperArgs& p, int index) {
  const TilePlace place = place_of(p, index);
  const int per_batch = p.heads / p.pack, of_batch = place.item % per_batch;
  RowTile t;
  t.batch = place.item / per_batch;
  t.head = of_batch * p.pack;
  t.kv_head = of_batch / p.packs;
  t.row0 = (p.tiles_per_item - 1 - place.tile) * kRows;
  const int last = min(t.row0 + kRows, p.rows) - 1;
  t.begin = static_cast<int>(p.range.lo.at(t.row0 / p.pack, p.n_keys));
  const int end = static_cast<int>(p.range.hi.at(last / p.pack, p.n_keys));
  t.tiles = end > t.begin ? (end - t.begin + kKeys - 1) / kKeys : 0;
  return t;
}

// The keys that row r sees; none if there is no such row.
__device__ __forceinline__ Span keys_of_row(const HopperArgs& p, int r) {
  if (r >= p.rows) return {0, 0};
  const int query = r / p.pack;
  return {static_cast<int>(p.range.lo.at(query, p.n_keys)), static_cast<int>(p.range.hi.at(query, p.n_keys))};
}
// The keys that all of a warpgroup's rows from `first` on see, of those rows that there are.
__device__ __forceinline__ Span keys_of_group(const HopperArgs& p, int first) {
  if (first >= p.rows) return {0, 0};
  const int last = min(first + kGroupRows, p.rows) - 1;
  return {static_cast<int>(p.range.lo.at(last / p.pack, p.n_keys)),
          static_cast<int>(p.range.hi.at(first / p.pack, p.n_keys))};
}

__device__ __forceinline__ int64_t lse_index(const HopperArgs& p, int batch, int head, int r) {
  return (static_cast<int64_t>(batch) * p.heads + head + r % p.pack) * p.n_queries + r / p.pack;
}
template <class T>
__device__ __forceinline__ T* row_address(const HopperArgs& p, const Rows& t, const RowTile& tile, int r) {
  return r < p.rows ? t.at<T>(tile.batch, tile.head + r % p.pack, r / p.pack) : nullptr;
}

// Keys of a key/value head, and the rows that see them.
struct KeyTile {
  int batch, head, key0, begin, tiles;  // tiles of each pack's rows, from row `begin` on
};

__device__ __forceinline__ Span rows_of_key(const HopperArgs& p, int key) {
  if (key >= p.n_keys) return {0, 0};
  return {static_cast<int>(p.range.hi.first_reaching(key + 1, p.n_queries)) * p.pack,
          static_cast<int>(p.range.lo.first_reaching(key + 1, p.n_queries)) * p.pack};
}

template <int kKeys, int kRows>
__device__ __forceinline__ KeyTile key_tile(const HopperArgs& p, int index) {
  const TilePlace place = place_of(p, index);
  KeyTile t;
  t.batch = place.item / p.kv_heads;
  t.head = place.item % p.kv_heads;
  t.key0 = place.tile * kKeys;
  t.begin = rows_of_key(p, t.key0).begin;
  const int end = rows_of_key(p, min(t.key0 + kKeys, p.n_keys) - 1).end;
  t.tiles = end > t.begin ? (end - t.begin + kRows - 1) / kRows : 0;
  return t;
}

// Products that are not seen become -inf: of rows that see `seen`, and columns from `first` on.
template <int kSums>
__device__ __forceinline__ void hide(float (&s)[kSums], const Span (&seen)[2], int first) {
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    if (!seen[i / 2 % 2].has(first + sums_column(i / 4, i % 2))) s[i] = -infinity();
}

// The row of a lane's first half in its warpgroup; the second half's is 8 further.
__device__ __forceinline__ int lane_row() {
  return static_cast<int>(threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4);
}

}  // namespace hierkernels::cuda
