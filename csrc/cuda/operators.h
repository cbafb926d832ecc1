// The CUDA core as the rest of the library sees it: no CUDA header needed.
//
// All run on `stream` (a cudaStream_t) and throw std::runtime_error if a launch fails. No tensor is empty.
#pragma once
#include <string>
#include <vector>

#include "../common/attention_params.h"
#include "../common/sgu_params.h"

namespace hierkernels::cuda {

// q, k, v, out of float32, bfloat16 or float16, up to 256 channels, last stride 1; lse, dlse and delta float32,
// contiguous. p.seed_at is on the device.
void attention_forward(const AttentionParams& p, void* stream);

// delta (B, Hq, Nq) is written: rowsum(out * dout) - dlse. p.dbias, if there, is (slices, elements of the bias) of
// float32: the gradient in as many parts as attention_bias_slices says, to be added.
void attention_backward(const AttentionParams& p, const Tensor& delta, void* stream);
int attention_bias_slices(const AttentionParams& p);

// Activations of float32, bfloat16 or float16.
void sgu_forward(const SguParams& p, void* stream);

// p.dgate_residual, contiguous as all results, is written in any case. p.dweight is (splits, heads, rows, columns),
// float32, or of the weight's type if sgu_weight_splits(p) is 1: parts of the gradient, to be added. sums (B, N, H),
// float32, optional, is dgate_residual summed over each head's channels; p.dbias is not read.
void sgu_backward(const SguParams& p, const Tensor& sums, void* stream);
int sgu_weight_splits(const SguParams& p);

// What a block of a kernel takes.
struct KernelInfo {
  std::string name;  // as in the kernel's C++ name: attention_forward_kernel<float, 64>
  int threads, shared_bytes;
};
std::vector<KernelInfo> attention_kernels();
std::vector<KernelInfo> sgu_kernels();

int runtime_version();  // as CUDART_VERSION: 13000 is 13.0; 0 in the emulation

}  // namespace hierkernels::cuda
