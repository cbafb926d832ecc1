// The CPU kernels of selected attention: the entry points of each instruction set.
#pragma once
#include "../../common/selected_params.h"

namespace hierkernels {

namespace generic {
void selected_forward(const SelectedParams& p);
void selected_backward(const SelectedParams& p);
}  // namespace generic
namespace avx2 {
void selected_forward(const SelectedParams& p);
void selected_backward(const SelectedParams& p);
}  // namespace avx2
namespace avx512 {
void selected_forward(const SelectedParams& p);
void selected_backward(const SelectedParams& p);
}  // namespace avx512
namespace avx512bf16 {  // of bfloat16
void selected_forward(const SelectedParams& p);
void selected_backward(const SelectedParams& p);
}  // namespace avx512bf16

// Chooses the kernel for the instruction set in use (isa.h) and runs it.
void selected_forward(const SelectedParams& p);
void selected_backward(const SelectedParams& p);

}  // namespace hierkernels
