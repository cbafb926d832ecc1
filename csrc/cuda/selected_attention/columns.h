// The columns of a set's tiles of keys: the keys of the blocks that it visits, one block after the other. A tile holds a
// part of a block, or several small blocks.
#pragma once
#include "args.h"

namespace hierkernels::cuda {

struct KeyColumn {
  int key;        // -1: none
  uint32_t word;  // which queries of the set see it; with weights, the float32 weight
};
// A tile is copied by its columns, while the next ones are looked up and those of the tile before are in use.
constexpr int kColumnSlots = 3;

struct ColumnSource {
  const Visit* visits;
  int count;    // of columns
  bool weighted;
};

__device__ __forceinline__ ColumnSource column_source(const SelectedArgs& p, const RowTile& t) {
  return {p.visits + static_cast<int64_t>(t.set) * p.visits_stride, p.counts[t.set] * p.block_size, p.weights.data != nullptr};
}

// Looks up the columns from n0 on.
template <int kKeys, int kThreads>
__device__ __forceinline__ void fill_columns(const SelectedArgs& p, const RowTile& t, const ColumnSource& source,
                                             KeyColumn* columns, int n0) {
  for (int c = threadIdx.x; c < kKeys; c += kThreads) {
    const int n = n0 + c;
    KeyColumn column{-1, 0};
    if (n < source.count) {
      const int at = n / p.block_size;
      const Visit visit = source.visits[at];
      const int key = visit.block * p.block_size + (n - at * p.block_size);
      if (key < p.n_keys) column.key = key;
      column.word = source.weighted ? __float_as_uint(weight_of(p, t.b, t.chooser, t.query0, visit.word)) : visit.word;
    }
    columns[c] = column;
  }
}

// What a lane knows of one of its rows.
struct RowSight {
  int stop;         // the first key that it does not see
  uint32_t member;  // the bit of its query in the words of columns
};

// With weights, which may be 0, the range of keys alone decides: a set is then one query.
__device__ __forceinline__ bool is_seen(const RowSight& row, const KeyColumn& c, bool weighted) {
  return c.key >= 0 && c.key < row.stop && (weighted || (c.word & row.member));
}
__device__ __forceinline__ RowSight sight_of(const SelectedArgs& p, const SelectedRow& row) {
  return {row.real ? stop_of(p, row.query) : 0, 1u << (row.member & 31)};
}

// Adds the sums of the warps that share a tile of rows, in the order of the warps; the first of them has the result. The
// shared memory is free. Sums lie there as the lanes hold them.
template <int kWarps, int kN>
__device__ __forceinline__ void add_warps(Sums<1, kN>& sums, float* memory, int row_warps) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row_warps == kWarps) return;
  if (warp >= row_warps) {
    float* const to = memory + (warp - row_warps) * kN * 4 * kWarp + lane;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) to[(4 * n + e) * kWarp] = sums.x[0][n][e];
  }
  __syncthreads();
  if (warp >= row_warps) return;
  for (int other = warp; other < kWarps - row_warps; other += row_warps) {
    const float* const from = memory + other * kN * 4 * kWarp + lane;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.x[0][n][e] += from[(4 * n + e) * kWarp];
  }
}

}  // namespace hierkernels::cuda
