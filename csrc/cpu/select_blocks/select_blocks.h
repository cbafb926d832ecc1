// The CPU kernels that choose key blocks: the entry points of each instruction set.
#pragma once
#include "../../common/select_params.h"

namespace hierkernels {

namespace generic {
void select_blocks(const SelectParams& p);
}
namespace avx2 {
void select_blocks(const SelectParams& p);
}
namespace avx512 {
void select_blocks(const SelectParams& p);
}
namespace avx512bf16 {
void select_blocks(const SelectParams& p);  // of bfloat16, with lse
}

// Chooses the kernel for the instruction set in use (isa.h) and runs it.
void select_blocks(const SelectParams& p);

}  // namespace hierkernels
