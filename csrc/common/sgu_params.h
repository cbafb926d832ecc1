// What the kernels of the causal spatial gating unit take.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace hierkernels {

enum class Activation : int { kNone, kRelu, kGelu, kSilu, kTanh, kSigmoid };

struct SguParams {
  Tensor residual, gate;  // (B, N, C), last stride 1; N, B >= 1
  Tensor weight;          // (H, S, S), or (H, w, 2 w) with a window, last stride 1; the gate's type or float32
  Tensor bias;            // (H, S), or (H, w)
  Tensor gate_residual;   // optional, as gate
  int64_t window = 0;     // 0: none
  Activation activation = Activation::kNone;

  Tensor out, z;  // as gate; z, the pre-activation, is optional in the forward and read in the backward

  // Backward only; every result is optional.
  Tensor dout, dresidual, dgate, dgate_residual;  // as gate
  Tensor dweight, dbias;                          // as weight and bias, contiguous
};

// The sizes of a call. Tokens lie in buckets of w; without a window (or with but one bucket) there is one of N.
struct SguShape {
  int64_t B, N, C, H;
  int64_t dim;        // channels of a head
  int64_t w, buckets; // tokens of a bucket
  int64_t own;        // the weight's column of the first token of the own bucket
  bool look_back;     // the weight's columns 0 .. w - 1 are those of the bucket before
  int64_t columns;    // of a head's matrices: B dim, batch by batch

  explicit SguShape(const SguParams& p)
      : B(p.gate.size[0]), N(p.gate.size[1]), C(p.gate.size[2]), H(p.weight.size[0]), dim(C / H) {
    look_back = p.window > 0 && p.window < N;
    w = look_back ? p.window : N;
    buckets = (N + w - 1) / w;
    own = p.window;
    columns = B * dim;
  }
  int64_t tokens(int64_t bucket) const { return N - bucket * w < w ? N - bucket * w : w; }
};

}  // namespace hierkernels
