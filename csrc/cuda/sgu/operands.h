// Operands of a warp's products from tiles in shared memory, whichever way round these lie: what products.h lacks.
#pragma once
#include "../common/products.h"

namespace hierkernels::cuda {

// A transposed operand of float32, number by number: word i is at row t + 4 (i / 2 of a, i % 2 of b) of the step and
// at column g + 8 (i % 2 of a, i / 2 of b).
template <int kStride>
__device__ __forceinline__ void load_words_by_column(Words<float, 4>& words, const unsigned char* tile, int column, int step,
                                                     bool left) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = left ? i / 2 : i % 2, side = left ? i % 2 : i / 2;
    const unsigned char* row = tile + (8 * step + lane % 4 + 4 * half) * kStride;
    split(words, i, reinterpret_cast<const float*>(row)[column + lane / 4 + 8 * side]);
  }
}

// 16 rows of the left operand, from `row` on: of a tile [rows][terms], or transposed [terms][rows]. Its numbers are W:
// T, or float32 that is rounded to it here.
template <class T, class W, bool kTransposed, int kStride>
__device__ __forceinline__ void load_left(Words<T, 4>& words, const unsigned char* tile, int row, int step) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(W) != sizeof(T)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + lane / 4 + i % 2 * 8, k = 16 * step + lane % 4 * 2 + i / 2 * 8;
      if constexpr (kTransposed) {
        const float* x = reinterpret_cast<const float*>(tile + k * kStride) + r;
        words.high[i] = ptx::pack<T>(x[0], x[kStride / 4]);
      } else {
        struct alignas(8) Pair {
          float x, y;
        };
        const Pair pair = *reinterpret_cast<const Pair*>(tile + r * kStride + 4 * k);
        words.high[i] = ptx::pack<T>(pair.x, pair.y);
      }
    }
  } else if constexpr (!kTransposed) {
    load_words(words, tile + (row + lane % 16) * kStride + step * kStepBytes + lane / 16 * 16);
  } else if constexpr (sizeof(T) == 4) {
    load_words_by_column<kStride>(words, tile, row, step, true);
  } else {
    ptx::ldmatrix_x4_trans(words.high, tile + (16 * step + lane / 16 * 8 + lane % 8) * kStride + 2 * (row + lane / 8 % 2 * 8));
  }
}

// 16 columns of the right operand, from `column` on, of a tile [terms][columns].
template <class T, int kStride>
__device__ __forceinline__ void load_right(Words<T, 4>& words, const unsigned char* tile, int column, int step) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 4)
    load_words_by_column<kStride>(words, tile, column, step, false);
  else
    ptx::ldmatrix_x4_trans(words.high, tile + (16 * step + lane % 16) * kStride + 2 * (column + lane / 16 * 8));
}

// sums += left right, over kSteps steps: 16 kM rows from `row` on, 8 kN columns from `column` on.
template <class T, class W, bool kTransposed, int kSteps, int kLeftStride, int kRightStride, int kM, int kN>
__device__ __forceinline__ void add_mixture(Sums<kM, kN>& sums, const unsigned char* left, int row,
                                            const unsigned char* right, int column) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Words<T, 4> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_left<T, W, kTransposed, kLeftStride>(a[m], left, row + 16 * m, step);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      Words<T, 4> b;  // of tiles n and n + 1
      load_right<T, kRightStride>(b, right, column + 8 * n, step);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply<T>(sums.x[m][n], a[m], b, 0);
        multiply<T>(sums.x[m][n + 1], a[m], b, 1);
      }
    }
  }
}

}  // namespace hierkernels::cuda
