// The CUDA core as the rest of the library sees it: no CUDA header needed.
//
// All run on `stream` (a cudaStream_t) and throw std::runtime_error if a launch fails. No tensor is empty.
#pragma once
#include <string>
#include <vector>

#include "../common/attention_params.h"
#include "../common/select_params.h"
#include "../common/selected_params.h"
#include "../common/sgu_params.h"

namespace hierkernels::cuda {

// q, k, v, out of float32, bfloat16 or float16, up to 256 channels, last stride 1; lse, dlse and delta float32,
// contiguous. p.seed_at is on the device. records, optional, is memory (parts, rows * (Dv + 2)) of float32: so many blocks
// share the keys of each tile of rows.
void attention_forward(const AttentionParams& p, const Tensor& records, void* stream);

// delta (B, Hq, Nq) is written: rowsum(out * dout) - dlse. p.dbias, if there, is (slices, elements of the bias) of
// float32: the gradient in as many parts as attention_bias_slices says, to be added.
void attention_backward(const AttentionParams& p, const Tensor& delta, void* stream);
int attention_bias_slices(const AttentionParams& p);

// Activations of float32, bfloat16 or float16.
void sgu_forward(const SguParams& p, void* stream);

// p.dgate_residual, contiguous as all results, is written in any case. p.dweight is (splits, heads, rows, columns),
// float32, or of the weight's type if sgu_weight_splits(p) is 1: parts of the gradient, to be added. sums (B, N, H),
// float32, optional, is dgate_residual summed over each head's channels; p.dbias is not read.
void sgu_backward(const SguParams& p, const Tensor& sums, void* stream);
int sgu_weight_splits(const SguParams& p);

// Selected attention: types and widths as attention's; block_size, indices and weights as in SelectedParams. Memory for
// integers comes as tensors of as many words of 32 bits.
struct SelectedPlan {
  int64_t set_words;    // of the lists of blocks that forward and dQ visit
  int64_t visit_words;  // of those that the backward inverts
  int64_t pairs, blocks, visits, keys;  // batch x key/value heads; blocks of `keys` keys in dK; visits of a pair, at most
  int64_t segments;     // parts of a pair's queries that are sorted
};
SelectedPlan selected_plan(const SelectedParams& p);
void selected_forward(const SelectedParams& p, const Tensor& lists, void* stream);

// The backward, in steps. dQ, delta (B, Hq, Nq), and p.dweights (selected_weight_parts(p), the shape of indices), zeros at
// first: parts of the gradient, to be added.
void selected_backward_queries(const SelectedParams& p, const Tensor& lists, const Tensor& delta, void* stream);
int selected_weight_parts(const SelectedParams& p);
// Counts the visits of each block by each segment of queries, (pairs, blocks, segments); then places them by the sums of
// these numbers, as (row, word) in the order of blocks.
void selected_count_visits(const SelectedParams& p, const Tensor& visits, const Tensor& counts, void* stream);
void selected_place_visits(const SelectedParams& p, const Tensor& visits, const Tensor& offsets, const Tensor& visitors,
                           void* stream);
// Items of work: see hierkernels/ops/selected_attention/work_items.py.
struct SelectedInverse {
  Tensor visitors, starts, item_block, first_item, first_part, parts;
  int64_t chunk;
};
void selected_backward_keys(const SelectedParams& p, const SelectedInverse& inverse, const Tensor& delta, void* stream);

// q and k of float32, bfloat16 or float16, up to 256 channels; without lse float32 and p.merged 1. indices, contiguous, is
// (B, heads, Nq, num_selected) of 32-bit integers.
void select_blocks(const SelectParams& p, const Tensor& indices, void* stream);

// What a block of a kernel takes.
struct KernelInfo {
  std::string name;  // as in the kernel's C++ name: attention_forward_kernel<float, 64>
  int threads, shared_bytes;
};
std::vector<KernelInfo> attention_kernels();
std::vector<KernelInfo> sgu_kernels();
std::vector<KernelInfo> selected_kernels();
std::vector<KernelInfo> select_kernels();

int runtime_version();  // as CUDART_VERSION: 13000 is 13.0; 0 in the emulation

}  // namespace hierkernels::cuda
