// What the kernels of operations on rows of channels take.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace hierkernels {

// s = x, with the channels from `kept` on delayed by `shift` tokens;
// out = s scale / max(sqrt(|s|^2 + addend), floor) weight, where addend or floor is 0.
struct RmsNormParams {
  Tensor x;       // (B, N, C), contiguous
  Tensor weight;  // (C), contiguous, float32, or float64 for float64
  double floor = 0, addend = 0, scale = 1;
  int64_t shift = 0, kept = 0;

  Tensor out;      // as x, of its own type
  Tensor inverse;  // (B, N), what s was divided by, inverted; of the type of weight

  // Backward only.
  Tensor dout;     // as out
  Tensor dx;       // as x, optional
  Tensor dweight;  // (parts, C), of the type of weight, optional: one sum for each of the equal parts of the rows
};

// Channels c and c + D / 2 turned: (a, b) -> (a cos - b sin, b cos + a sin).
struct RotaryParams {
  Tensor x, out;    // (B, H, N, D), last stride 1
  Tensor cos, sin;  // (N, D / 2), contiguous, float32, or float64 for float64
  bool transposed = false;  // sin with the other sign
};

}  // namespace hierkernels
