// delta = rowsum(out * dout) - dlse, one warp for each row.
#include "../common/launch.h"
#include "../common/ptx.h"
#include "kernels.h"
#include "shapes.h"

namespace hierkernels::cuda {
namespace {

constexpr int kRowsPerBlock = kDeltaThreads / kWarp;

struct DeltaParams {
  const void *out, *dout;
  const float* dlse;  // may be null
  float* delta;
  int64_t out_stride[3], dout_stride[3];  // batch, head, token
  int64_t heads, tokens, rows;
  int channels;
  DType dtype;
};

template <class T>
__device__ __forceinline__ float lane_sum(const DeltaParams& p, int64_t b, int64_t h, int64_t i) {
  const T* out = static_cast<const T*>(p.out) + b * p.out_stride[0] + h * p.out_stride[1] + i * p.out_stride[2];
  const T* dout = static_cast<const T*>(p.dout) + b * p.dout_stride[0] + h * p.dout_stride[1] + i * p.dout_stride[2];
  float sum = 0.f;
  for (int d = threadIdx.x % kWarp; d < p.channels; d += kWarp) sum += ptx::to_float(out[d]) * ptx::to_float(dout[d]);
  return sum;
}

// Bound by memory: a branch on the type costs nothing.
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const __grid_constant__ DeltaParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int64_t i = row % p.tokens, h = row / p.tokens % p.heads, b = row / p.tokens / p.heads;
  float sum = 0.f;
  if (p.dtype == DType::kBFloat16)
    sum = lane_sum<BFloat16>(p, b, h, i);
  else if (p.dtype == DType::kFloat16)
    sum = lane_sum<Float16>(p, b, h, i);
  else
    sum = lane_sum<float>(p, b, h, i);
  for (int lane = kWarp / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
  if (threadIdx.x % kWarp == 0) p.delta[row] = sum - (p.dlse ? p.dlse[row] : 0.f);
}

}  // namespace

void run_attention_delta(const Tensor& out, const Tensor& dout, const Tensor& dlse, const Tensor& delta, void* stream) {
  DeltaParams p{out.data, dout.data, dlse.as<float>(), delta.as<float>(), {}, {}, out.size[1], out.size[2],
                out.size[0] * out.size[1] * out.size[2], static_cast<int>(out.size[3]), out.dtype};
  for (int d = 0; d < 3; ++d) {
    p.out_stride[d] = out.stride[d];
    p.dout_stride[d] = dout.stride[d];
  }
  if (p.rows == 0) return;
  const int64_t blocks = (p.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  launch("attention_delta", attention_delta_kernel, blocks, kDeltaThreads, 0, stream, p);
}

}  // namespace hierkernels::cuda
