// The triangular product that forward and the gate's gradient share: a tile of rows (of a bucket) and columns (of a
// head), of the weight, or of its transpose, times activations.
//
// Both arrive by cp.async, some tiles ahead. A copy of the weight ends at the diagonal: the future is not read, zeros
// take its place. Weights in float32 are rounded to the type of the activations on their way to the registers.
#pragma once
#include "args.h"
#include "operands.h"

namespace hierkernels::cuda {

// Four warps, 2 x 2; the more of the registers are sums, the fewer are the loads of operands. Two blocks fit an SM.
template <class T>
struct MixShape {
  static constexpr int kM = sizeof(T) == 4 ? 2 : 4, kN = 8;  // of a warp, in tiles of 16 x 8
  static constexpr int kWarpRows = 2, kWarpColumns = 2, kThreads = kWarp * kWarpRows * kWarpColumns;
  static_assert(kThreads == kMixThreads);
  static constexpr int kRows = 16 * kM * kWarpRows, kColumns = 8 * kN * kWarpColumns;
  static constexpr int kTerms = 64 / static_cast<int>(sizeof(T));  // two steps
};

// Tiles of weights W (T or float) and activations T in shared memory.
template <class T, class W, bool kTransposed>
struct MixTiles {
  using S = MixShape<T>;
  using Right = Tile<T, S::kColumns>;
  static constexpr bool kRounded = sizeof(W) != sizeof(T);
  static constexpr int kStages = kRounded ? 2 : 3;
  static constexpr int kLeftRows = kTransposed ? S::kTerms : S::kRows, kLeftColumns = kTransposed ? S::kRows : S::kTerms;
  // Rows that are read in pairs of float32 keep out of each other's banks with 32 bytes between them.
  static constexpr int kLeftStride = Tile<W, kLeftColumns>::kStride + (kRounded && !kTransposed ? 16 : 0);
  static constexpr int kLeftBytes = kLeftStride * kLeftRows, kStageBytes = kLeftBytes + Right::kStride * S::kTerms;
  static constexpr int kBytes = kStages * kStageBytes;
  // Chunks of a tile that one thread copies.
  static constexpr int kLeftChunks = kLeftRows * kLeftColumns / kChunk<W> / S::kThreads;
  static constexpr int kRightChunks = S::kTerms * S::kColumns / kChunk<T> / S::kThreads;
  static_assert(kLeftChunks * kChunk<W> * S::kThreads == kLeftRows * kLeftColumns);
  static_assert(kRightChunks * kChunk<T> * S::kThreads == S::kTerms * S::kColumns);
  // A thread's chunks have the same columns.
  static_assert(S::kThreads % (kLeftColumns / kChunk<W>) == 0 && S::kThreads % (S::kColumns / kChunk<T>) == 0);
};

template <class T, bool kTransposed>
struct Mixing {
  using S = MixShape<T>;
  static constexpr int kEpilogueStride = (8 * S::kN + 8) * static_cast<int>(sizeof(float));  // of a warp's 16 rows
  static constexpr int kEpilogue = S::kThreads / kWarp * 16 * kEpilogueStride;

  static int shared_bytes(bool wide) {
    const int tiles = wide ? MixTiles<T, float, kTransposed>::kBytes : MixTiles<T, T, kTransposed>::kBytes;
    return tiles > kEpilogue ? tiles : kEpilogue;
  }

  // Terms that are summed in one go: activations of one bucket, and the part of the weight that goes with them.
  struct Part {
    int k0, end;      // terms, in tokens of that bucket; those from `end` on are none
    int64_t token0;   // its first token
    int64_t column0;  // of the weight
    bool triangle;    // the own bucket's
  };

  // This block's tile.
  struct Block {
    int head, bucket, row0, column0;
    int n_rows;  // tokens of the bucket
    __device__ __forceinline__ int64_t first(const SguArgs& p) const { return static_cast<int64_t>(bucket) * p.size; }
  };

  static __device__ __forceinline__ Block block_of(const SguArgs& p) {
    const int column_tiles = (p.columns + S::kColumns - 1) / S::kColumns, row_tiles = (p.size + S::kRows - 1) / S::kRows;
    Block b;
    unsigned rest = blockIdx.x;
    b.column0 = static_cast<int>(rest % column_tiles) * S::kColumns;
    rest /= column_tiles;
    b.bucket = static_cast<int>(rest % p.buckets);
    rest /= p.buckets;
    // The longest sums first: forward's are those of the last rows, the transpose's those of the first.
    const int tile = static_cast<int>(rest % row_tiles);
    b.row0 = (kTransposed ? tile : row_tiles - 1 - tile) * S::kRows;
    b.head = static_cast<int>(rest / row_tiles);
    const int64_t left = p.tokens - b.first(p);
    b.n_rows = left < p.size ? static_cast<int>(left) : p.size;
    return b;
  }
  static int64_t blocks(const SguArgs& p) {
    return static_cast<int64_t>(p.heads) * p.buckets * ((p.size + S::kRows - 1) / S::kRows) *
           ((p.columns + S::kColumns - 1) / S::kColumns);
  }

