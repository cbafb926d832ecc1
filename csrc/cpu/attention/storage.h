// Between tensors and scratch memory: rows of a tensor are loaded, transposed and stored with conversion.
#pragma once
#include "../../common/tensor.h"
#include "../simd.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// The rows of one (batch, kv head): row r is query r / group of head r % group of the group; keys have group 1.
struct Rows {
  char* data;                                // row 0
  int64_t token_stride, head_stride, group;  // strides in elements

  // Row `row` lies at row * uniform_stride() if that is not 0.
  int64_t uniform_stride(int64_t tokens) const {
    if (group == 1 || token_stride == group * head_stride) return group == 1 ? token_stride : head_stride;
    return tokens == 1 ? head_stride : 0;
  }
};

// Walks over the offsets of consecutive rows.
class RowCursor {
 public:
  RowCursor(const Rows& rows, int64_t row)
      : rows_(rows),
        head_(rows.group == 1 ? 0 : row % rows.group),
        token_offset_((rows.group == 1 ? row : row / rows.group) * rows.token_stride) {}
  int64_t offset() const { return token_offset_ + head_ * rows_.head_stride; }
  void next() {
    if (++head_ == rows_.group) {
      head_ = 0;
      token_offset_ += rows_.token_stride;
    }
  }

 private:
  const Rows& rows_;
  int64_t head_, token_offset_;
};

// out[i * out_stride + c] = row first + i, for c < dim; zeros up to the next multiple of kWidth.
template <class F, class T>
void load_rows(const Rows& rows, int64_t first, int n, int dim, F* out, int64_t out_stride) {
  constexpr int W = kWidth<F>;
  RowCursor cursor(rows, first);
  for (int i = 0; i < n; ++i, cursor.next(), out += out_stride) {
    const T* x = reinterpret_cast<const T*>(rows.data) + cursor.offset();
    int c = 0;
    for (; c + W <= dim; c += W) store(out + c, load_as<F>(x + c));
    if (c < dim) store(out + c, load_as<F>(x + c, dim - c));
  }
}

// Tokens first .. first + n (group 1) as panels of `panel` columns: out[token / panel][c][token % panel] times
// factor; zeros beyond n, up to the next multiple of kWidth.
template <class F, class T>
void transpose_rows(const Rows& rows, int64_t first, int n, int dim, F factor, F* out, int panel) {
  constexpr int W = kWidth<F>;
  const T* x = reinterpret_cast<const T*>(rows.data) + first * rows.token_stride;
  for (int j = 0; j < n; j += W, x += W * rows.token_stride) {
    F* column = out + static_cast<int64_t>(j / panel) * panel * dim + j % panel;
    const int valid = n - j < W ? n - j : W;
    for (int c = 0; c < dim; c += W) {
      const int width = dim - c < W ? dim - c : W;
      Vec<F> block[W];
      if (valid == W && width == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load_as<F>(x + i * rows.token_stride + c);
      } else {
        // Part of a row of 16-bit numbers is loaded one by one: whole vectors where there are.
        for (int i = 0; i < W; ++i) {
          const T* at = x + i * rows.token_stride + c;
          block[i] = i >= valid ? zero<F>() : width == W ? load_as<F>(at) : load_as<F>(at, width);
        }
      }
      transpose<F>(block);
      if (width == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(column + static_cast<int64_t>(c + i) * panel, block[i] * factor);
      } else {
        for (int i = 0; i < width; ++i) store(column + static_cast<int64_t>(c + i) * panel, block[i] * factor);
      }
    }
  }
}

#if defined(__AVX512F__)
// Two vectors as a line of 16-bit numbers, past the caches.
HK_INLINE __m256i halves(BFloat16* p, VecF x) { return bit_cast<__m256i>(__builtin_convertvector(encode(p, x), U16)); }
HK_INLINE __m256i halves(Float16*, VecF x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
template <class T>
HK_INLINE void stream_line(T* p, VecF low, VecF high) {
  const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(halves(p, low)), halves(p, high), 1);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
}
#endif

// Row first + i = x[i * x_stride ...] * factors[i * factor_stride]. past_caches: if possible, without reading the
// memory first and without displacing what the caches hold.
template <class F, class T>
void store_rows(const Rows& rows, int64_t first, int n, int dim, const F* x, int64_t x_stride, const F* factors,
                int factor_stride, bool past_caches) {
  constexpr int W = kWidth<F>;
  RowCursor cursor(rows, first);
  for (int i = 0; i < n; ++i, cursor.next(), x += x_stride) {
    const Vec<F> factor = set1(factors[i * factor_stride]);
    T* out = reinterpret_cast<T*>(rows.data) + cursor.offset();
    int c = 0;
    if (kSame<F, T> && past_caches && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0)
      for (; c + W <= dim; c += W) stream(out + c, bit_cast<VecF>(load(x + c) * factor));
#if defined(__AVX512F__)
    if constexpr (kSame<F, float> && sizeof(T) == 2)
      if (past_caches && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0)
        for (; c + 2 * W <= dim; c += 2 * W) stream_line(out + c, load(x + c) * factor, load(x + c + W) * factor);
#endif
    for (; c + W <= dim; c += W) store_as<F>(out + c, load(x + c) * factor);
    if (c < dim) store_as<F>(out + c, load(x + c) * factor, dim - c);
  }
}

