// What the kernels of the causal spatial gating unit take, and how they find their numbers.
//
// Tokens lie in buckets of `size` (all of them without a window). Row r of a bucket sees the rows up to r of its own,
// with the weights from column `own` on, and with look_back all of the bucket before, with the weights from column 0
// on. The columns of a head's matrices are the channels of all batch entries, one entry after the other.
#pragma once
#include <cstring>

#include "../../common/sgu_params.h"
#include "../common/launch.h"
#include "../common/numbers.h"

namespace hierkernels::cuda {

// A (B, N, C) tensor with last stride 1.
struct Activations {
  unsigned char* data = nullptr;  // null: absent
  int64_t batch = 0, token = 0;   // strides in elements
  bool aligned = false;           // 16 bytes of a head's channels can be moved at once
};

struct SguWeight {
  const unsigned char* data;
  int64_t head, row;  // strides in elements
  bool wide;          // float32, also beside 16-bit activations; the bias as well
  bool aligned;       // 16 bytes of a row can be moved at once, from every such part of it on
};

struct SguArgs {
  Activations residual, gate, gate_residual, out, z, dout, dresidual, dmix, dgate;
  SguWeight weight;
  const unsigned char* bias;
  int64_t bias_head, bias_row;
  float* sums;             // (B, N, H), or null
  unsigned char* dweight;  // (splits, H, width, weight_columns), contiguous
  bool dweight_wide;       // float32
  int64_t tokens;
  int batch, heads, dim, columns;  // columns = batch dim
  int size, buckets, own;
  bool look_back;
  int width, weight_columns;       // of a head's weight
  int items_of_split;              // (bucket, batch entry) items that a part of dweight sums
  DType dtype;                     // of the activations
  Activation activation;
};

// 16 bytes, the unit in which memory is moved.
struct alignas(16) Bytes16 {
  uint32_t words[4];
};
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack(const Bytes16& from, float (&x)[kChunk<T>], DType dtype) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(from.words[i]);
    } else {
      x[2 * i] = to_float(T{static_cast<uint16_t>(from.words[i])}, dtype);
      x[2 * i + 1] = to_float(T{static_cast<uint16_t>(from.words[i] >> 16)}, dtype);
    }
  }
}

template <class T>
__device__ __forceinline__ Bytes16 packed(const float (&x)[kChunk<T>], DType dtype) {
  Bytes16 to;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      to.words[i] = __float_as_uint(x[i]);
    else
      to.words[i] = pack(x[2 * i], x[2 * i + 1], dtype);
  }
  return to;
}

// Where neighbouring columns start; `count` of a chunk's are there.
struct Place {
  int b, c, count;
};

// Column n of a head's matrices, a multiple of the chunk.
template <class T>
__device__ __forceinline__ Place place_of(const SguArgs& p, int n) {
  const int left = p.columns - n, b = n / p.dim;
  return {b, n - b * p.dim, left <= 0 ? 0 : left < kChunk<T> ? left : kChunk<T>};
}

// A chunk's address, where all of it lies together.
template <class T>
__device__ __forceinline__ T* address(const SguArgs& p, const Activations& a, int head, int64_t token, const Place& w) {
  return reinterpret_cast<T*>(a.data) + static_cast<int64_t>(head) * p.dim + token * a.token + w.b * a.batch + w.c;
}

// Calls move(e, address) for each of a chunk's numbers that is there.
template <class T, class Move>
__device__ __forceinline__ void each_number(const SguArgs& p, const Activations& a, int head, int64_t token, Place w,
                                            Move move) {
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) {
    if (e < w.count) move(e, address<T>(p, a, head, token, w));
    if (++w.c == p.dim) w = {w.b + 1, 0, w.count};
  }
}

// A chunk; what is not there is zero.
template <class T>
__device__ __forceinline__ Bytes16 load_bytes(const SguArgs& p, const Activations& a, int head, int64_t token, const Place& w) {
  if (a.aligned && w.count) return *reinterpret_cast<const Bytes16*>(address<const T>(p, a, head, token, w));
  T numbers[kChunk<T>];
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) numbers[e] = T{};
  each_number<T>(p, a, head, token, w, [&](int e, const T* from) { numbers[e] = *from; });
  Bytes16 chunk;
  memcpy(&chunk, numbers, sizeof chunk);
  return chunk;
}

template <class T>
__device__ __forceinline__ void load(const SguArgs& p, const Activations& a, int head, int64_t token, const Place& w,
                                     float (&x)[kChunk<T>]) {
  unpack<T>(load_bytes<T>(p, a, head, token, w), x, p.dtype);
}

template <class T>
__device__ __forceinline__ void store(const SguArgs& p, const Activations& a, int head, int64_t token, const Place& w,
                                      const float (&x)[kChunk<T>]) {
  if (a.aligned && w.count) {
    *reinterpret_cast<Bytes16*>(address<T>(p, a, head, token, w)) = packed<T>(x, p.dtype);
  } else {
    each_number<T>(p, a, head, token, w, [&](int e, T* to) { *to = from_float<T>(x[e], p.dtype); });
  }
}

// Starts copying a chunk to shared memory; zeros if it is not `there`. The caller commits and waits.
template <class T>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const SguArgs& p, const Activations& a, int head, int64_t token,
                                           Place w, bool there) {
  if (!there) w.count = 0;
  if (a.aligned)
    ptx::cp_async16(to, w.count ? address<const T>(p, a, head, token, w) : reinterpret_cast<const T*>(a.data), w.count ? 16 : 0);
  else
    *reinterpret_cast<Bytes16*>(to) = load_bytes<T>(p, a, head, token, w);
}

void run_sgu_forward(const SguArgs& p, DType dtype, void* stream);
void run_sgu_mix_gradient(const SguArgs& p, void* stream);
void run_sgu_gate_gradient(const SguArgs& p, DType dtype, void* stream);
void run_sgu_weight_gradient(const SguArgs& p, DType dtype, int splits, void* stream);
constexpr int kMixGradientThreads = 256, kMixThreads = 4 * kWarp;  // of the products, whatever the type

// run<T>(...) for the type of the activations.
#define HIERKERNELS_SGU_DISPATCH(dtype, run, ...)                      \
  if (dtype == DType::kFloat32) return run<float>(__VA_ARGS__);        \
  return run<Number16>(__VA_ARGS__)

}  // namespace hierkernels::cuda
