// One call of block selection, as the kernels of every device take it.
#pragma once
#include <cstdint>

#include "key_range.h"
#include "tensor.h"

namespace hierkernels {

// `merged` query heads choose together. With lse, a window's score is the sum of their probabilities, and a block's the
// sum of its windows', once for each chunk of tokens in common. Without, a window is a block and its score the logit of
// the queries' mean.
struct SelectParams {
  Tensor q;    // (B, heads * merged, Nq, D), last stride 1
  Tensor k;    // (B, Hk, W, D), last stride 1; without lse float32 (float64 if q is)
  Tensor lse;  // optional (B, heads * merged, Nq), float32 (float64 if q is), contiguous
  int32_t* indices = nullptr;  // (B, heads, Nq, num_selected): ascending, then -1
  int64_t heads = 1, merged = 1;

  Staircase visible;     // query i sees the windows below, canonical
  Staircase candidates;  // and chooses among the blocks below
  int64_t num_blocks = 0;
  // Chunks of tokens: window w covers first_chunk + w and the next ones, block j is made of windows_per_block of them.
  int64_t windows_per_block = 1, chunks_per_window = 1, first_chunk = 0;
  int64_t block_size = 1, query_offset = 0;
  int64_t num_selected = 0, num_initial = 0, num_local = 0;
  bool exclude_own_block = false;
  double scale = 1;

  int64_t n_queries() const { return q.size[2]; }
  int64_t n_windows() const { return k.size[2]; }
  int64_t dim() const { return q.size[3]; }
};

}  // namespace hierkernels