// sums[i] = the dot product of row first + i of a and of b.
template <class F, class T>
void dot_rows(const Rows& a, const Rows& b, int64_t first, int n, int dim, F* sums) {
  constexpr int W = kWidth<F>;
  RowCursor a_cursor(a, first), b_cursor(b, first);
  for (int i = 0; i < n; ++i, a_cursor.next(), b_cursor.next()) {
    const T* x = reinterpret_cast<const T*>(a.data) + a_cursor.offset();
    const T* y = reinterpret_cast<const T*>(b.data) + b_cursor.offset();
    Vec<F> sum = zero<F>();
    int c = 0;
    for (; c + W <= dim; c += W) sum = fma(load_as<F>(x + c), load_as<F>(y + c), sum);
    if (c < dim) sum = fma(load_as<F>(x + c, dim - c), load_as<F>(y + c, dim - c), sum);
    sums[i] = reduce_add(sum);
  }
}

// scores[r * stride + j] = a(row r) . row first + j, for n rows of a tensor and few of `a`, which are padded with zeros to
// whole vectors: dot products, where too few rows share a transposition. Asks for rows to come, and for those of `also`.
template <class F, class T>
void dot_keys(const Rows& keys, const Rows& also, int64_t first, int n, int dim, const F* a, int64_t a_stride, int a_rows,
              F* scores, int64_t stride) {
  constexpr int W = kWidth<F>, kLine = 64 / static_cast<int>(sizeof(T));
  const T* x = reinterpret_cast<const T*>(keys.data) + first * keys.token_stride;
  const T* y = reinterpret_cast<const T*>(also.data) + first * also.token_stride;
  for (int j = 0; j < n; j += W, x += W * keys.token_stride, y += W * also.token_stride) {
    const int valid = n - j < W ? n - j : W;
    for (int i = 0; i < valid; ++i)
      for (int c = 0; c < dim; c += kLine) {
        __builtin_prefetch(x + (2 * W + i) * keys.token_stride + c);
        __builtin_prefetch(y + i * also.token_stride + c, 0, 2);
      }
    for (int r = 0; r < a_rows; ++r) {
      Vec<F> sum[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) sum[i] = zero<F>();
      for (int c = 0; c < dim; c += W) {
        const Vec<F> factor = load(a + r * a_stride + c);
        if (valid == W && dim - c >= W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) sum[i] = fma(load_as<F>(x + i * keys.token_stride + c), factor, sum[i]);
        } else {
          const int width = dim - c < W ? dim - c : W;
          for (int i = 0; i < valid; ++i) sum[i] = fma(load_as<F>(x + i * keys.token_stride + c, width), factor, sum[i]);
        }
      }
      // Halves of all vectors together, until lane i holds the sum of row i.
#pragma GCC unroll 4
      for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
          Vec<F> low, high;
          zip(sum[i], sum[i + half], low, high);
          sum[i] = low + high;
        }
      store(scores + r * stride + j, sum[0]);
    }
  }
}

// The functions above for one storage type; products work on F alone.
template <class F>
struct Storage {
  bool native;  // the storage type is F
  int bytes;
  void (*load)(const Rows&, int64_t, int, int, F*, int64_t);
  void (*transpose)(const Rows&, int64_t, int, int, F, F*, int);
  void (*store)(const Rows&, int64_t, int, int, const F*, int64_t, const F*, int, bool);
  void (*dot)(const Rows&, const Rows&, int64_t, int, int, F*);
  void (*dot_keys)(const Rows&, const Rows&, int64_t, int, int, const F*, int64_t, int, F*, int64_t);
};
template <class F, class T>
constexpr Storage<F> storage_of() {
  return {kSame<F, T>,   static_cast<int>(sizeof(T)), load_rows<F, T>, transpose_rows<F, T>, store_rows<F, T>,
          dot_rows<F, T>,  dot_keys<F, T>};
}

// body(storage) with the functions for a type of tensors.
template <class Body>
void with_storage(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(storage_of<double, double>());
    case DType::kBFloat16:
      return body(storage_of<float, BFloat16>());
    case DType::kFloat16:
      return body(storage_of<float, Float16>());
    default:
      return body(storage_of<float, float>());
  }
}

// Rows of a 4-dimensional tensor (B, H, N, D) for a kv head whose group has `group` heads.
template <class F>
Rows rows_of(const Tensor& t, const Storage<F>& storage, int64_t b, int64_t kv_head, int64_t group) {
  const int64_t offset = b * t.stride[0] + kv_head * group * t.stride[1];
  return {t.as<char>() + offset * storage.bytes, t.stride[2], t.stride[1], group};
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
