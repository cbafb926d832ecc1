// The CUDA core as the rest of the library sees it: no CUDA header needed.
#pragma once
#include "../common/sgu_params.h"
#include "../common/tensor.h"

namespace hierkernels::cuda {

// delta[b, h, i] = sum over channels of out * dout, minus dlse where given: what the attention backward starts
// from. out and dout: (B, H, N, D) of float32, bfloat16 or float16, last stride 1; delta, dlse: (B, H, N) float32,
// contiguous. Runs on `stream` (a cudaStream_t). Throws std::runtime_error if the launch fails.
void attention_delta(const Tensor& out, const Tensor& dout, const Tensor& dlse, const Tensor& delta, void* stream);

// The causal spatial gating unit: float32, bfloat16 or float16 activations, none of them empty.
void sgu_forward(const SguParams& p, void* stream);

// p.dgate_residual, contiguous as all results, is written in any case. p.dweight is (splits, heads, rows, columns),
// float32, or of the weight's type if sgu_weight_splits(p) is 1: parts of the gradient, to be added. sums (B, N, H),
// float32, optional, is dgate_residual summed over each head's channels; p.dbias is not read.
void sgu_backward(const SguParams& p, const Tensor& sums, void* stream);
int sgu_weight_splits(const SguParams& p);

int runtime_version();  // as CUDART_VERSION: 13000 is 13.0; 0 in the emulation

}  // namespace hierkernels::cuda
