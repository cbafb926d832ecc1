// A head's tokens as rows of B dim columns, batch by batch.
#pragma once
#include "../attention/storage.h"
#include "../scratch.h"
#include "../simd.h"
#include "sgu.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

HK_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
HK_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
HK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HK_INLINE int64_t round_to(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// Columns first .. first + count as runs of one batch entry: body(b, channel of the head, distance from first, length).
template <class Body>
HK_INLINE void for_each_run(const SguShape& s, int64_t first, int64_t count, Body body) {
  int64_t b = first / s.dim, c = first % s.dim;
  for (int64_t at = 0; at < count; ++b, c = 0) {
    const int64_t length = min_of(s.dim - c, count - at);
    body(b, c, at, length);
    at += length;
  }
}

// Channel c of head h of token n, batch entry b.
template <class T>
HK_INLINE T* element(const Tensor& t, const SguShape& s, int64_t b, int64_t n, int64_t h, int64_t c) {
  return t.as<T>() + b * t.stride[0] + n * t.stride[1] + h * s.dim + c;
}

// Tokens that are asked for ahead: a token's channels of one head are too short for the hardware's prefetching.
constexpr int64_t kAhead = 3;
template <class T>
HK_INLINE void prefetch_ahead(const Tensor& t, const T* x, int64_t n, int64_t length) {
  if (n + kAhead < t.size[1]) prefetch(x + kAhead * t.stride[1], length * static_cast<int64_t>(sizeof(T)));
}

// Rows of tensors that a task needs next: asked for between its products, a few at a time, so that the memory is not
// idle while the products run.
class RowsAhead {
 public:
  // Aims at tokens first .. first + tokens, columns [column, column + count); at nothing before add().
  HK_INLINE void aim(const SguShape& s, int64_t h, int64_t first, int64_t tokens, int64_t column, int64_t count) {
    shape_ = &s;
    head_ = h, first_ = first, tokens_ = tokens, column_ = column, count_ = count;
    n_tensors_ = 0;
    tensor_ = row_ = rows_a_time_ = 0;
  }
  HK_INLINE void add(const Tensor& t, bool writes = false) {
    if (t && tokens_ > 0) writes_[n_tensors_] = writes, tensors_[n_tensors_++] = &t;
  }
  // So that everything has been asked for after so many calls of ask.
  HK_INLINE void spread(int64_t calls) { rows_a_time_ = ceil_div(n_tensors_ * tokens_, max_of(calls, 1)); }

  HK_INLINE void ask() {
    for (int64_t i = 0; i < rows_a_time_ && tensor_ < n_tensors_; ++i) {
      const Tensor& t = *tensors_[tensor_];
      const int64_t bytes = t.element_bytes();
      for_each_run(*shape_, column_, count_, [&](int64_t b, int64_t c, int64_t, int64_t length) {
        const int64_t at = b * t.stride[0] + (first_ + row_) * t.stride[1] + head_ * shape_->dim + c;
        if (writes_[tensor_])
          prefetch_to_write(t.as<char>() + at * bytes, length * bytes);
        else
          prefetch(t.as<char>() + at * bytes, length * bytes);
      });
      if (++row_ == tokens_) row_ = 0, ++tensor_;
    }
  }

 private:
  static constexpr int kMost = 7;
  const SguShape* shape_ = nullptr;
  const Tensor* tensors_[kMost];
  bool writes_[kMost];
  int64_t head_ = 0, first_ = 0, tokens_ = 0, column_ = 0, count_ = 0, rows_a_time_ = 0;
  int n_tensors_ = 0, tensor_ = 0;
  int64_t row_ = 0;
};

// Whether to write a result past the caches: it is large, and runs of channels are whole vectors at such addresses.
template <class T>
HK_INLINE bool worth_streaming(const Tensor& t, const SguShape& s) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  return t && static_cast<size_t>(t.span_bytes()) >= kLargeOutput && reinterpret_cast<uintptr_t>(t.data) % 64 == 0 &&
         s.dim % line == 0 && t.stride[0] % line == 0 && t.stride[1] % line == 0;
}

