// What the attention kernels take, and how the rows and keys of their tiles map to queries, heads and sequences.
//
// An item is a (batch, key/value head) pair. Its rows are the queries of all heads of the group: row r is query
// r / group of head r % group. A tile has rows of one item; or, where items are short, the rows and the keys of
// several items, one after the other (`items_per_tile` > 1), and there is only one tile of keys.
#pragma once
#include "../../common/attention_params.h"
#include "../common/tile_copy.h"

namespace hierkernels::cuda {

// A bias or mask with broadcast strides (in elements) over (B, H, Nq, Nk).
struct PairTensor {
  const void* data;  // null: absent
  int64_t stride[4];
};

struct AttentionArgs {
  Rows q, k, v, out, dout, dq, dk, dv;
  float* lse;          // (B, Hq, Nq)
  const float* delta;  // (B, Hq, Nq), of the backward
  KeyRange range;
  int n_queries, n_keys, group, heads, kv_heads, items, rows_per_item, items_per_tile;
  float scale;

  // Score modifiers; `modified` if there is any.
  bool modified;
  PairTensor bias, mask;
  DType bias_dtype;
  int bias_width, bias_before;  // by slots, with a width
  const unsigned char* padding;
  int64_t padding_stride[2];
  float softcap, dropout_scale;
  const int64_t* seed;  // null: no dropout
  uint32_t dropout_threshold;

  // Few rows, many keys: `parts` blocks (1: none) share the keys of a tile and leave records, see combine.cu.
  int parts;
  float* records;
  int64_t n_records;

  // The gradient of the bias: sums over `slices` parts of what shares an element, each of the bias's shape.
  float* dbias;
  int64_t bias_size[4];
  int slices;
};

// A query of a head; `real` unless it only fills up a tile.
struct Query {
  int item, batch, head, query;
  int first_key;  // the column that the item's key 0 has in the tile of keys 0
  bool real;
};

// Row r (counted from the item `item0`'s first row).
__device__ __forceinline__ Query query_at(const AttentionArgs& p, int item0, int r) {
  int slot = 0;
  if (p.items_per_tile > 1) {
    slot = r / p.rows_per_item;
    r -= slot * p.rows_per_item;
  }
  Query q;
  q.item = item0 + slot;
  q.real = slot < p.items_per_tile && q.item < p.items && r < p.rows_per_item;
  q.batch = q.item / p.kv_heads;
  q.query = p.group == 1 ? r : r / p.group;
  q.head = q.item % p.kv_heads * p.group + (p.group == 1 ? 0 : r % p.group);
  q.first_key = slot * p.n_keys;
  return q;
}

// A key of a key/value head.
struct Key {
  int item, batch, head, key;
  int first_row;  // the row that the item's row 0 has in the tile of rows 0
  bool real;
};

// Column c (counted from the item `item0`'s first key).
__device__ __forceinline__ Key key_at(const AttentionArgs& p, int item0, int c) {
  int slot = 0;
  if (p.items_per_tile > 1) {
    slot = c / p.n_keys;
    c -= slot * p.n_keys;
  }
  Key k;
  k.item = item0 + slot;
  k.real = slot < p.items_per_tile && k.item < p.items && c < p.n_keys;
  k.batch = k.item / p.kv_heads;
  k.head = k.item % p.kv_heads;
  k.key = c;
  k.first_row = slot * p.rows_per_item;
  return k;
}

template <class T>
__device__ __forceinline__ T* row_address(const Rows& t, const Query& q) {
  return q.real ? t.at<T>(q.batch, q.head, q.query) : nullptr;
}
template <class T>
__device__ __forceinline__ T* row_address(const Rows& t, const Key& k) {
  return k.real ? t.at<T>(k.batch, k.head, k.key) : nullptr;
}

__device__ __forceinline__ int64_t lse_index(const AttentionArgs& p, const Query& q) {
  return (static_cast<int64_t>(q.batch) * p.heads + q.head) * p.n_queries + q.query;
}

// [begin, end): what a row or a key sees, as columns or rows of a tile.
struct Span {
  int begin, end;
  __device__ bool has(int x) const { return x >= begin && x < end; }
};

__device__ __forceinline__ Span keys_of(const AttentionArgs& p, const Query& q) {
  if (!q.real) return {0, 0};
  return {q.first_key + static_cast<int>(p.range.lo.at(q.query, p.n_keys)),
          q.first_key + static_cast<int>(p.range.hi.at(q.query, p.n_keys))};
}
__device__ __forceinline__ Span rows_of(const AttentionArgs& p, const Key& k) {
  if (!k.real) return {0, 0};
  return {k.first_row + static_cast<int>(p.range.hi.first_reaching(k.key + 1, p.n_queries)) * p.group,
          k.first_row + static_cast<int>(p.range.lo.first_reaching(k.key + 1, p.n_queries)) * p.group};
}

// The tiles that a block visits: those that begin at visit.begin, visit.begin + size, ... below visit.end. Those that
// lie in `inside` need no mask.
struct Tiles {
  Span visit, inside;
};

// Of kSize keys each, for the rows [first, last] of an item (of the tile, if it has several items).
template <int kSize>
__device__ __forceinline__ Tiles key_tiles(const AttentionArgs& p, int first, int last) {
  if (p.items_per_tile > 1) return {{0, p.items_per_tile * p.n_keys}, {0, 0}};
  const int i = first / p.group, j = last / p.group;
  const Span top{static_cast<int>(p.range.lo.at(i, p.n_keys)), static_cast<int>(p.range.hi.at(i, p.n_keys))};
  const Span bottom{static_cast<int>(p.range.lo.at(j, p.n_keys)), static_cast<int>(p.range.hi.at(j, p.n_keys))};
  return {{top.begin / kSize * kSize, bottom.end}, {bottom.begin, top.end}};
}

// The share of one of `parts` blocks of the keys that a tile's rows see, in tiles of kSize.
template <int kSize>
__device__ __forceinline__ Span share_of(const Span& visit, int number, int parts) {
  const int tiles = (visit.end - visit.begin + kSize - 1) / kSize, each = tiles <= 0 ? 0 : (tiles + parts - 1) / parts;
  const int begin = visit.begin + number * each * kSize, end = begin + each * kSize;
  return {begin, end < visit.end ? end : visit.end};
}

// Of kSize rows each, for the keys [first, last].
template <int kSize>
__device__ __forceinline__ Tiles row_tiles(const AttentionArgs& p, int first, int last) {
  if (p.items_per_tile > 1) return {{0, p.items_per_tile * p.rows_per_item}, {0, 0}};
  Key k{};
  k.real = true;
  k.key = first;
  const Span top = rows_of(p, k);
  k.key = last;
  const Span bottom = rows_of(p, k);
  return {{top.begin / kSize * kSize, bottom.end}, {bottom.begin, top.end}};
}

}  // namespace hierkernels::cuda
