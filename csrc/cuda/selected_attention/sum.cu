// Selected attention backward: the parts of dK and dV of blocks that many queries visit, added in their order.
#include "../common/launch.h"
#include "kernels.h"

namespace hierkernels::cuda {
namespace {

struct SumArgs {
  SelectedArgs p;
  DType dtype;
};

__device__ __forceinline__ void store(const SumArgs& a, const Rows& to, int b, int h, int key, int channel, float x) {
  switch (a.dtype) {
    case DType::kBFloat16:
      to.at<BFloat16>(b, h, key)[channel] = ptx::from_float<BFloat16>(x);
      return;
    case DType::kFloat16:
      to.at<Float16>(b, h, key)[channel] = ptx::from_float<Float16>(x);
      return;
    default:
      to.at<float>(b, h, key)[channel] = x;
  }
}

__global__ void __launch_bounds__(kSumThreads) selected_sum_kernel(const __grid_constant__ SumArgs a) {
  const SelectedArgs& p = a.p;
  const int at = static_cast<int>(blockIdx.x), visitors = p.starts[at + 1] - p.starts[at];
  if (visitors <= p.chunk) return;
  const int pair = at / p.merged_blocks, b = pair / p.kv_heads, h = pair % p.kv_heads;
  const int size = p.merge * p.block_size, key0 = at % p.merged_blocks * size, parts = (visitors + p.chunk - 1) / p.chunk;
  const int keys = p.n_keys - key0 < size ? p.n_keys - key0 : size, channels = p.dk.channels + p.dv.channels;
  const float* const first = p.parts + static_cast<int64_t>(p.first_part[at]) * size * channels;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(keys) * channels; i += kSumThreads) {
    float sum = 0.f;
    for (int part = 0; part < parts; ++part) sum += first[static_cast<int64_t>(part) * size * channels + i];
    const int key = key0 + static_cast<int>(i / channels), channel = static_cast<int>(i % channels);
    if (channel < p.dk.channels)
      store(a, p.dk, b, h, key, channel, sum);
    else
      store(a, p.dv, b, h, key, channel - p.dk.channels, sum);
  }
}

}  // namespace

void run_selected_sum(const SelectedArgs& p, DType dtype, void* stream) {
  launch("selected_sum", selected_sum_kernel, static_cast<int64_t>(p.batch) * p.kv_heads * p.merged_blocks, kSumThreads, 0,
         stream, {p, dtype});
}

}  // namespace hierkernels::cuda