  static __device__ __forceinline__ int tiles_of(int terms) { return terms > 0 ? (terms + S::kTerms - 1) / S::kTerms : 0; }

  // How many tokens of the own bucket are summed, and of the other: of the one before, or, transposed, of the next.
  struct Lengths {
    int own, other;
  };
  static __device__ __forceinline__ Lengths lengths_of(const SguArgs& p, const Block& b) {
    if constexpr (!kTransposed) {
      const int end = b.row0 + S::kRows;
      return {end < b.n_rows ? end : b.n_rows, p.look_back && b.bucket > 0 ? p.size : 0};
    } else {
      const int64_t next = p.tokens - b.first(p) - p.size;
      return {b.n_rows - b.row0, !p.look_back || next <= 0 ? 0 : next < p.size ? static_cast<int>(next) : p.size};
    }
  }
  static __device__ __forceinline__ Part part_of(const SguArgs& p, const Block& b, const Lengths& lengths, int tile) {
    const int begin = kTransposed ? b.row0 : 0, own_tiles = tiles_of(lengths.own);
    if (tile < own_tiles) return {begin + tile * S::kTerms, begin + lengths.own, b.first(p), p.own, true};
    return {(tile - own_tiles) * S::kTerms, lengths.other, b.first(p) + (kTransposed ? p.size : -p.size), 0, false};
  }

  // Starts copying this thread's part of a tile of the weight.
  template <class W>
  static __device__ __forceinline__ void copy_weight(const SguArgs& p, const Block& b, const Part& part, unsigned char* tile) {
    using M = MixTiles<T, W, kTransposed>;
    constexpr int kAcross = M::kLeftColumns / kChunk<W>;
    const int column = (kTransposed ? b.row0 : part.k0) + static_cast<int>(threadIdx.x) % kAcross * kChunk<W>;
    const int rows = kTransposed ? part.end : b.n_rows, columns = kTransposed ? b.n_rows : part.end;
    const W* const head = reinterpret_cast<const W*>(p.weight.data) + b.head * p.weight.head + part.column0 + column;
#pragma unroll 4  // of all, addresses would take more registers than there are
    for (int i = 0; i < M::kLeftChunks; ++i) {
      const int r = static_cast<int>(threadIdx.x) / kAcross + i * (S::kThreads / kAcross);
      const int row = (kTransposed ? part.k0 : b.row0) + r;
      int count = (part.triangle ? row + 1 : columns) - column;  // of the chunk's numbers, those that are seen
      count = row >= rows || count < 0 ? 0 : count > kChunk<W> ? kChunk<W> : count;
      const W* from = head + row * p.weight.row;
      unsigned char* to = tile + r * M::kLeftStride + static_cast<int>(threadIdx.x) % kAcross * 16;
      if (p.weight.aligned) {
        // An address that may be given even if nothing is read there.
        ptx::cp_async16(to, count ? from : reinterpret_cast<const W*>(p.weight.data), count * static_cast<int>(sizeof(W)));
      } else {
        *reinterpret_cast<Bytes16*>(to) = gather(from, count);
      }
    }
  }

  // The first `count` numbers from an address on, and zeros.
  template <class W>
  static __device__ __forceinline__ Bytes16 gather(const W* from, int count) {
    W numbers[kChunk<W>];
#pragma unroll
    for (int e = 0; e < kChunk<W>; ++e) numbers[e] = e < count ? from[e] : W{};
    Bytes16 chunk;
    memcpy(&chunk, numbers, sizeof chunk);
    return chunk;
  }

  template <class W>
  static __device__ __forceinline__ void copy_activations(const SguArgs& p, const Activations& from, const Block& b,
                                                          const Part& part, const Place& place, unsigned char* tile) {
    using M = MixTiles<T, W, kTransposed>;
    constexpr int kAcross = S::kColumns / kChunk<T>;
#pragma unroll 2
    for (int i = 0; i < M::kRightChunks; ++i) {
      const int r = static_cast<int>(threadIdx.x) / kAcross + i * (S::kThreads / kAcross), k = part.k0 + r;
      copy_chunk<T>(tile + r * M::Right::kStride + static_cast<int>(threadIdx.x) % kAcross * 16, p, from, b.head,
                    part.token0 + k, place, k < part.end);
    }
  }

