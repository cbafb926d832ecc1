// What the kernels of selected attention take, and which queries, heads and keys their tiles hold.
//
// A chooser is what names blocks: a key/value head, or a query head. `pack` query heads follow it. A set is the rows that
// are computed together: all heads of a chooser at `set` neighbouring queries, which visit the union of the blocks that
// these queries chose. A row sees those of its own query. So a set takes at most the products of its queries one by one,
// and fewer wherever neighbours agree, as they do about the first and the latest blocks.
#pragma once
#include "../../common/selected_params.h"
#include "../common/tile_copy.h"

namespace hierkernels::cuda {

// A block that a set visits (or several neighbouring blocks, `merge` of them, that a query visits).
struct Visit {
  int block;
  uint32_t word;  // which queries of the set chose it (which of the blocks are chosen); with weights, the first naming
};

// What is named, as it was given.
struct Naming {
  const void* data;
  bool wide;  // int64, else int32
  int64_t stride[4];
  int named;      // columns
  int own;        // 1: another column, the own block
  int blocks;     // there are so many
};

struct BlockWeights {
  const void* data;  // null: absent
  DType dtype;
  int64_t stride[4];
};

struct SelectedArgs {
  Rows q, k, v, out, dout, dq, dk, dv;
  float* lse;          // (B, Hq, Nq)
  const float* delta;  // (B, Hq, Nq), of the backward
  Naming naming;
  BlockWeights weights;
  int batch, n_queries, n_keys, heads, kv_heads, choosers, pack, block_size, first_position;
  bool causal;
  float scale;

  // Sets of queries, and blocks of rows of a set with more rows than a tile.
  int set, sets, row_blocks, row_warps;  // sets: of a chooser; row_warps: warps that share a tile's rows
  const Visit* visits;                   // (B, choosers, sets, visits_stride)
  const int* counts;                     // (B, choosers, sets)
  int visits_stride;
  float* dweights;                       // optional (row_blocks, B, choosers, Nq, named), zeros at first

  // The inverse, of the key-major backward: for each block of keys (`merge` blocks side by side) its visitors.
  int merge, merged_blocks;
  const Visit* visitors;      // .block: query head of the chooser's key/value head's choosers * Nq + query
  const int* starts;          // (B Hkv merged_blocks + 1): where the visitors of each begin
  const int* item_block;      // (B Hkv, items): the block of each item of work, merged_blocks for none
  const int* first_item;      // (B Hkv, merged_blocks)
  const int* first_part;      // (B Hkv, merged_blocks): of partial sums, where there are several items
  float* parts;               // (parts, keys of a merged block, D + Dv)
  int items, chunk, key_tiles;  // of a pair; visitors of an item at most; tiles of keys of a merged block
};

// The first key that a query at this place does not see.
__device__ __forceinline__ int stop_of(const SelectedArgs& p, int query) {
  if (!p.causal) return p.n_keys;
  const int stop = query + p.first_position + 1;
  return stop < 0 ? 0 : stop < p.n_keys ? stop : p.n_keys;
}

__device__ __forceinline__ float weight_of(const SelectedArgs& p, int b, int chooser, int query, uint32_t column) {
  if (column == static_cast<uint32_t>(p.naming.named)) return 1.f;  // the own block, not named
  const BlockWeights& w = p.weights;
  const int64_t at = b * w.stride[0] + chooser * w.stride[1] + query * w.stride[2] + column * w.stride[3];
  switch (w.dtype) {
    case DType::kBFloat16:
      return ptx::to_float(static_cast<const BFloat16*>(w.data)[at]);
    case DType::kFloat16:
      return ptx::to_float(static_cast<const Float16*>(w.data)[at]);
    case DType::kFloat64:
      return static_cast<float>(static_cast<const double*>(w.data)[at]);
    default:
      return static_cast<const float*>(w.data)[at];
  }
}

// The rows of a block: `pack` heads of a chooser at each query of a set, or a part of them.
struct RowTile {
  int b, chooser, kv_head, query0, row0, set;  // set: its number among all
};

__device__ __forceinline__ RowTile row_tile(const SelectedArgs& p, int rows) {
  RowTile t;
  t.set = static_cast<int>(blockIdx.x) / p.row_blocks;
  t.row0 = static_cast<int>(blockIdx.x) % p.row_blocks * rows;
  t.query0 = t.set % p.sets * p.set;
  t.chooser = t.set / p.sets % p.choosers;
  t.b = t.set / p.sets / p.choosers;
  t.kv_head = t.chooser / (p.choosers / p.kv_heads);
  return t;
}

struct SelectedRow {
  int head, query, member;  // member: the query's place in the set
  bool real;
};

__device__ __forceinline__ SelectedRow row_at(const SelectedArgs& p, const RowTile& t, int r) {
  r += t.row0;
  SelectedRow row;
  row.member = r / p.pack;
  row.query = t.query0 + row.member;
  row.head = t.chooser * p.pack + r - row.member * p.pack;
  row.real = row.member < p.set && row.query < p.n_queries;
  return row;
}

template <class T>
__device__ __forceinline__ T* row_address(const Rows& t, int b, const SelectedRow& row) {
  return row.real ? t.at<T>(b, row.head, row.query) : nullptr;
}

__device__ __forceinline__ int64_t lse_index(const SelectedArgs& p, int b, int head, int query) {
  return (static_cast<int64_t>(b) * p.heads + head) * p.n_queries + query;
}

}  // namespace hierkernels::cuda
