// out = act(mix(gate) + bias + gate_residual) * residual: a block computes some rows of a bucket and some columns.
#include "activation.h"
#include "mixing.h"

namespace hierkernels::cuda {
namespace {

template <class T>
__device__ __forceinline__ float bias_of(const SguArgs& p, int head, int row) {
  const int64_t at = head * p.bias_head + row * p.bias_row;
  if (p.weight.wide) return reinterpret_cast<const float*>(p.bias)[at];
  return to_float(reinterpret_cast<const T*>(p.bias)[at], p.dtype);
}

template <class T>
__device__ __forceinline__ void compute(const SguArgs& p) {
  using M = Mixing<T, false>;
  const typename M::Block b = M::block_of(p);
  if (b.row0 >= b.n_rows) return;
  Sums<M::S::kM, M::S::kN> sums;
  M::multiply(p, p.gate, b, sums);
  M::for_chunks(p, b, sums, [&](int row, const Place& place, float(&x)[kChunk<T>]) {
    const int64_t token = b.first(p) + row;
    const float bias = bias_of<T>(p, b.head, row);
    float other[kChunk<T>];
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) x[e] += bias;
    if (p.gate_residual.data) {
      load<T>(p, p.gate_residual, b.head, token, place, other);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) x[e] += other[e];
    }
    if (p.z.data) store<T>(p, p.z, b.head, token, place, x);
    load<T>(p, p.residual, b.head, token, place, other);
    activate(p.activation, x);
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) x[e] *= other[e];
    store<T>(p, p.out, b.head, token, place, x);
  });
}

__global__ void __launch_bounds__(kMixThreads, 2) sgu_forward_kernel(const __grid_constant__ SguArgs p) {
  with_width(p.dtype, [&](auto type) { compute<decltype(type)>(p); });
}

template <class T>
void run(const SguArgs& p, void* stream) {
  using M = Mixing<T, false>;
  launch("sgu_forward", sgu_forward_kernel, M::blocks(p), M::S::kThreads, M::shared_bytes(p.weight.wide), stream, p);
}

}  // namespace

void run_sgu_forward(const SguArgs& p, DType dtype, void* stream) { HIERKERNELS_SGU_DISPATCH(dtype, run, p, stream); }

}  // namespace hierkernels::cuda
