// The causal spatial gating unit: from a call to its kernels.
#include "../operators.h"
#include "mixing.h"
#include "weight_shape.h"

namespace hierkernels::cuda {
namespace {

bool is_aligned(uint64_t bytes) { return bytes % sizeof(Bytes16) == 0; }

Activations activations(const Tensor& t, int64_t dim) {
  if (!t) return {};
  const int64_t size = t.element_bytes();
  const bool aligned = is_aligned(reinterpret_cast<uint64_t>(t.data)) && is_aligned(dim * size) &&
                       (t.size[0] == 1 || is_aligned(t.stride[0] * size)) && (t.size[1] == 1 || is_aligned(t.stride[1] * size));
  return {static_cast<unsigned char*>(t.data), t.stride[0], t.stride[1], aligned};
}

SguWeight weight(const Tensor& t, int64_t own) {
  const int64_t size = t.element_bytes();
  const bool aligned = is_aligned(reinterpret_cast<uint64_t>(t.data)) && is_aligned(own * size) &&
                       (t.size[0] == 1 || is_aligned(t.stride[0] * size)) && (t.size[1] == 1 || is_aligned(t.stride[1] * size));
  return {static_cast<const unsigned char*>(t.data), t.stride[0], t.stride[1], t.dtype == DType::kFloat32, aligned};
}

SguArgs arguments(const SguParams& p) {
  const SguShape s(p);
  SguArgs a{};
  a.residual = activations(p.residual, s.dim);
  a.gate = activations(p.gate, s.dim);
  a.gate_residual = activations(p.gate_residual, s.dim);
  a.out = activations(p.out, s.dim);
  a.z = activations(p.z, s.dim);
  a.dout = activations(p.dout, s.dim);
  a.dresidual = activations(p.dresidual, s.dim);
  a.dmix = activations(p.dgate_residual, s.dim);
  a.dgate = activations(p.dgate, s.dim);
  a.weight = weight(p.weight, s.own);
  a.bias = p.bias.as<const unsigned char>();
  a.bias_head = p.bias.stride[0];
  a.bias_row = p.bias.stride[1];
  a.tokens = s.N;
  a.batch = static_cast<int>(s.B);
  a.heads = static_cast<int>(s.H);
  a.dim = static_cast<int>(s.dim);
  a.columns = static_cast<int>(s.columns);
  a.size = static_cast<int>(s.w);
  a.buckets = static_cast<int>(s.buckets);
  a.own = static_cast<int>(s.own);
  a.look_back = s.look_back;
  a.width = static_cast<int>(p.weight.size[1]);
  a.weight_columns = static_cast<int>(p.weight.size[2]);
  a.activation = p.activation;
  a.dtype = p.gate.dtype;
  return a;
}

int64_t items_of_split(const SguParams& p) {
  // Blocks that keep a large device busy; fixed, so that results do not depend on the device.
  constexpr int64_t kBusy = 512;
  const SguShape s(p);
  const int64_t tile = p.gate.dtype == DType::kFloat32 ? WeightShape<float>::kSize : WeightShape<Number16>::kSize;
  const int64_t tiles = (s.w + tile - 1) / tile;
  const int64_t working = s.H * (tiles * (tiles + 1) / 2 + (s.look_back ? tiles * tiles : 0));
  const int64_t items = s.B * s.buckets, wanted = kBusy / working;
  const int64_t splits = wanted < 1 ? 1 : wanted < items ? wanted : items;
  return (items + splits - 1) / splits;
}

template <bool kTransposed>
int mixing_shared() {
  const int wide = Mixing<float, kTransposed>::shared_bytes(true), narrow = Mixing<Number16, kTransposed>::shared_bytes(true);
  return wide > narrow ? wide : narrow;
}

}  // namespace

std::vector<KernelInfo> sgu_kernels() {
  const int of_weight = WeightShape<Number16>::kShared;
  return {{"sgu_mix_gradient_kernel", kMixGradientThreads, 0},
          {"sgu_forward_kernel", kMixThreads, mixing_shared<false>()},
          {"sgu_gate_gradient_kernel", kMixThreads, mixing_shared<true>()},
          {"sgu_weight_gradient_kernel", kMixThreads, of_weight}};
}

int sgu_weight_splits(const SguParams& p) {
  const SguShape s(p);
  const int64_t of_split = items_of_split(p);
  return static_cast<int>((s.B * s.buckets + of_split - 1) / of_split);
}

void sgu_forward(const SguParams& p, void* stream) { run_sgu_forward(arguments(p), p.gate.dtype, stream); }

void sgu_backward(const SguParams& p, const Tensor& sums, void* stream) {
  SguArgs a = arguments(p);
  a.sums = sums.as<float>();
  run_sgu_mix_gradient(a, stream);
  if (p.dgate) run_sgu_gate_gradient(a, p.gate.dtype, stream);
  if (p.dweight) {
    a.dweight = p.dweight.as<unsigned char>();
    a.dweight_wide = p.dweight.dtype == DType::kFloat32;
    a.items_of_split = static_cast<int>(items_of_split(p));
    run_sgu_weight_gradient(a, p.gate.dtype, static_cast<int>(p.dweight.size[0]), stream);
  }
}

}  // namespace hierkernels::cuda
