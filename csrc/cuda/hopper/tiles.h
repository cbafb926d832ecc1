// Tiles in shared memory as tensor copies leave them and wgmma reads them, and products of a warpgroup with them.
//
// A tile of R rows lies in panels of 64 columns: a panel is R rows of 128 bytes, swizzled, and begins at a multiple of
// 1024 bytes. Sums are flat arrays: sums[4 n + 2 half + e] of a lane is row g + 8 half, column 8 n + 2 t + e.
#pragma once
#include "../common/ptx_hopper.h"
#include "../common/tile_copy.h"

namespace hierkernels::cuda {

constexpr int kGroupRows = 64;  // of sums that a warpgroup holds
constexpr int kStepColumns = 16;

// The warpgroup of the thread, in a form that the compiler knows to be the same in a whole warp: in code that might
// diverge it makes each wgmma wait for the one before.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

template <int kRows, int kDim>
struct Panels {
  static constexpr int kPanel = kRows * kSwizzleBytes, kCount = kDim * 2 / kSwizzleBytes, kBytes = kCount * kPanel;
};

// Starts copying a tile: the box at token `token` and head `head` (the first, if it has several) of batch `batch`.
template <class Tile>
__device__ __forceinline__ void copy_tile(unsigned char* to, const TensorMap& map, uint64_t* barrier, int batch,
                                          int head, int token) {
#pragma unroll
  for (int panel = 0; panel < Tile::kCount; ++panel)
    ptx::tensor_copy(to + panel * Tile::kPanel, &map, barrier, panel * 64, head, token, batch);
}

// sums = A B^T: A is the 64 rows from shared address `a` on in a tile of type A, B a tile of N rows. To be committed.
template <class T, int kDim, class A, class B, int kSums>
__device__ __forceinline__ void multiply_rows(float (&sums)[kSums], uint32_t a, uint32_t b) {
#pragma unroll
  for (int step = 0; step < kDim / kStepColumns; ++step) {
    const int panel = step / 4, bytes = step % 4 * 32;
    ptx::wgmma<false>(T(), sums, ptx::matrix_descriptor(a + panel * A::kPanel + bytes, 16, kPatternBytes),
                      ptx::matrix_descriptor(b + panel * B::kPanel + bytes, 16, kPatternBytes), step > 0);
  }
}

// sums += A B: A's rows are `words`, 16 of its columns each; B is a tile of as many rows as A has columns.
template <class T, class B, int kSteps, int kSums>
__device__ __forceinline__ void add_product(float (&sums)[kSums], const uint32_t (&words)[kSteps][4], uint32_t b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ptx::wgmma<true>(T(), sums, words[step],
                     ptx::matrix_descriptor(b + step * kStepColumns * kSwizzleBytes, B::kPanel, kPatternBytes), true);
}

// Sums rounded to T are the words of an operand as they are.
template <class T, int kSteps, int kSums>
__device__ __forceinline__ void round_sums(uint32_t (&words)[kSteps][4], const float (&sums)[kSums]) {
  static_assert(kSums == 8 * kSteps);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) words[step][i] = ptx::pack<T>(sums[8 * step + 2 * i], sums[8 * step + 2 * i + 1]);
}

// Stages that a producer fills and consumers empty, one after the other. `used` counts the uses of all stages so far.
template <int kStages>
struct Ring {
  uint64_t *full, *empty;

  __device__ static int stage(int used) { return used % kStages; }
  __device__ void initialise(int consumers, int producers = 1) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, producers);
      ptx::mbarrier_init(empty + s, consumers);
    }
  }
  // The producer's: the stage is free, at once at its first use.
  __device__ void wait_empty(int used) const { ptx::mbarrier_wait(empty + stage(used), (used / kStages + 1) % 2); }
  // ... and `bytes` are about to come.
  __device__ void begin_filling(int used, int bytes) const {
    wait_empty(used);
    ptx::mbarrier_arrive_expect_tx(full + stage(used), bytes);
  }
  __device__ void wait_full(int used) const { ptx::mbarrier_wait(full + stage(used), used / kStages % 2); }
  // A consuming warp's: all its lanes have read the stage.
  __device__ void release(int used) const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(empty + stage(used));
  }
};

// Stores two rows of a lane (row(0) and row(1) are their addresses, or null) of 2 kSums / 4 columns, each times its
// factor. Four lanes that share a row exchange words, so that each stores 16 bytes at a time.
template <class T, int kSums, class Row>
__device__ __forceinline__ void store_sums(const float (&sums)[kSums], const float (&factor)[2], Row row) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const to = row(half);
#pragma unroll
    for (int n0 = 0; n0 < kSums / 4; n0 += 4) {
      uint32_t words[4];  // of the columns 8 (n0 + i) + 2 t; then, of chunk n0 + t, those of lane i
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (n0 + i) + 2 * half;
        words[i] = ptx::pack<T>(sums[at] * factor[half], sums[at + 1] * factor[half]);
      }
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & bit) continue;
          uint32_t &low = words[i], &high = words[i + bit];
          const uint32_t other = __shfl_xor_sync(kAllLanes, t & bit ? low : high, bit);
          (t & bit ? low : high) = other;
        }
      if (to) *reinterpret_cast<Chunk*>(to + 8 * (n0 + t)) = {{words[0], words[1], words[2], words[3]}};
    }
  }
}

}  // namespace hierkernels::cuda
