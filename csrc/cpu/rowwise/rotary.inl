// Rotary positions: pairs of channels turned by tables.
#pragma once
#include "../../common/rowwise_params.h"
#include "../simd.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// F: what is computed in; T: the stored type.
template <class F, class T>
void turn(const RotaryParams& p) {
  constexpr int kW = kWidth<F>;
  constexpr int64_t kParallel = 16384, kTask = 4096;  // elements, see norm.inl
  const int64_t B = p.x.size[0], H = p.x.size[1], N = p.x.size[2], D = p.x.size[3], half = D / 2;
  const F sign = p.transposed ? F(-1) : F(1);
#pragma omp parallel for schedule(dynamic, H * D < kTask ? kTask / (H * D) : 1) if (B * H * N * D > kParallel)
  for (int64_t token = 0; token < B * N; ++token) {
    const int64_t b = token / N, n = token % N;
    const F *cos = p.cos.as<F>() + n * half, *sin = p.sin.as<F>() + n * half;
    for (int64_t h = 0; h < H; ++h) {
      const T* x = p.x.as<T>() + b * p.x.stride[0] + h * p.x.stride[1] + n * p.x.stride[2];
      T* out = p.out.as<T>() + b * p.out.stride[0] + h * p.out.stride[1] + n * p.out.stride[2];
      int64_t c = 0;
      for (; c + kW <= half; c += kW) {
        const Vec<F> u = load(cos + c), w = load(sin + c) * sign;
        const Vec<F> first = load_as<F>(x + c), second = load_as<F>(x + half + c);
        store_as<F>(out + c, first * u - second * w);
        store_as<F>(out + half + c, second * u + first * w);
      }
      if (c < half) {
        const int rest = static_cast<int>(half - c);
        const Vec<F> u = load(cos + c, rest), w = load(sin + c, rest) * sign;
        const Vec<F> first = load_as<F>(x + c, rest), second = load_as<F>(x + half + c, rest);
        store_as<F>(out + c, first * u - second * w, rest);
        store_as<F>(out + half + c, second * u + first * w, rest);
      }
    }
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
