// Products of matrices by one warp: operands in shared memory or in registers, sums in registers.
//
// 16-bit numbers are multiplied by mma.m16n8k16. Of float32 each number is split into two of tf32, and three
// products of these keep its 22 upper bits; each step's sum is added in float32, as tensor cores cut sums off.
#pragma once
#include "../../common/anywhere.h"
#include "numbers.h"

namespace hierkernels::cuda {

// A tile in shared memory: rows of kColumns numbers, and 16 bytes so that neighbouring rows are in other banks.
template <class T, int kColumns>
struct Tile {
  static constexpr int kStride = kColumns * static_cast<int>(sizeof(T)) + 16;  // bytes
  HIERKERNELS_ANYWHERE static constexpr int bytes(int rows) { return rows * kStride; }
};

constexpr int kStepBytes = 32;  // of a row that one product takes: 16 16-bit numbers, 8 float32

// kM x kN tiles of 16 x 8 sums. Of tile (m, n) a lane holds, with g = lane / 4 and t = lane % 4, the elements
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <int kM, int kN>
struct Sums {
  float x[kM][kN][4];
};

template <int kM, int kN>
__device__ __forceinline__ void clear(Sums<kM, kN>& sums) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.x[m][n][e] = 0.f;
}

// The row of element e of tile m, and its column in tile n.
__device__ __forceinline__ int sums_row(int m, int e) { return 16 * m + static_cast<int>(threadIdx.x % kWarp) / 4 + 8 * (e / 2); }
__device__ __forceinline__ int sums_column(int n, int e) { return 8 * n + static_cast<int>(threadIdx.x % 4) * 2 + e % 2; }

// An operand's words, for float32 in two parts.
template <class T, int kWords>
struct Words {
  uint32_t high[kWords];
};
template <int kWords>
struct Words<float, kWords> {
  uint32_t high[kWords], low[kWords];
};

template <int kWords>
__device__ __forceinline__ void split(Words<float, kWords>& words, int i, float x) {
  words.high[i] = ptx::to_tf32(x);
  words.low[i] = ptx::to_tf32(x - __uint_as_float(words.high[i]));
}

// d += a b for one step; b0 and b1 are the words of b, of which b may hold several pairs.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Words<T, 4>& a, const Words<T, 4>& b, int pair) {
  if constexpr (sizeof(T) == 4) {
    float step[4] = {0.f, 0.f, 0.f, 0.f};
    ptx::mma_tf32(step, a.low, b.high[2 * pair], b.high[2 * pair + 1]);
    ptx::mma_tf32(step, a.high, b.low[2 * pair], b.low[2 * pair + 1]);
    ptx::mma_tf32(step, a.high, b.high[2 * pair], b.high[2 * pair + 1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] += step[e];
  } else {
    ptx::mma(T(), d, a.high, b.high[2 * pair], b.high[2 * pair + 1]);
  }
}

template <class T>
__device__ __forceinline__ void load_words(Words<T, 4>& words, const unsigned char* address) {
  ptx::ldmatrix_x4(words.high, address);
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(words, i, __uint_as_float(words.high[i]));
  }
}

template <class T, int kSteps, int kStride, int kM, int kN>
__device__ __forceinline__ void add_typed_product_of_rows(Sums<kM, kN>& sums, const unsigned char* a, const unsigned char* b) {
  static_assert(kN % 2 == 0);
  const int lane = threadIdx.x % kWarp;
  a += lane % 16 * kStride + lane / 16 * 16;
  b += (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 16;
// Unrolled, the many instructions of float32 would ask for more registers than there are.
#pragma unroll(sizeof(T) == 4 ? 1 : kSteps)
  for (int step = 0; step < kSteps; ++step) {
    Words<T, 4> left[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_words(left[m], a + 16 * m * kStride + step * kStepBytes);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      Words<T, 4> right;  // of tiles n and n + 1
      load_words(right, b + 8 * n * kStride + step * kStepBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply<T>(sums.x[m][n], left[m], right, 0);
        multiply<T>(sums.x[m][n + 1], left[m], right, 1);
      }
    }
  }
}

// sums += A B^T over kSteps steps along the rows: A's 16 kM rows from `a` on, B's 8 kN rows from `b` on, both tiles
// in shared memory with rows of kStride bytes. kN is even.
template <class T, int kSteps, int kStride, int kM, int kN>
__device__ __forceinline__ void add_product_of_rows(Sums<kM, kN>& sums, const unsigned char* a, const unsigned char* b,
                                                    DType dtype) {
  with_type<T>(dtype, [&](auto type) { add_typed_product_of_rows<decltype(type), kSteps, kStride>(sums, a, b); });
}

// A's sums have the layout of an operand already: of 16-bit numbers as they are, of float32 with the columns in
// another order (2t where the operand has t, 2t + 1 where it has t + 4), which B's rows then follow.
template <class T, int kStride, int kM, int kK, int kN>
__device__ __forceinline__ void add_typed_product_of_sums(Sums<kM, kN>& sums, const Sums<kM, kK>& a, const unsigned char* b) {
  static_assert(kK % 2 == 0 && kN % 2 == 0);
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 4) {
    const float* rows = reinterpret_cast<const float*>(b + lane % 4 * 2 * kStride) + lane / 4;
    constexpr int kRow = kStride / 4;
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      Words<T, 4> left[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) split(left[m], i, a.x[m][k][i % 2 * 2 + i / 2]);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        Words<T, 4> right;
#pragma unroll
        for (int i = 0; i < 4; ++i) split(right, i, rows[(8 * k + i % 2) * kRow + 8 * (n + i / 2)]);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply<T>(sums.x[m][n], left[m], right, 0);
          multiply<T>(sums.x[m][n + 1], left[m], right, 1);
        }
      }
    }
  } else {
    b += lane % 16 * kStride + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kK; k += 2) {
      Words<T, 4> left[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          left[m].high[i] = ptx::pack<T>(a.x[m][k + i / 2][i % 2 * 2], a.x[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        Words<T, 4> right;
        ptx::ldmatrix_x4_trans(right.high, b + 8 * k * kStride + 8 * n * static_cast<int>(sizeof(T)));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply<T>(sums.x[m][n], left[m], right, 0);
          multiply<T>(sums.x[m][n + 1], left[m], right, 1);
        }
      }
    }
  }
}

// sums += A B: A is `a` rounded to T, 16 kM rows of 8 kK columns; B's 8 kK rows from `b` on, 8 kN columns.
template <class T, int kStride, int kM, int kK, int kN>
__device__ __forceinline__ void add_product_of_sums(Sums<kM, kN>& sums, const Sums<kM, kK>& a, const unsigned char* b,
                                                    DType dtype) {
  with_type<T>(dtype, [&](auto type) { add_typed_product_of_sums<decltype(type), kStride>(sums, a, b); });
}

}  // namespace hierkernels::cuda
