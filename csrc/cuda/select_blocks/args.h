// What the kernel that chooses blocks takes, and how its shared memory is laid out.
//
// A block of threads serves `queries` neighbouring queries of one chooser, whose `heads` query heads are the rows of its
// tile: row r is query r / heads, head r % heads (of a part of the chooser's heads, if they do not fit).
#pragma once
#include "../../common/select_params.h"
#include "../common/tile_copy.h"

namespace hierkernels::cuda {

constexpr int kSelectThreads = 4 * kWarp;
constexpr int kTileBlocks = 32;  // blocks that are ranked at a time: one for each lane

struct SelectArgs {
  Rows q, k;
  const float* lse;  // (B, choosers pack, Nq); null: scores are the logits of the products
  int* indices;      // (B, choosers, Nq, selected)
  Staircase visible, candidates;
  int batch, choosers, pack, group, n_queries, n_windows;  // group: query heads of a key head
  int blocks, per_block, per_window, first_chunk, block_size, query_offset;  // chunks of a block, of a window
  int selected, listed, initial, local;  // listed: as many of the selected as there are blocks
  bool exclude_own;
  float scale;

  // The plan.
  int width, rows, windows;         // channels of a tile (64, 128, 256), its rows, its windows
  int heads, parts, queries, tiles;  // tiles: of queries
};

// Offsets of a block's shared memory, in bytes.
struct SelectMemory {
  int row_bytes, score_stride;  // of a tile of q and k; floats of a row of probabilities
  int q, k, lists, probabilities, sums, scores, levels, seen, softmax, bytes;
};

template <class T>
HIERKERNELS_ANYWHERE inline SelectMemory select_memory(const SelectArgs& p) {
  SelectMemory m;
  m.row_bytes = p.width * static_cast<int>(sizeof(T)) + 16;
  m.score_stride = p.windows + 8;  // neighbouring rows are in other banks
  m.q = 0;
  m.k = m.q + p.rows * m.row_bytes;
  m.lists = m.k + 2 * p.windows * m.row_bytes;
  m.probabilities = m.lists + p.queries * p.listed * 8;
  m.sums = m.probabilities + p.rows * m.score_stride * 4;
  m.scores = m.sums + (p.heads > 1 ? p.queries * m.score_stride * 4 : 0);
  m.levels = m.scores + p.queries * kTileBlocks * 4;
  m.seen = m.levels + p.rows * 4;
  m.softmax = m.seen + p.rows * 4;
  m.bytes = m.softmax + p.queries * 8;
  return m;
}

}  // namespace hierkernels::cuda
