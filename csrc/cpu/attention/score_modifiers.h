// What changes the scores of a row besides the key range: additive bias, mask, key padding, dropout.
#pragma once
#include "../../common/philox.h"
#include "../simd.h"
#include "attention.h"
#include "bias_slots.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// 16 x 4 random words for the counters (first + lane, query, head, batch): words[w * 16 + lane].
inline void philox_words(uint64_t seed, uint32_t first, uint32_t query, uint32_t head, uint32_t batch,
                         uint32_t words[64]) {
  // Two 32-bit lanes in 64 bits, those with even and those with odd numbers apart, since a product of 32-bit numbers takes
  // 64. The products read the low half alone, so the high half of a word may hold anything.
  using U = Simd<float>::U;
  constexpr int W = kWidth<float>;
  typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));
  const auto multiply = [](U64 x, uint32_t m) {
    const U64 factor = U64{} + m;
#if defined(__AVX512F__)
    return bit_cast<U64>(_mm512_mul_epu32(bit_cast<__m512i>(x), bit_cast<__m512i>(factor)));
#elif defined(__AVX2__)
    return bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(x), bit_cast<__m256i>(factor)));
#elif defined(__x86_64__)
    return bit_cast<U64>(_mm_mul_epu32(bit_cast<__m128i>(x), bit_cast<__m128i>(factor)));
#else
    return (x & 0xffffffffu) * factor;
#endif
  };
  for (int lane = 0; lane < 16; lane += W) {
    const U64 counter = bit_cast<U64>(bit_cast<U>(lanes<float>()) + (first + static_cast<uint32_t>(lane)));
    U64 c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      c[odd][0] = odd ? counter >> 32 : counter;
      c[odd][1] = U64{} + query;
      c[odd][2] = U64{} + head;
      c[odd][3] = U64{} + batch;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int odd = 0; odd < 2; ++odd) {
        const U64 a = multiply(c[odd][0], kPhiloxM0), b = multiply(c[odd][2], kPhiloxM1);
        c[odd][0] = (b >> 32) ^ c[odd][1] ^ (U64{} + k0);
        c[odd][1] = b;
        c[odd][2] = (a >> 32) ^ c[odd][3] ^ (U64{} + k1);
        c[odd][3] = a;
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    for (int w = 0; w < 4; ++w) {
      const U64 word = (c[0][w] & (U64{} + 0xffffffffu)) | (c[1][w] << 32);
      __builtin_memcpy(words + w * 16 + lane, &word, sizeof word);
    }
  }
}

struct ScoreModifiers {
  Tensor bias, mask, padding;  // broadcast strides
  BiasSlots slots;
  bool additive;               // there is a bias, a mask or padding
  bool same_for_queries;       // the additive row does not depend on the query
  bool same_for_heads;         // nor on the head
  bool dropout;
  uint32_t drop_below;
  double keep_factor;  // 1 / (1 - p)
  uint64_t seed;

  static ScoreModifiers from(const AttentionParams& p) {
    ScoreModifiers m;
    m.bias = p.bias;
    m.mask = p.mask;
    m.padding = p.padding;
    m.slots = BiasSlots::from(p);
    m.additive = p.bias || p.mask || p.padding;
    m.same_for_queries = !m.slots && p.bias.stride[2] == 0 && p.mask.stride[2] == 0;
    m.same_for_heads = p.bias.stride[1] == 0 && p.mask.stride[1] == 0;
    m.dropout = p.dropout_p > 0;
    m.drop_below = dropout_threshold(p.dropout_p);
    m.keep_factor = 1 / (1 - p.dropout_p);
    m.seed = p.seed;
    return m;
  }

  // row[0..n) = bias * log2(e), or -inf where the mask or the padding hides the key: for batch b, query head h,
  // query i and the keys [j0, j0 + n).
  template <class F>
  void additive_row(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, F* row) const {
    if (bias) {
      // Keys without a slot are out of sight: any finite number will do.
      const int64_t column = slots.column(i, j0), begin = slots.begin(column), end = slots.end(column, n);
      if (end - begin != n) memset(row, 0, static_cast<size_t>(n) * sizeof(F));
      if (begin < end) bias_row(bias_at(b, h, i, column + begin), end - begin, row + begin);
    } else {
      memset(row, 0, static_cast<size_t>(n) * sizeof(F));
    }
    hide_row(b, h, i, j0, n, row);
  }

