// Adds up what the blocks of attention's forward leave that share the keys of a tile: decoding.
//
// A record belongs to a row, (batch * heads + head) * queries + query, and a part of its keys: row * parts + part. It is
// the sum of p v over the keys, p relative to the largest score; memory holds the sums of all records (n_records,
// channels), then their largest scores, then their sums of p. The order of additions is fixed.
#include "../common/launch.h"
#include "../common/ptx.h"
#include "kernels.h"
#include "scores.h"
#include "shapes.h"

namespace hierkernels::cuda {
namespace {

constexpr int kWarps = kCombineThreads / kWarp, kMostPerLane = kCombineChannels / kWarp;

template <class T>
__device__ __forceinline__ void store(const AttentionArgs& p, int64_t row, int channel, float value) {
  const int64_t pair = row / p.n_queries;
  T* const out = p.out.at<T>(static_cast<int>(pair / p.heads), static_cast<int>(pair % p.heads), row % p.n_queries);
  out[channel] = from_float<T>(value, p.out.dtype);
}

// A block for each row; its warps take the parts in turns.
__global__ void __launch_bounds__(kCombineThreads) attention_combine_kernel(const __grid_constant__ AttentionArgs p) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, channels = p.out.channels;
  const int64_t row = blockIdx.x, first = row * p.parts;
  const float* const tops = p.records + p.n_records * channels + first;
  const float* const totals = tops + p.n_records;
  float top = kHiddenBelow;
  for (int part = lane; part < p.parts; part += kWarp) top = fmaxf(top, tops[part]);
  for (int step = kWarp / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
  float total = 0.f;
  for (int part = lane; part < p.parts; part += kWarp) total += totals[part] * natural_exp(tops[part] - top);
  for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);

  float sums[kMostPerLane] = {};
#pragma unroll 4
  for (int part = warp; part < p.parts; part += kWarps) {
    const float weight = natural_exp(tops[part] - top);
    const float* const record = p.records + (first + part) * channels;
#pragma unroll
    for (int n = 0; n < kMostPerLane; ++n)
      if (n * kWarp + lane < channels) sums[n] += weight * record[n * kWarp + lane];
  }
  float* const of_warps = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int n = 0; n < kMostPerLane; ++n) of_warps[warp * kCombineChannels + n * kWarp + lane] = sums[n];
  __syncthreads();
  const float factor = total == 0.f ? 0.f : p.dropout_scale / total;
  for (int channel = threadIdx.x; channel < channels; channel += kCombineThreads) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w * kCombineChannels + channel];
    if (p.out.dtype == DType::kFloat32)
      store<float>(p, row, channel, sum * factor);
    else
      store<Number16>(p, row, channel, sum * factor);
  }
  if (threadIdx.x == 0) p.lse[row] = total == 0.f ? -infinity() : top + logf(total);
}

}  // namespace

void run_attention_combine(const AttentionArgs& p, void* stream) {
  launch("attention_combine", attention_combine_kernel, p.n_records / p.parts, kCombineThreads, kCombineShared, stream, p);
}

}  // namespace hierkernels::cuda
