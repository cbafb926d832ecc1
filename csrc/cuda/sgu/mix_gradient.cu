// dresidual = dout act(z), dmix = dout residual act'(z), and the sums of dmix over a head's channels: a warp for each
// token of a head.
#include "activation.h"
#include "args.h"

namespace hierkernels::cuda {
namespace {

constexpr int kWarps = kMixGradientThreads / kWarp;

template <class T>
__device__ __forceinline__ void compute(const SguArgs& p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // batch, token, head
  const int head = static_cast<int>(index % p.heads), b = static_cast<int>(index / p.heads / p.tokens);
  const int64_t token = index / p.heads % p.tokens;
  if (b >= p.batch) return;
  float total = 0.f;
  for (int c = static_cast<int>(threadIdx.x % kWarp) * kChunk<T>; c < p.dim; c += kWarp * kChunk<T>) {
    const Place place{b, c, p.dim - c < kChunk<T> ? p.dim - c : kChunk<T>};
    float z[kChunk<T>], dout[kChunk<T>], residual[kChunk<T>];
    load<T>(p, p.z, head, token, place, z);
    load<T>(p, p.dout, head, token, place, dout);
    load<T>(p, p.residual, head, token, place, residual);
    float value[kChunk<T>];
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) value[e] = z[e];
    activate(p.activation, value);
    slope(p.activation, z);
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      value[e] *= dout[e];
      residual[e] *= dout[e] * z[e];
      if (e < place.count) total += residual[e];
    }
    store<T>(p, p.dmix, head, token, place, residual);
    if (p.dresidual.data) store<T>(p, p.dresidual, head, token, place, value);
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kAllLanes, total, lanes);
  if (p.sums && threadIdx.x % kWarp == 0) p.sums[index] = total;
}

// Bound by memory: a branch on the type costs nothing.
__global__ void __launch_bounds__(kMixGradientThreads) sgu_mix_gradient_kernel(const __grid_constant__ SguArgs p) {
  with_width(p.dtype, [&](auto type) { compute<decltype(type)>(p); });
}

}  // namespace

void run_sgu_mix_gradient(const SguArgs& p, void* stream) {
  const int64_t rows = p.tokens * p.batch * p.heads;
  launch("sgu_mix_gradient", sgu_mix_gradient_kernel, (rows + kWarps - 1) / kWarps, kMixGradientThreads, 0, stream, p);
}

}  // namespace hierkernels::cuda
