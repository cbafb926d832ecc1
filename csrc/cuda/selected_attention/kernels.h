// The entry points of the kernels of selected attention.
#pragma once
#include "../attention/kernels.h"
#include "args.h"
#include "shapes.h"

namespace hierkernels::cuda {

// What the lists of sets are made from.
struct ListArgs {
  Naming naming;
  int n_queries, choosers, block_size, first_position;
  bool causal;
  int set, sets, merge;
  bool first_column;  // an entry's word is the column that names it first, not a mask
  int64_t count;      // of lists
  Visit* visits;      // (B, choosers, sets, visits_stride)
  int* counts;        // (B, choosers, sets)
  int visits_stride;
};

// What a counting sort of visits takes; the queries of a pair of batch and key/value head are its rows.
struct SortArgs {
  const Visit* visits;      // (pairs, rows, visits_stride)
  const int* list_lengths;  // (pairs, rows)
  int* counts;              // (pairs, blocks, segments): of visits; or, to place them, where the first one goes
  Visit* visitors;          // all visits by block, .block is the row; null: they are counted
  int visits_stride, pairs, rows, blocks, segments;
};

void run_selected_sort(const SortArgs& p, void* stream);
void run_selected_lists(const ListArgs& p, void* stream);
void run_selected_forward(const SelectedArgs& p, DType dtype, void* stream);
void run_selected_query_gradient(const SelectedArgs& p, DType dtype, void* stream);
void run_selected_key_gradient(const SelectedArgs& p, DType dtype, void* stream);
void run_selected_sum(const SelectedArgs& p, DType dtype, void* stream);
int selected_row_blocks(const SelectedArgs& p, DType dtype);  // of a set's rows in dQ
int selected_key_tile(const SelectedArgs& p, DType dtype);  // keys

// The blocks of at most `rows` rows, and the warps that share one: a power of 2.
inline void plan_rows(SelectedArgs& p, int rows) {
  const int all = p.set * p.pack, of_block = all < rows ? all : rows;
  p.row_blocks = (all + rows - 1) / rows;
  p.row_warps = 1;
  while (16 * p.row_warps < of_block) p.row_warps *= 2;
}

inline int padded_channels(const SelectedArgs& p) {
  const int channels = p.q.channels > p.v.channels ? p.q.channels : p.v.channels;
  return channels <= 64 ? 64 : channels <= 128 ? 128 : 256;
}

}  // namespace hierkernels::cuda
