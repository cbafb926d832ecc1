// One attention call, as the kernels of every device take it.
#pragma once
#include <cstdint>

#include "key_range.h"
#include "tensor.h"

namespace hierkernels {

struct AttentionParams {
  Tensor q, k, v;   // (B, H, N, D), last stride 1; query head h uses key head h / group
  Tensor out;       // (B, Hq, Nq, Dv), last stride 1
  Tensor lse;       // (B, Hq, Nq), float32 (float64 if q is), contiguous
  Tensor bias;      // optional, any float type, broadcast strides over (B, Hq, Nq, Nk)
  Tensor mask;      // optional, bool, broadcast strides over (B, Hq, Nq, Nk); true: may attend
  // With a width, the bias is (1, Hq, width, slots): see bias_slots.h.
  int64_t bias_width = 0, bias_before = 0;
  Tensor padding;   // optional, bool (B, Nk); true: a real token
  KeyRange range;   // canonical
  double scale = 1;
  double softcap = 0;    // 0: none
  double dropout_p = 0;  // 0: none
  const int64_t* seed_at = nullptr;  // in the memory of the device; given iff dropout_p > 0
  uint64_t seed = 0;                 // its value, on the CPU

  // Backward only.
  Tensor dout;              // as out, any strides with the last one 1
  Tensor dlse;              // optional, as lse
  Tensor dq, dk, dv;        // as q, k, v
  // Optional, contiguous, the shape of bias: float32 (float64 if q is), or of 2 bytes if bias_of_pairs().
  Tensor dbias;

  int64_t batch() const { return q.size[0]; }
  int64_t heads() const { return q.size[1]; }
  int64_t kv_heads() const { return k.size[1]; }
  int64_t group() const { return q.size[1] / k.size[1]; }
  int64_t n_queries() const { return q.size[2]; }
  int64_t n_keys() const { return k.size[2]; }
  int64_t dim() const { return q.size[3]; }
  int64_t dim_v() const { return v.size[3]; }
  // Whether each element of dbias belongs to one (query, key) pair: then it is stored, and nothing is summed.
  bool bias_of_pairs() const { return (dbias.stride[0] != 0 || batch() == 1) && bias_of_batch_pairs(); }
  // The same within a batch entry: then the first one may be stored.
  bool bias_of_batch_pairs() const {
    return bias_width == 0 && (dbias.stride[1] != 0 || heads() == 1) && (dbias.stride[2] != 0 || n_queries() == 1) &&
           (dbias.stride[3] != 0 || n_keys() == 1);
  }
};

}  // namespace hierkernels
