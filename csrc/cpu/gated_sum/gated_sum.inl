// The sum of branches, each times its gate, and its gradients: every tensor is read or written once.
#pragma once
#include <omp.h>

#include "../scratch.h"
#include "../simd.h"
#include "gated_sum.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// F: the numbers computed with, T: those stored.
template <class F, class T>
class GatedSum {
  static constexpr int W = kWidth<F>;

 public:
  explicit GatedSum(const GatedSumParams& p) : p_(p), channels_(p.parts[0].size[3]) {}

  void forward() const {
    const bool past = past_caches(p_.out);
    for_each_row([&](int64_t b, int64_t h, int64_t i) {
      F gate[kBranches];
      const T* part[kBranches];
      for (int s = 0; s < kBranches; ++s) {
        gate[s] = static_cast<F>(to_float(row(p_.gates, b, h, i)[s * p_.gates.stride[3]]));
        part[s] = row(p_.parts[s], b, h, i);
      }
      T* const out = row(p_.out, b, h, i);
      for_each_vector([&](int64_t c, int n) {
        Vec<F> sum = set1(gate[0]) * get(part[0] + c, n);
        for (int s = 1; s < kBranches; ++s) sum = fma(set1(gate[s]), get(part[s] + c, n), sum);
        put(out + c, sum, n, past);
      });
    });
  }

  void backward() const {
    bool past[kBranches];
    for (int s = 0; s < kBranches; ++s) past[s] = past_caches(p_.dparts[s]);
    for_each_row([&](int64_t b, int64_t h, int64_t i) {
      F gate[kBranches];
      const T* part[kBranches];
      T* dpart[kBranches];
      Vec<F> dgate[kBranches];
      for (int s = 0; s < kBranches; ++s) {
        gate[s] = static_cast<F>(to_float(row(p_.gates, b, h, i)[s * p_.gates.stride[3]]));
        part[s] = row(p_.parts[s], b, h, i);
        dpart[s] = row(p_.dparts[s], b, h, i);
        dgate[s] = zero<F>();
      }
      const T* const dout = row(p_.dout, b, h, i);
      for_each_vector([&](int64_t c, int n) {
        const Vec<F> grad = get(dout + c, n);
        for (int s = 0; s < kBranches; ++s) {
          dgate[s] = fma(grad, get(part[s] + c, n), dgate[s]);
          put(dpart[s] + c, set1(gate[s]) * grad, n, past[s]);
        }
      });
      for (int s = 0; s < kBranches; ++s)
        put(row(p_.dgates, b, h, i) + s * p_.dgates.stride[3], set1(reduce_add(dgate[s])), 1, false);
    });
  }

 private:
  static T* row(const Tensor& t, int64_t b, int64_t h, int64_t i) {
    return t.as<T>() + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
  }
  static HK_INLINE Vec<F> get(const T* p, int n) { return n == W ? load_as<F>(p) : load_as<F>(p, n); }
  static HK_INLINE void put(T* p, Vec<F> x, int n, bool past) {
    if constexpr (kSame<F, T>)
      if (past) return stream(p, bit_cast<VecF>(x));
    n == W ? store_as<F>(p, x) : store_as<F>(p, x, n);
  }

  // Whether to write a tensor past the caches: it is large, and its rows are whole, aligned vectors.
  bool past_caches(const Tensor& t) const {
    bool whole = kSame<F, T> && reinterpret_cast<uintptr_t>(t.data) % kVectorBytes == 0 && channels_ % W == 0;
    for (int d = 0; d < 3; ++d) whole = whole && t.stride[d] % W == 0;
    return whole && static_cast<size_t>(t.span_bytes()) >= kLargeOutput;
  }

  // body(b, h, i) in the order in which the first branch lies in memory.
  template <class Body>
  void for_each_row(Body body) const {
    const Tensor& t = p_.parts[0];
    const int64_t heads = t.size[1], tokens = t.size[2];
    const bool tokens_first = t.stride[1] < t.stride[2];
    const int64_t outer = tokens_first ? tokens : heads, inner = tokens_first ? heads : tokens;
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t x = 0; x < t.size[0] * outer * inner; ++x) {
        const int64_t b = x / inner / outer, o = x / inner % outer, i = x % inner;
        tokens_first ? body(b, i, o) : body(b, o, i);
      }
      stream_fence();
    }
  }
  template <class Body>
  HK_INLINE void for_each_vector(Body body) const {
    int64_t c = 0;
    for (; c + W <= channels_; c += W) body(c, W);
    if (c < channels_) body(c, static_cast<int>(channels_ - c));
  }

  const GatedSumParams& p_;
  const int64_t channels_;
};

// body(kernel) with the kernel for a type of tensors.
template <class Body>
void with_gated_sum(const GatedSumParams& p, Body body) {
  switch (p.gates.dtype) {
    case DType::kFloat64:
      return body(GatedSum<double, double>(p));
    case DType::kBFloat16:
      return body(GatedSum<float, BFloat16>(p));
    case DType::kFloat16:
      return body(GatedSum<float, Float16>(p));
    default:
      return body(GatedSum<float, float>(p));
  }
}

}  // namespace

void gated_sum_forward(const GatedSumParams& p) {
  with_gated_sum(p, [](const auto& kernel) { kernel.forward(); });
}
void gated_sum_backward(const GatedSumParams& p) {
  with_gated_sum(p, [](const auto& kernel) { kernel.backward(); });
}

}  // namespace HK_ISA
}  // namespace hierkernels
