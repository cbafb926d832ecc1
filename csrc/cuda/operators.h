// The CUDA core as the rest of the library sees it: no CUDA header needed.
#pragma once
#include "../common/tensor.h"

namespace hierkernels::cuda {

// delta[b, h, i] = sum over channels of out * dout, minus dlse where given: what the attention backward starts
// from. out and dout: (B, H, N, D) of float32, bfloat16 or float16, last stride 1; delta, dlse: (B, H, N) float32,
// contiguous. Runs on `stream` (a cudaStream_t). Throws std::runtime_error if the launch fails.
void attention_delta(const Tensor& out, const Tensor& dout, const Tensor& dlse, const Tensor& delta, void* stream);


int runtime_version();  // as CUDART_VERSION: 13000 is 13.0; 0 in the emulation

}  // namespace hierkernels::cuda
