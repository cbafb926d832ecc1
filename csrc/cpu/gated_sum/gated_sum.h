// What the kernels that add up gated branches take, and the entry points of each instruction set.
#pragma once
#include "../../common/tensor.h"

namespace hierkernels {

constexpr int kBranches = 3;

// Tensors (B, H, N, C) of one dtype, their last stride 1 but for the gates'.
struct GatedSumParams {
  Tensor gates;  // (B, H, N, kBranches), any strides
  Tensor parts[kBranches];
  Tensor out;  // forward: sum over s of gates[..., s] parts[s]

  // Backward only.
  Tensor dout;
  Tensor dgates;  // as gates
  Tensor dparts[kBranches];
};

namespace generic {
void gated_sum_forward(const GatedSumParams& p);
void gated_sum_backward(const GatedSumParams& p);
}  // namespace generic
namespace avx2 {
void gated_sum_forward(const GatedSumParams& p);
void gated_sum_backward(const GatedSumParams& p);
}  // namespace avx2
namespace avx512 {
void gated_sum_forward(const GatedSumParams& p);
void gated_sum_backward(const GatedSumParams& p);
}  // namespace avx512

// Choose the kernel for the instruction set in use (isa.h) and run it.
void gated_sum_forward(const GatedSumParams& p);
void gated_sum_backward(const GatedSumParams& p);

}  // namespace hierkernels
