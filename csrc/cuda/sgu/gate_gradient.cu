// dgate: the transposed weight times dmix of the rows that see a token, in its own bucket and in the next.
#include "mixing.h"

namespace hierkernels::cuda {
namespace {

template <class T>
__device__ __forceinline__ void compute(const SguArgs& p) {
  using M = Mixing<T, true>;
  const typename M::Block b = M::block_of(p);
  if (b.row0 >= b.n_rows) return;
  Sums<M::S::kM, M::S::kN> sums;
  M::multiply(p, p.dmix, b, sums);
  M::for_chunks(p, b, sums, [&](int row, const Place& place, const float(&x)[kChunk<T>]) {
    store<T>(p, p.dgate, b.head, b.first(p) + row, place, x);
  });
}

__global__ void __launch_bounds__(kMixThreads, 2) sgu_gate_gradient_kernel(const __grid_constant__ SguArgs p) {
  with_width(p.dtype, [&](auto type) { compute<decltype(type)>(p); });
}

template <class T>
void run(const SguArgs& p, void* stream) {
  using M = Mixing<T, true>;
  launch("sgu_gate_gradient", sgu_gate_gradient_kernel, M::blocks(p), M::S::kThreads, M::shared_bytes(p.weight.wide), stream, p);
}

}  // namespace

void run_sgu_gate_gradient(const SguArgs& p, DType dtype, void* stream) { HIERKERNELS_SGU_DISPATCH(dtype, run, p, stream); }

}  // namespace hierkernels::cuda
