// From products to probabilities: scale, score modifiers, dropout. Scores are in natural units, float32.
#pragma once
#include "../common/philox.h"
#include "args.h"

namespace hierkernels::cuda {

constexpr float kLog2E = 1.4426950408889634f;
// A bias that leaves less than this hides its key, as the reference has it: 0.9 times the least float32.
constexpr float kHiddenBelow = -0.9f * 3.402823466e38f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float natural_exp(float x) { return ptx::exp2(x * kLog2E); }

__device__ __forceinline__ float bias_number(const AttentionArgs& p, int64_t at) {
  switch (p.bias_dtype) {
    case DType::kBFloat16:
      return ptx::to_float(static_cast<const BFloat16*>(p.bias.data)[at]);
    case DType::kFloat16:
      return ptx::to_float(static_cast<const Float16*>(p.bias.data)[at]);
    case DType::kFloat64:
      return static_cast<float>(static_cast<const double*>(p.bias.data)[at]);
    default:
      return static_cast<const float*>(p.bias.data)[at];
  }
}

__device__ __forceinline__ int64_t pair_offset(const PairTensor& t, int b, int h, int i, int j) {
  return b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j * t.stride[3];
}

// The score of a visible pair from its product x, or -inf if mask, padding or bias hide it. slope: the derivative of
// the score by x * scale, 1 without a soft cap.
__device__ __forceinline__ float modified_score(const AttentionArgs& p, float x, int b, int h, int i, int j, float& slope) {
  x *= p.scale;
  slope = 1.f;
  if (!p.modified) return x;
  if (p.softcap > 0.f) {
    const float t = tanhf(x / p.softcap);
    x = p.softcap * t;
    slope = 1.f - t * t;
  }
  if (p.bias.data) {
    int row = i, column = j;
    if (p.bias_width) {
      row = i % p.bias_width;
      column = j - (i - row) + p.bias_before;
    }
    x += bias_number(p, pair_offset(p.bias, b, h, row, column));
    if (x < kHiddenBelow) x = -infinity();
  }
  if (p.mask.data && !static_cast<const unsigned char*>(p.mask.data)[pair_offset(p.mask, b, h, i, j)]) x = -infinity();
  if (p.padding && !p.padding[b * p.padding_stride[0] + j * p.padding_stride[1]]) x = -infinity();
  return x;
}

__device__ __forceinline__ bool dropout_keeps(const AttentionArgs& p, uint64_t seed, int b, int h, int i, int j) {
  return philox_word(philox(seed, philox_counter(j), i, h, b), j) >= p.dropout_threshold;
}

// Whether dropout keeps the keys of columns n0 + sums_column(n, e) for one row: bit 2 n + e. n0 is a multiple of 16.
// Keys 16 apart share a call of the generator, so four of 8 keys serve 8 kN.
template <int kN>
__device__ __forceinline__ uint32_t dropout_keeps_row(const AttentionArgs& p, uint64_t seed, const Query& q, int n0) {
  static_assert(kN <= 16);
  uint32_t keep = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Philox words{};
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) {
        const uint32_t j = n0 + 16 * k + sums_column(n, e);
        if (k == 0 || j / 16 % 4 == 0) words = philox(seed, philox_counter(j), q.query, q.head, q.batch);
        keep |= static_cast<uint32_t>(philox_word(words, j) >= p.dropout_threshold) << (2 * (2 * k + n) + e);
      }
    }
  return keep;
}

}  // namespace hierkernels::cuda
