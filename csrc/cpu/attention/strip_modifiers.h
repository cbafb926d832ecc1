// What changes the scores of a strip of 32 keys in the transposed backward, keys as rows and queries as lanes.
// Included by backward_bf16.inl.
#pragma once
#include "mask_bits.h"

namespace hierkernels::HK_ISA {
namespace {

struct StripModifiers {
  static constexpr int kKeys = 32, kGroup = 16;  // keys of a strip; rows that are transposed together

  const ScoreModifiers& modifiers;
  const int64_t n_keys;
  const int64_t stride;  // of the keys in `add`
  float* add;            // [key][row]: the bias in base 2
  uint32_t* seen;        // [row]: which keys of the strip mask and padding show
  uint32_t* kept[2];     // [strip of a pair][row]: which keys dropout keeps
  float* line;           // kGroup rows of the strip, to transpose

  // The bias of the rows [r, r + kGroup) of a block: place(r, head, query) says which these are.
  template <class Place>
  void load_bias(int64_t b, Place place, int r, int64_t key) const {
    const Tensor& t = modifiers.bias;
    const bool wide = t.dtype == DType::kFloat32;
    const bool by_rows = !modifiers.slots && t.stride[3] == 1 && (wide || t.dtype == DType::kBFloat16);
    const int64_t keys = n_keys - key < kKeys ? n_keys - key : kKeys;
    const __mmask32 valid = first_lanes32(keys);
    const __m512 log2e = _mm512_set1_ps(kLog2ef);
    __m512i x[2][kGroup];
    for (int e = 0; e < kGroup; ++e) {
      int64_t head, query;
      place(r + e, head, query);
      __m512 low, high;
      if (by_rows) {
        const int64_t at = b * t.stride[0] + head * t.stride[1] + query * t.stride[2] + key;
        if (wide) {
          const float* row = t.as<float>() + at;
          low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid), row);
          high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> 16), row + 16);
          __builtin_prefetch(row + kKeys, 0, 2);
          __builtin_prefetch(row + kKeys + 16, 0, 2);
        } else {
          const bf16* row = t.as<bf16>() + at;
          const __m512i both = _mm512_maskz_loadu_epi16(valid, row);
          low = from_bf16(_mm512_castsi512_si256(both));
          high = from_bf16(_mm512_extracti64x4_epi64(both, 1));
          __builtin_prefetch(row + kKeys, 0, 2);
        }
        low = _mm512_mul_ps(low, log2e);
        high = _mm512_mul_ps(high, log2e);
      } else {
        float* to = line + e * kKeys;
        modifiers.additive_row(b, head, query, key, keys, to);
        low = _mm512_load_ps(to);
        high = _mm512_load_ps(to + 16);
      }
      x[0][e] = _mm512_castps_si512(low);
      x[1][e] = _mm512_castps_si512(high);
    }
    for (int half = 0; half < 2; ++half) {
      transpose16(x[half]);
      for (int e = 0; e < kGroup; ++e) _mm512_store_si512(add + (half * 16 + e) * stride + r, x[half][e]);
    }
  }

  // Which keys of the strip the rows [begin, end) of a block see.
  template <class Place>
  void load_seen(int64_t b, Place place, int begin, int end, int64_t key) const {
    const int64_t keys = n_keys - key < kKeys ? n_keys - key : kKeys;
    const uint32_t real = padding_bits(modifiers, b, key, keys);
    for (int r = begin; r < end; ++r) {
      int64_t head, query;
      place(r, head, query);
      seen[r] = real & mask_bits(modifiers, b, head, query, key, keys);
    }
  }

  // Which keys of two strips, from a multiple of 64 on, dropout keeps for the rows [begin, end) of a block.
  template <class Place>
  void load_kept(int64_t b, Place place, int begin, int end, int64_t key) const {
    for (int r = begin; r < end; ++r) {
      int64_t head, query;
      place(r, head, query);
      const uint64_t bits = kept_bits(modifiers, b, head, query, key);
      kept[0][r] = static_cast<uint32_t>(bits);
      kept[1][r] = static_cast<uint32_t>(bits >> 32);
    }
  }
};

}  // namespace
}  // namespace hierkernels::HK_ISA
