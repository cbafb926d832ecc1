// The attention kernels of sm_90a, and what their launches share.
#pragma once
#include <string>
#include <vector>

#include "../../common/attention_params.h"
#include "../operators.h"
#include "attention_args.h"

namespace hierkernels::cuda {

// Computes the call if these kernels serve it: on a device of capability 9.0, bfloat16 or float16, 64 or 128 channels
// of q, k and v alike, no score modifier, sequences that fill tiles, tensors that tensor copies can take. Else returns
// false, and nothing is done.
bool run_hopper_attention_forward(const AttentionParams& p, void* stream);
// dQ, and dK with dV; delta (B, Hq, Nq) as for the kernels of sm_80.
bool run_hopper_query_gradient(const AttentionParams& p, const Tensor& delta, void* stream);
bool run_hopper_key_gradient(const AttentionParams& p, const Tensor& delta, void* stream);
std::vector<KernelInfo> hopper_attention_kernels();

// The arguments of a call, false if these kernels do not serve it. Copies take `row_box` rows and `key_box` keys.
bool make_hopper_args(HopperArgs& to, const AttentionParams& p, int row_box, int key_box);
// Sets the order of the tiles of `size` out of each item's `length` rows or keys; returns how many there are. An item's
// tiles read `bytes`, which sections of items share in the cache.
int plan_tiles(HopperArgs& p, int length, int size, int64_t bytes);
inline int64_t key_bytes(const HopperArgs& p) { return int64_t{4} * p.n_keys * p.out.channels; }
inline int64_t row_bytes(const HopperArgs& p) { return int64_t{4} * p.rows * p.packs * p.out.channels; }

// What the report lists of a kernel with these shapes of 64 and 128 channels. (Types: a template of an unnamed namespace
// as an argument would make one function of those of all files.)
template <class Small, class Large>
KernelInfo hopper_info(const char* kernel, int dim) {
  return {std::string("hopper_attention_") + kernel + "_kernel<" + std::to_string(dim) + ">",
          dim == 64 ? Small::kThreads : Large::kThreads, dim == 64 ? Small::kShared : Large::kShared};
}
KernelInfo hopper_forward_info(int dim);
KernelInfo hopper_query_gradient_info(int dim);
KernelInfo hopper_key_gradient_info(int dim);

// run<kDim>(...) for a call's channels; false for all others, and for float32.
#define HIERKERNELS_HOPPER_DISPATCH(run, p, ...)                   \
  [&] {                                                            \
    if ((p).q.element_bytes() != 2) return false;                  \
    if ((p).dim() == 64) return run<64>(p, __VA_ARGS__);           \
    return (p).dim() == 128 ? run<128>(p, __VA_ARGS__) : false;    \
  }()

}  // namespace hierkernels::cuda
