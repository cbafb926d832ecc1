// What the kernels of operations on rows of channels take.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace hierkernels {

// s = x, with the channels from `kept` on delayed by `shift` tokens, less its mean if there is a bias;
// out = s scale / max(sqrt(|s|^2 + addend), floor) weight + bias, where addend or floor is 0.
struct NormParams {
  Tensor x;       // (B, N, C), contiguous
  Tensor weight;  // (C), contiguous, float32, or float64 for float64
  Tensor bias;    // as weight, optional: a layer norm
  double floor = 0, addend = 0, scale = 1;
  int64_t shift = 0, kept = 0;

  Tensor out;      // as x, of its own type
  Tensor inverse;  // (B, N), what s was divided by, inverted; of the type of weight
  Tensor mean;     // as inverse, with bias only

  // Backward only.
  Tensor dout;     // as out
  Tensor dx;       // as x, optional
  Tensor dweight;  // (C), of the type of weight, optional
  Tensor dbias;    // as dweight
};

// How GELU of channels is given back.
enum class GeluForm {
  kPlain,   // (R, C)
  kHalves,  // the halves of the channels apart, (R, C / 2) each
  kGated,   // GELU of the second half times the first, (R, C / 2)
};

// All contiguous, of one type.
struct GeluParams {
  Tensor x;              // (..., C), contiguous
  Tensor first, second;  // the result, or its gradient; second with kHalves only
  Tensor dx;             // as x; backward only
  GeluForm form = GeluForm::kPlain;
};

// Channels c and c + D / 2 turned: (a, b) -> (a cos - b sin, b cos + a sin).
struct RotaryParams {
  Tensor x, out;    // (B, H, N, D), last stride 1
  Tensor cos, sin;  // (N, D / 2), contiguous, float32, or float64 for float64
  bool transposed = false;  // sin with the other sign
};

}  // namespace hierkernels
