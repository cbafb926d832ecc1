// The CPU kernels of the causal spatial gating unit: the entry points of each instruction set.
#pragma once
#include "../../common/sgu_params.h"

namespace hierkernels {

namespace generic {
void sgu_forward(const SguParams& p);
void sgu_backward(const SguParams& p);
}  // namespace generic
namespace avx2 {
void sgu_forward(const SguParams& p);
void sgu_backward(const SguParams& p);
}  // namespace avx2
namespace avx512 {
void sgu_forward(const SguParams& p);
void sgu_backward(const SguParams& p);
}  // namespace avx512
namespace avx512bf16 {  // bfloat16 activations only, as amx
void sgu_forward(const SguParams& p);
void sgu_backward(const SguParams& p);
}  // namespace avx512bf16
namespace amx {
void sgu_forward(const SguParams& p);
void sgu_backward(const SguParams& p);
}  // namespace amx

// Chooses the kernel for the instruction set in use (isa.h) and runs it.
void sgu_forward(const SguParams& p);
void sgu_backward(const SguParams& p);

}  // namespace hierkernels