// A vector to memory, rounded to T; past the caches if `streamed`.
template <class F, class T>
HK_INLINE void put(T* to, Vec<F> x, bool streamed) {
  if constexpr (kSame<F, T>) {
    if (streamed)
      stream(reinterpret_cast<float*>(to), bit_cast<VecF>(x));
    else
      store(to, x);
  } else {
#if defined(__AVX512BF16__)
    if constexpr (kSame<T, BFloat16>) {
      const __m256i y = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
      if (streamed)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), y);
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), y);
      return;
    }
#endif
    store_as<F>(to, x);
  }
}

template <class E, class T>
HK_INLINE void copy_run(const T* x, int64_t n, E* out) {
  if constexpr (kSame<E, T>) {
    __builtin_memcpy(out, x, static_cast<size_t>(n) * sizeof(E));
  } else {
    constexpr int W = kWidth<E>;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load_as<E>(x + i));
    if (i < n) store(out + i, load_as<E>(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  }
}

// out[i] = column first + i of token n for i < count; zeros up to `whole`.
template <class E, class T>
HK_INLINE void load_columns(const Tensor& t, const SguShape& s, int64_t h, int64_t n, int64_t first, int64_t count,
                            int64_t whole, E* out) {
  for_each_run(s, first, count, [&](int64_t b, int64_t c, int64_t at, int64_t length) {
    copy_run(element<T>(t, s, b, n, h, c), length, out + at);
  });
  for (int64_t i = count; i < whole; ++i) out[i] = E{};
}

template <class F, class T>
HK_INLINE void store_columns(const Tensor& t, const SguShape& s, int64_t h, int64_t n, int64_t column, int64_t count,
                             const F* x, bool streamed) {
  constexpr int W = kWidth<F>;
  for_each_run(s, column, count, [&](int64_t b, int64_t channel, int64_t at, int64_t length) {
    T* out = element<T>(t, s, b, n, h, channel);
    int64_t i = 0;
    for (; i + W <= length; i += W) put<F>(out + i, load(x + at + i), streamed);
    if (const int rest = static_cast<int>(length - i); rest > 0) store_as<F>(out + i, load(x + at + i, rest), rest);
  });
}

// Tokens first .. first + rows of a head, columns [column, column + count), as strips `strip_size` apart, from row
// `row` of the strips on; filled up with zeros to whole strips and units of rows. lines: room for kGroup rows.
template <class Engine, class T>
void pack_strips(const Tensor& t, const SguShape& s, int64_t h, int64_t first, int64_t rows, int64_t row,
                 int64_t column, int64_t count, typename Engine::Element* lines, typename Engine::Element* strips,
                 int64_t strip_size) {
  using E = typename Engine::Element;
  constexpr int64_t S = Engine::kStrip, G = Engine::kGroup;
  const int64_t whole = round_to(count, S);
  const bool direct = kSame<E, T> && s.dim % S == 0;  // strips lie within batch entries
  for (int64_t r = 0; r < round_to(rows, Engine::kUnit); r += G) {
    const E* line[G];
    if (direct && r + G <= rows) {
      for_each_run(s, column, count, [&](int64_t b, int64_t c, int64_t at, int64_t length) {
        for (int g = 0; g < G; ++g) {
          line[g] = reinterpret_cast<const E*>(element<T>(t, s, b, first + r + g, h, c));
          prefetch_ahead(t, line[g], first + r + g, length);
        }
        Engine::rows_to_strips(line, length, row + r, strips + at / S * strip_size, strip_size);
      });
      continue;
    }
    for (int g = 0; g < G; ++g) {
      const bool there = r + g < rows;
      load_columns<E, T>(t, s, h, there ? first + r + g : first, column, there ? count : 0, whole, lines + g * whole);
      line[g] = lines + g * whole;
    }
    Engine::rows_to_strips(line, whole, row + r, strips, strip_size);
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