  template <class W>
  static __device__ __forceinline__ void multiply_tiles(const SguArgs& p, const Activations& from, const Block& b,
                                                        Sums<S::kM, S::kN>& sums) {
    using M = MixTiles<T, W, kTransposed>;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warp_row = warp / S::kWarpColumns * 16 * S::kM, warp_column = warp % S::kWarpColumns * 8 * S::kN;
    const bool needed = b.row0 + warp_row < b.n_rows && b.column0 + warp_column < p.columns;
    const Place place = place_of<T>(p, b.column0 + static_cast<int>(threadIdx.x) % (S::kColumns / kChunk<T>) * kChunk<T>);
    const Lengths lengths = lengths_of(p, b);
    const int tiles = tiles_of(lengths.own) + tiles_of(lengths.other);
    const auto start_copy = [&](int t) {
      if (t < tiles) {
        const Part part = part_of(p, b, lengths, t);
        unsigned char* const stage = shared_memory() + t % M::kStages * M::kStageBytes;
        copy_weight<W>(p, b, part, stage);
        copy_activations<W>(p, from, b, part, place, stage + M::kLeftBytes);
      }
      ptx::cp_async_commit();  // perhaps empty: the groups are counted
    };

    clear(sums);
#pragma unroll 1
    for (int t = 0; t < M::kStages - 1; ++t) start_copy(t);
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      ptx::cp_async_wait<M::kStages - 2>();
      __syncthreads();  // tile t is there, and all have done with tile t - 1
      start_copy(t + M::kStages - 1);
      const Part part = part_of(p, b, lengths, t);
      const int first = b.row0 + warp_row;
      const bool hidden = part.triangle && (kTransposed ? part.k0 + S::kTerms <= first : part.k0 >= first + 16 * S::kM);
      const unsigned char* const stage = shared_memory() + t % M::kStages * M::kStageBytes;
      if (needed && !hidden)
        with_type<T>(p.dtype, [&](auto type) {
          constexpr int kSteps = S::kTerms * static_cast<int>(sizeof(T)) / kStepBytes;
          add_mixture<decltype(type), W, kTransposed, kSteps, M::kLeftStride, M::Right::kStride>(
              sums, stage, warp_row, stage + M::kLeftBytes, warp_column);
        });
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // The sums of this thread's warp; then shared memory is free again.
  static __device__ __forceinline__ void multiply(const SguArgs& p, const Activations& from, const Block& b,
                                                  Sums<S::kM, S::kN>& sums) {
    if constexpr (sizeof(T) == 2) {
      if (!p.weight.wide) return multiply_tiles<T>(p, from, b, sums);
    }
    multiply_tiles<float>(p, from, b, sums);
  }

  // Calls finish(row of the bucket, place of its columns, sums) for the chunks of this warp's sums, which pass through
  // shared memory so that a lane has neighbouring columns.
  template <class Finish>
  static __device__ __forceinline__ void for_chunks(const SguArgs& p, const Block& b, const Sums<S::kM, S::kN>& sums,
                                                    Finish finish) {
    constexpr int kAcross = 8 * S::kN / kChunk<T>, kRowsAtOnce = kWarp / kAcross;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    const int warp_row = warp / S::kWarpColumns * 16 * S::kM, warp_column = warp % S::kWarpColumns * 8 * S::kN;
    unsigned char* const tile = shared_memory() + warp * 16 * kEpilogueStride;
    const Place place = place_of<T>(p, b.column0 + warp_column + lane % kAcross * kChunk<T>);
#pragma unroll
    for (int m = 0; m < S::kM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          reinterpret_cast<float*>(tile + sums_row(0, e) * kEpilogueStride)[sums_column(n, e)] = sums.x[m][n][e];
      __syncwarp();
#pragma unroll 1
      for (int r = lane / kAcross; r < 16; r += kRowsAtOnce) {
        const int row = b.row0 + warp_row + 16 * m + r;
        if (row >= b.n_rows || place.count == 0) continue;
        float x[kChunk<T>];
#pragma unroll
        for (int c = 0; c < kChunk<T>; c += 4) {
          const Bytes16 four = *reinterpret_cast<const Bytes16*>(tile + r * kEpilogueStride + (lane % kAcross * kChunk<T> + c) * 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) x[c + e] = __uint_as_float(four.words[e]);
        }
        finish(row, place, x);
      }
      __syncwarp();
    }
  }
};

}  // namespace hierkernels::cuda
