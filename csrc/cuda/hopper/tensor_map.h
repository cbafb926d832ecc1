// Tensor maps: what a tensor copy knows of its tensor.
#pragma once
#include "../common/ptx_hopper.h"

namespace hierkernels::cuda {

// A map of a tensor of 16-bit numbers with `rank` (2 to 4) dimensions, the contiguous one first, of which copies take
// boxes of 64 numbers by box[1] by ...: rows of 128 bytes, swizzled, zero where the tensor ends. Strides are those
// of dimensions 1 and up, in elements. False if tensor copies cannot take it: an address or a stride that is no
// multiple of 16 bytes, a stride of 0 or of 2^40 bytes, a driver that refuses it.
bool make_tensor_map(TensorMap& map, const void* data, bool is_float16, int rank, const int64_t (&size)[4],
                     const int64_t (&stride)[4], const int (&box)[4]);

// Whether the current device runs sm_90a's kernels, and how many of its multiprocessors there are.
bool is_hopper();
int multiprocessors();

}  // namespace hierkernels::cuda
