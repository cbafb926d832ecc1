// One call of selected attention, as the kernels of every device take it.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace hierkernels {

struct SelectedParams {
  Tensor q, k, v;     // (B, H, N, D), last stride 1; query head h uses key head h / group
  // (B, Hkv or Hq, Nq, n), any strides; outside [0, blocks): none. int64; on GPUs also int32, which comes as float32's
  // words.
  Tensor indices;
  Tensor weights;     // optional, as indices, any strides; on the CPU float32 (float64 if q is)
  int64_t block_size = 1;
  bool include_own_block = false, is_causal = true;
  double scale = 1;
  Tensor out;  // (B, Hq, Nq, Dv), last stride 1
  Tensor lse;  // (B, Hq, Nq), float32 (float64 if q is), contiguous

  // Backward only.
  Tensor dout;        // as out, any strides with the last one 1
  Tensor dlse;        // optional, as lse
  Tensor dq, dk, dv;  // as q, k, v
  Tensor dweights;    // optional, as weights, contiguous

  int64_t batch() const { return q.size[0]; }
  int64_t heads() const { return q.size[1]; }
  int64_t kv_heads() const { return k.size[1]; }
  int64_t group() const { return q.size[1] / k.size[1]; }
  int64_t n_queries() const { return q.size[2]; }
  int64_t n_keys() const { return k.size[2]; }
  int64_t dim() const { return q.size[3]; }
  int64_t dim_v() const { return v.size[3]; }
  int64_t blocks() const { return (n_keys() + block_size - 1) / block_size; }
  int64_t named() const { return indices.size[3]; }
  // Choices of blocks that a group of heads has: one, or one for each head.
  int64_t choices() const { return indices.size[1] / k.size[1]; }
  int64_t position(int64_t query) const { return query + n_keys() - n_queries(); }
};

}  // namespace hierkernels
