// What hides keys or drops their probabilities, a bit for each key: one comparison finds the lanes, and bits need no
// transposition. Included by *_bf16.inl.
#pragma once
#include "bf16_tiles.h"
#include "score_modifiers.h"

namespace hierkernels::HK_ISA {
namespace {

// Bit j: whether byte j is not 0, of the first 32 of n.
HK_INLINE uint32_t bits_of_bytes(const uint8_t* at, int64_t stride, int64_t n) {
  if (stride == 1) {
    const __m256i x = _mm256_maskz_loadu_epi8(first_lanes32(n), at);
    return _mm256_test_epi8_mask(x, x);
  }
  uint32_t bits = 0;
  for (int64_t j = 0; j < n && j < 32; ++j) bits |= static_cast<uint32_t>(at[j * stride] != 0) << j;
  return bits;
}

// Of the first 32 of n keys from j0 on: those that padding leaves, and those that the mask shows to query i of head h.
HK_INLINE uint32_t padding_bits(const ScoreModifiers& m, int64_t b, int64_t j0, int64_t n) {
  const Tensor& t = m.padding;
  if (!t) return ~0u;
  return bits_of_bytes(t.as<uint8_t>() + b * t.stride[0] + j0 * t.stride[1], t.stride[1], n);
}
HK_INLINE uint32_t mask_bits(const ScoreModifiers& m, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n) {
  const Tensor& t = m.mask;
  if (!t) return ~0u;
  const uint8_t* at = t.as<uint8_t>() + b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j0 * t.stride[3];
  __builtin_prefetch(at + 128);
  return bits_of_bytes(at, t.stride[3], n);
}

// Which of 64 keys, from a multiple of 64 on, dropout keeps.
HK_INLINE uint64_t kept_bits(const ScoreModifiers& m, int64_t b, int64_t h, int64_t i, int64_t j0) {
  alignas(64) uint32_t words[64];
  philox_words(m.seed, static_cast<uint32_t>(j0 / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
               static_cast<uint32_t>(b), words);
  const __m512i below = _mm512_set1_epi32(static_cast<int>(m.drop_below));
  uint64_t bits = 0;
  for (int x = 0; x < 64; x += 16)
    bits |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(_mm512_load_si512(words + x), below)) << x;
  return bits;
}

// The rows whose word has bit `key`, of 16 words.
HK_INLINE __mmask16 rows_with(const uint32_t* words, int key) {
  return _mm512_test_epi32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int>(1u << key)));
}

}  // namespace
}  // namespace hierkernels::HK_ISA
