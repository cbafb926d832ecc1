// Matrices as words: what a lane of a vector multiplies at once, one float or two terms of bfloat16.
#pragma once
#include "../attention/storage.h"

namespace hierkernels::HK_ISA {
namespace {

// An operand of a product: `lines` are rows of the left one, columns of the right one; terms are what a sum runs over.
struct Operand {
  const void* data;
  int64_t lines, terms;
  int64_t line_stride, term_stride;  // one of them is 1

  bool terms_adjoin() const { return term_stride == 1; }
  template <class T>
  const T* at(int64_t line, int64_t term) const {
    return static_cast<const T*>(data) + line * line_stride + term * term_stride;
  }
};

#if !defined(HK_WORDS_OF_BF16)

struct Words {
  static constexpr int kTerms = 1;

  static HK_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) { return _mm512_fmadd_ps(a, b, sum); }
  // The words of `terms` adjoining terms of a line.
  static HK_INLINE VecF along(const float* p, int64_t terms) { return load(p, static_cast<int>(terms)); }
  // One word of each of n adjoining lines; its terms are `stride` apart, and there are `terms` of them.
  static HK_INLINE VecF across(const float* p, int n, int64_t, int64_t terms) {
    return terms > 0 ? load(p, n) : zero<float>();
  }
  static HK_INLINE void store_sums(float* p, VecF sums, int n) { store(p, sums, n); }
  static HK_INLINE VecF sum_of_terms(VecF words) { return words; }
};

#else

struct Words {
  static constexpr int kTerms = 2;

  static HK_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }

  static HK_INLINE VecF along(const BFloat16* p, int64_t terms) {
    const __mmask32 in = terms >= 32 ? ~0u : (1u << terms) - 1;
    return bit_cast<VecF>(_mm512_maskz_loadu_epi16(in, p));
  }
  static HK_INLINE VecF along(const float* p, int64_t terms) {
    const __m512 low = load(p, terms < 16 ? static_cast<int>(terms) : 16);
    const __m512 high = terms > 16 ? load(p + 16, static_cast<int>(terms - 16)) : _mm512_setzero_ps();
    return bit_cast<VecF>(_mm512_cvtne2ps_pbh(high, low));
  }

  static HK_INLINE __m512i lanes_of(const BFloat16* p, int n) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
  }
  static HK_INLINE __m512i lanes_of(const float* p, int n) {
    return _mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(load(p, n))));
  }
  template <class T>
  static HK_INLINE VecF across(const T* p, int n, int64_t stride, int64_t terms) {
    if (terms <= 0) return zero<float>();
    const __m512i first = lanes_of(p, n);
    if (terms == 1) return bit_cast<VecF>(first);
    return bit_cast<VecF>(_mm512_or_si512(first, _mm512_slli_epi32(lanes_of(p + stride, n), 16)));
  }

  static HK_INLINE void store_sums(float* p, VecF sums, int n) { store(p, sums, n); }
  static HK_INLINE void store_sums(BFloat16* p, VecF sums, int n) {
    const __m256i bits = bit_cast<__m256i>(_mm512_cvtneps_pbh(sums));
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
  }
  static HK_INLINE VecF sum_of_terms(VecF words) {
    const __m512i bits = bit_cast<__m512i>(words);
    return bit_cast<VecF>(_mm512_slli_epi32(bits, 16)) + bit_cast<VecF>(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)));
  }
};

#endif

// 16 lines by 16 words from (line, term) on, zeros beyond the operand. A vector holds the words of a line if terms adjoin,
// or else one word of every line. kWhole: none are beyond it.
template <class T, bool kWhole>
HK_INLINE void load_block(const Operand& x, int64_t line, int64_t term, VecF (&block)[kWidth<float>]) {
  constexpr int W = kWidth<float>, kSpan = W * Words::kTerms;
  const int64_t lines = kWhole ? W : x.lines - line, terms = kWhole ? kSpan : x.terms - term;
  const T* p = x.at<T>(line, term);
  if (x.terms_adjoin()) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      block[i] = i < lines ? Words::along(p + i * x.line_stride, terms < kSpan ? terms : kSpan) : zero<float>();
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      block[i] = Words::across(p + i * Words::kTerms * x.term_stride, lines < W ? static_cast<int>(lines) : W, x.term_stride,
                               terms - i * Words::kTerms);
  }
}

// Copies 16 lines by 16 words: the words of a line side by side, or, with kByTerms, one word of every line. The first n of
// these rows are written, `stride` words apart. Their sums are added to `sums`, unless that is null (no use by terms).
template <class T, bool kByTerms>
HK_INLINE void copy_block(const Operand& x, int64_t line, int64_t term, int64_t n, float* out, int64_t stride, float* sums) {
  constexpr int W = kWidth<float>;
  const bool adjoin = x.terms_adjoin(), whole = x.lines - line >= W && x.terms - term >= W * Words::kTerms && n >= W;
  const auto add_sums = [&](const VecF(&block)[W]) {
    const int lines = static_cast<int>(n < W ? n : W);
    if (adjoin) {
      for (int i = 0; i < lines; ++i) sums[i] += reduce_add(Words::sum_of_terms(block[i]));
    } else {
      VecF sum = zero<float>();
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) sum += Words::sum_of_terms(block[i]);
      store(sums, load(sums, lines) + sum, lines);
    }
  };
  if (whole) {
    VecF block[W];  // in registers, as long as nothing takes its address
    load_block<T, true>(x, line, term, block);
    if (sums) add_sums(block);
    if (adjoin == kByTerms) transpose<float>(block);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(out + i * stride, block[i]);
  } else {
    VecF block[W];
    load_block<T, false>(x, line, term, block);
    if (sums) add_sums(block);
    if (adjoin == kByTerms) transpose<float>(block);
    for (int i = 0; i < W && i < n; ++i) store(out + i * stride, block[i]);
  }
}

}  // namespace
}  // namespace hierkernels::HK_ISA