  // -inf where the mask or the padding hides the key, the other scores as they are; the same arguments.
  template <class F>
  void hide_row(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, F* scores) const {
    if (mask) {
      const int64_t at = b * mask.stride[0] + h * mask.stride[1] + i * mask.stride[2] + j0 * mask.stride[3];
      hide(mask.as<uint8_t>() + at, mask.stride[3], n, scores);
    }
    if (padding)
      hide(padding.as<uint8_t>() + b * padding.stride[0] + j0 * padding.stride[1], padding.stride[1], n, scores);
  }

  // Asks for the memory of an additive row.
  HK_INLINE void prefetch_row(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n) const {
    if (bias && bias.stride[3] == 1) {
      const int bytes = bias.dtype == DType::kFloat64 ? 8 : bias.dtype == DType::kFloat32 ? 4 : 2;
      prefetch(bias.as<char>() + bias_at(b, h, i, slots.column(i, j0)) * bytes, n * bytes);
    }
    if (mask && mask.stride[3] == 1)
      prefetch(mask.as<char>() + b * mask.stride[0] + h * mask.stride[1] + i * mask.stride[2] + j0, n);
  }

  // row[0..n) = 0 where the probability is dropped, else 1 / (1 - p); the same arguments.
  template <class F>
  void keep_row(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, F* row) const {
    constexpr int W = kWidth<float>;
    uint32_t words[64];
    float part[64];
    for (int64_t first = j0 / 64 * 64; first < j0 + n; first += 64) {
      philox_words(seed, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
                   static_cast<uint32_t>(b), words);
      const int64_t begin = first < j0 ? j0 : first, end = first + 64 < j0 + n ? first + 64 : j0 + n;
      float* keep = part;
      if constexpr (kSame<F, float>)
        if (end - begin == 64) keep = row + (first - j0);
      for (int x = 0; x < 64; x += W) {
        Simd<float>::U word;
        __builtin_memcpy(&word, words + x, sizeof word);
        store(keep + x, select(word >= drop_below, set1(static_cast<float>(keep_factor)), zero<float>()));
      }
      if (keep != part) continue;
      for (int64_t j = begin; j < end; ++j) row[j - j0] = part[j - first] == 0 ? F(0) : static_cast<F>(keep_factor);
    }
  }

 private:
  int64_t bias_at(int64_t b, int64_t h, int64_t i, int64_t column) const {
    return b * bias.stride[0] + h * bias.stride[1] + slots.row(i) * bias.stride[2] + column * bias.stride[3];
  }

  template <class F>
  void bias_row(int64_t at, int64_t n, F* row) const {
    switch (bias.dtype) {
      case DType::kFloat64:
        return scaled_row(bias.as<double>() + at, bias.stride[3], n, row);
      case DType::kBFloat16:
        return scaled_row(bias.as<BFloat16>() + at, bias.stride[3], n, row);
      case DType::kFloat16:
        return scaled_row(bias.as<Float16>() + at, bias.stride[3], n, row);
      default:
        return scaled_row(bias.as<float>() + at, bias.stride[3], n, row);
    }
  }

  template <class F, class T>
  static void scaled_row(const T* x, int64_t stride, int64_t n, F* row) {
    constexpr int W = kWidth<F>;
    const F factor = static_cast<F>(kLog2E);
    if (stride == 0) {
      const F value = static_cast<F>(to_float(*x)) * factor;
      for (int64_t j = 0; j < n; ++j) row[j] = value;
      return;
    }
    int64_t j = 0;
    if (stride == 1) {
      for (; j + W <= n; j += W) store(row + j, load_as<F>(x + j) * factor);
      if (j < n) store(row + j, load_as<F>(x + j, static_cast<int>(n - j)) * factor, static_cast<int>(n - j));
      return;
    }
    for (; j < n; ++j) row[j] = static_cast<F>(to_float(x[j * stride])) * factor;
  }

  template <class F>
  static void hide(const uint8_t* visible, int64_t stride, int64_t n, F* row) {
    constexpr int W = kWidth<F>;
    const F hidden = -static_cast<F>(__builtin_inff());
    int64_t j = 0;
    if (stride == 1)
      for (; j + W <= n; j += W) store(row + j, select(load_bytes<F>(visible + j), load(row + j), set1(hidden)));
    for (; j < n; ++j)
      if (!visible[j * stride]) row[j] = hidden;
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
