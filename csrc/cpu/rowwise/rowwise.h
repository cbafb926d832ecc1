// The CPU kernels of operations on rows of channels: the entry points of each instruction set.
#pragma once
#include "../../common/rowwise_params.h"

namespace hierkernels {

namespace generic {
void norm_forward(const NormParams& p);
void norm_backward(const NormParams& p);
void gelu_forward(const GeluParams& p);
void gelu_backward(const GeluParams& p);
void rotary(const RotaryParams& p);
}  // namespace generic
namespace avx2 {
void norm_forward(const NormParams& p);
void norm_backward(const NormParams& p);
void gelu_forward(const GeluParams& p);
void gelu_backward(const GeluParams& p);
void rotary(const RotaryParams& p);
}  // namespace avx2
namespace avx512 {
void norm_forward(const NormParams& p);
void norm_backward(const NormParams& p);
void gelu_forward(const GeluParams& p);
void gelu_backward(const GeluParams& p);
void rotary(const RotaryParams& p);
}  // namespace avx512

// Choose the kernel for the instruction set in use (isa.h) and run it.
void norm_forward(const NormParams& p);
void norm_backward(const NormParams& p);
void gelu_forward(const GeluParams& p);
void gelu_backward(const GeluParams& p);
void rotary(const RotaryParams& p);

}  // namespace hierkernels
