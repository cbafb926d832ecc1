// What the CPU attention kernels take, and the entry points of each instruction set.
#pragma once
#include "../../common/attention_params.h"

namespace hierkernels {

// The instruction sets, each a superset of the one before.
enum class Isa : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

namespace generic {
void attention_forward(const AttentionParams& p);
void attention_backward(const AttentionParams& p);
}  // namespace generic
namespace avx2 {
void attention_forward(const AttentionParams& p);
void attention_backward(const AttentionParams& p);
}  // namespace avx2
namespace avx512 {
void attention_forward(const AttentionParams& p);
void attention_backward(const AttentionParams& p);
}  // namespace avx512
namespace avx512bf16 {  // bfloat16 only, as amx
void attention_forward(const AttentionParams& p);
void attention_backward(const AttentionParams& p);
}  // namespace avx512bf16
namespace amx {
void attention_forward(const AttentionParams& p);
void attention_backward(const AttentionParams& p);
}  // namespace amx

// Zeros, by all threads, in a gradient that kernels add to.
void clear_sums(const Tensor& t);

// Chooses the kernel for the instruction set in use (isa.h) and runs it.
void attention_forward(const AttentionParams& p);
void attention_backward(const AttentionParams& p);

}  // namespace hierkernels
