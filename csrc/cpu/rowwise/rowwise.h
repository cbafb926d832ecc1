// The CPU kernels of operations on rows of channels: the entry points of each instruction set.
#pragma once
#include "../../common/rowwise_params.h"

namespace hierkernels {

namespace generic {
void rms_norm_forward(const RmsNormParams& p);
void rms_norm_backward(const RmsNormParams& p);
void rotary(const RotaryParams& p);
}  // namespace generic
namespace avx2 {
void rms_norm_forward(const RmsNormParams& p);
void rms_norm_backward(const RmsNormParams& p);
void rotary(const RotaryParams& p);
}  // namespace avx2
namespace avx512 {
void rms_norm_forward(const RmsNormParams& p);
void rms_norm_backward(const RmsNormParams& p);
void rotary(const RotaryParams& p);
}  // namespace avx512

// Choose the kernel for the instruction set in use (isa.h) and run it.
void rms_norm_forward(const RmsNormParams& p);
void rms_norm_backward(const RmsNormParams& p);
void rotary(const RotaryParams& p);

}  // namespace hierkernels
