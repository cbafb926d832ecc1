// The gradient of an additive bias: a sum over its broadcast dimensions, the same from run to run.
//
// A task is a key/value head of a batch entry. Where no two threads share an element of the bias, since a thread takes a
// head of all batch entries or nothing is shared, tasks add to it directly, or store where each element belongs to one
// (query, key) pair, in the type of the result; else each thread, which takes the same tasks every time, adds to a copy of
// its own, and the copies are added in order at the end.
#pragma once
#include "../scratch.h"
#include "../simd.h"
#include "attention.h"
#include "bias_slots.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class F>
class BiasGradient {
 public:
  BiasGradient(const AttentionParams& p, int threads)
      : t_(p.dbias), slots_(BiasSlots::from(p)), once_(p.dbias && p.bias_of_pairs()), n_keys_(p.n_keys()), copies_(1) {
    if (!t_) return;
    large_ = t_.span_bytes() >= static_cast<int64_t>(kLargeOutput) && reinterpret_cast<uintptr_t>(t_.data) % 64 == 0;
    size_ = 1;
    for (int d = 0; d < 4; ++d) size_ *= t_.size[d];
    const bool of_batch = p.batch() > 1 && t_.stride[0] == 0, of_heads = p.kv_heads() > 1 && t_.stride[1] == 0;
    // A thread for each head must not leave many of them idle.
    by_heads_ = of_batch && !of_heads && (p.kv_heads() + threads - 1) / threads * threads <= p.kv_heads() * 5 / 4;
    stores_first_ = by_heads_ && p.bias_of_batch_pairs();
    if (!once_ && !stores_first_) clear_sums(t_);
    if (!(of_batch || of_heads) || by_heads_ || threads == 1) return;
    copies_ = threads;
    copies_data_ = reinterpret_cast<F*>(thread_scratch(ScratchUse::kBias, static_cast<size_t>(size_) * copies_ * sizeof(F)));
#pragma omp parallel for schedule(static)
    for (int c = 0; c < copies_; ++c) memset(copies_data_ + c * size_, 0, static_cast<size_t>(size_) * sizeof(F));
  }

  // Whether a thread takes a head of all batch entries; whether the same thread must take the same tasks every time.
  bool by_heads() const { return by_heads_; }
  bool fixed() const { return copies_ > 1; }

  // The sums of a thread.
  F* of_thread(int thread) const { return copies_ > 1 ? copies_data_ + thread * size_ : t_.as<F>(); }

  // Before the rows' sums: zeros for the keys outside [lo, hi), if nobody else writes them.
  void begin_row(F* sums, int64_t b, int64_t h, int64_t i, int64_t lo, int64_t hi) const {
    if (!stores(b)) return;
    const int64_t bytes = t_.element_bytes();
    char* to = reinterpret_cast<char*>(sums) + (b * t_.stride[0] + h * t_.stride[1] + i * t_.stride[2]) * bytes;
    if (lo > hi) lo = hi;
    memset(to, 0, static_cast<size_t>(lo * bytes));
    memset(to + hi * bytes, 0, static_cast<size_t>((n_keys_ - hi) * bytes));
  }

  // sums[b, h, i, j0 .. j0 + n) += 32 numbers, of which the first n count.
  HK_INLINE void add_row(F* sums, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, __m512 low, __m512 high) const {
    const bool stored = stores(b);
    if (!stored && t_.stride[3] == 0) {
      alignas(64) float line[32];
      _mm512_store_ps(line, low);
      _mm512_store_ps(line + 16, high);
      return add_row(sums, b, h, i, j0, n, line);
    }
    if (!stored) {
      const int64_t column = slots_.column(i, j0);
      float* to = sums + b * t_.stride[0] + h * t_.stride[1] + slots_.row(i) * t_.stride[2] + column;
      const __mmask32 there = first_lanes32(slots_.end(column, n)) & ~first_lanes32(slots_.begin(column));
      const __mmask16 first = static_cast<__mmask16>(there), second = static_cast<__mmask16>(there >> 16);
      _mm512_mask_storeu_ps(to, first, _mm512_add_ps(low, _mm512_maskz_loadu_ps(first, to)));
      _mm512_mask_storeu_ps(to + 16, second, _mm512_add_ps(high, _mm512_maskz_loadu_ps(second, to + 16)));
      __builtin_prefetch(to + 32, 1);
      __builtin_prefetch(to + 48, 1);
      return;
    }
    const int64_t at = b * t_.stride[0] + h * t_.stride[1] + i * t_.stride[2] + j0;
    const __mmask32 valid = first_lanes32(n);
    if (t_.dtype == DType::kFloat32) {
      _mm512_mask_storeu_ps(t_.as<float>() + at, static_cast<__mmask16>(valid), low);
      _mm512_mask_storeu_ps(t_.as<float>() + at + 16, static_cast<__mmask16>(valid >> 16), high);
    } else if (t_.dtype == DType::kBFloat16 && valid == ~0u && large_ && at % 32 == 0) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(t_.as<uint16_t>() + at), to_bf16(low, high));
    } else if (t_.dtype == DType::kBFloat16) {
      _mm512_mask_storeu_epi16(t_.as<uint16_t>() + at, valid, to_bf16(low, high));
    } else {
      const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT)),
                                                _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), 1);
      _mm512_mask_storeu_epi16(t_.as<uint16_t>() + at, valid, halves);
    }
  }

  // sums[b, h, i, j0 .. j0 + n) += row, where elements are shared.
  void add_row(F* sums, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, const F* row) const {
    F* to = sums + b * t_.stride[0] + h * t_.stride[1] + slots_.row(i) * t_.stride[2];
    const int64_t column = slots_.column(i, j0), begin = slots_.begin(column), end = slots_.end(column, n);
    if (t_.stride[3] == 0) {
      F sum = 0;
      for (int64_t j = begin; j < end; ++j) sum += row[j];
      *to += sum;
      return;
    }
    to += column;  // contiguous
    for (int64_t j = begin; j < end; ++j) to[j] += row[j];
  }

  // After all tasks, outside of the parallel region.
  void finish() const {
    if (copies_ == 1) return;
    F* to = t_.as<F>();
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size_; ++i)
      for (int c = 0; c < copies_; ++c) to[i] += copies_data_[c * size_ + i];
  }

 private:
  // Whether a batch entry's numbers are stored, not added.
  HK_INLINE bool stores(int64_t b) const { return once_ || (stores_first_ && b == 0); }

  Tensor t_;
  BiasSlots slots_;
  bool once_;
  bool by_heads_ = false, stores_first_ = false;
  bool large_ = false;  // whole lines are written past the caches
  int64_t n_keys_;
  int copies_;
  int64_t size_ = 0;
  F* copies_data_ = nullptr;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
