// The triangular product that forward and the gate's gradient share: a tile of rows (of a bucket) and columns (of a
// head), of the weight, or of its transpose, times activations.
//
// Activations arrive by cp.async, two tiles ahead. Weights pass through registers, one tile ahead: there they are
// cut at the diagonal, so that the future is not read, and rounded to the type of the activations.
#pragma once
#include "args.h"
#include "operands.h"

namespace hierkernels::cuda {

template <class T>
struct MixShape {
  static constexpr int kM = 2, kN = sizeof(T) == 4 ? 4 : 8;  // of a warp, in tiles of 16 x 8
  static constexpr int kWarpRows = 4, kWarpColumns = 2;      // warps: the left operand is the larger one to load
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;
  static constexpr int kRows = 16 * kM * kWarpRows, kColumns = 8 * kN * kWarpColumns;
  static constexpr int kTerms = 64 / static_cast<int>(sizeof(T));  // two steps
  static constexpr int kStages = 3;
};

template <class T, bool kTransposed>
struct Mixing {
  using S = MixShape<T>;
  using Right = Tile<T, S::kColumns>;
  static constexpr int kLeftRows = kTransposed ? S::kTerms : S::kRows, kLeftColumns = kTransposed ? S::kRows : S::kTerms;
  using Left = Tile<T, kLeftColumns>;
  static constexpr int kLeftBytes = Left::bytes(kLeftRows), kRightBytes = Right::bytes(S::kTerms);
  static constexpr int kEpilogueStride = (8 * S::kN + 8) * static_cast<int>(sizeof(float));  // of a warp's 16 rows
  static constexpr int kEpilogue = S::kThreads / kWarp * 16 * kEpilogueStride;
  static constexpr int kPipeline = 2 * kLeftBytes + S::kStages * kRightBytes;
  static constexpr int kShared = kPipeline > kEpilogue ? kPipeline : kEpilogue;
  // Chunks of a tile that one thread moves.
  static constexpr int kLeftChunks = kLeftRows * kLeftColumns / kChunk<T> / S::kThreads;
  static constexpr int kRightChunks = S::kTerms * S::kColumns / kChunk<T> / S::kThreads;
  static_assert(kLeftChunks * kChunk<T> * S::kThreads == kLeftRows * kLeftColumns);
  static_assert(kRightChunks * kChunk<T> * S::kThreads == S::kTerms * S::kColumns);

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
    int64_t first;
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
    b.first = static_cast<int64_t>(b.bucket) * p.size;
    const int64_t left = p.tokens - b.first;
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
      const int64_t next = p.tokens - b.first - p.size;
      return {b.n_rows - b.row0, !p.look_back || next <= 0 ? 0 : next < p.size ? static_cast<int>(next) : p.size};
    }
  }
  static __device__ __forceinline__ Part part_of(const SguArgs& p, const Block& b, const Lengths& lengths, int tile) {
    const int begin = kTransposed ? b.row0 : 0, own_tiles = tiles_of(lengths.own);
    if (tile < own_tiles) return {begin + tile * S::kTerms, begin + lengths.own, b.first, p.own, true};
    return {(tile - own_tiles) * S::kTerms, lengths.other, b.first + (kTransposed ? p.size : -p.size), 0, false};
  }

  // A thread's chunks of the weight on their way: as they were read, wide or not.
  struct Fetched {
    uint32_t words[kLeftChunks][kChunk<T>];
  };

  // The weight's row and column (without column0) of chunk i of this thread, and how many of its numbers are seen.
  struct Span {
    int row, column, count;
  };
  static __device__ __forceinline__ Span span_of(const Block& b, const Part& part, int i) {
    constexpr int kAcross = kLeftColumns / kChunk<T>;
    const int index = static_cast<int>(threadIdx.x) + i * S::kThreads;
    const int row = (kTransposed ? part.k0 : b.row0) + index / kAcross;
    const int column = (kTransposed ? b.row0 : part.k0) + index % kAcross * kChunk<T>;
    const int rows = kTransposed ? part.end : b.n_rows, columns = kTransposed ? b.n_rows : part.end;
    int count = (part.triangle ? row + 1 : columns) - column;
    count = row >= rows || count < 0 ? 0 : count > kChunk<T> ? kChunk<T> : count;
    return {row, column, count};
  }

  static __device__ __forceinline__ void fetch(const SguArgs& p, const Block& b, const Part& part, Fetched& f) {
    const int64_t head = b.head * p.weight.head + part.column0;
#pragma unroll
    for (int i = 0; i < kLeftChunks; ++i) {
      const Span s = span_of(b, part, i);
      const int64_t at = head + s.row * p.weight.row + s.column;
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) f.words[i][e] = 0;
      if (p.weight.wide) {
        const float* from = reinterpret_cast<const float*>(p.weight.data) + at;
        if (p.weight.aligned && s.count == kChunk<T>) {
#pragma unroll
          for (int e = 0; e < kChunk<T>; e += 4) {
            const Bytes16 x = *reinterpret_cast<const Bytes16*>(from + e);
#pragma unroll
            for (int n = 0; n < 4; ++n) f.words[i][e + n] = x.words[n];
          }
        } else {
#pragma unroll
          for (int e = 0; e < kChunk<T>; ++e)
            if (e < s.count) f.words[i][e] = __float_as_uint(from[e]);
        }
      } else {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(p.weight.data) + at;
        if (p.weight.aligned && s.count == kChunk<T>) {
          const Bytes16 x = *reinterpret_cast<const Bytes16*>(from);
#pragma unroll
          for (int n = 0; n < 4; ++n) f.words[i][n] = x.words[n];
        } else {
#pragma unroll
          for (int e = 0; e < kChunk<T>; ++e)
            if (e < s.count) f.words[i][e / 2] |= static_cast<uint32_t>(from[e]) << e % 2 * 16;
        }
      }
    }
  }

  static __device__ __forceinline__ void put(const SguArgs& p, const Fetched& f, unsigned char* tile) {
    constexpr int kAcross = kLeftColumns / kChunk<T>;
#pragma unroll
    for (int i = 0; i < kLeftChunks; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * S::kThreads;
      Bytes16 chunk;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        chunk.words[n] = f.words[i][n];
        if constexpr (sizeof(T) == 2)
          if (p.weight.wide)
            chunk.words[n] = ptx::pack<T>(__uint_as_float(f.words[i][2 * n]), __uint_as_float(f.words[i][2 * n + 1]));
      }
      *reinterpret_cast<Bytes16*>(tile + index / kAcross * Left::kStride + index % kAcross * 16) = chunk;
    }
  }

  static __device__ __forceinline__ void copy(const SguArgs& p, const Activations& from, const Block& b, const Part& part,
                                              const Place (&places)[kRightChunks], unsigned char* tile) {
    constexpr int kAcross = S::kColumns / kChunk<T>;
#pragma unroll
    for (int i = 0; i < kRightChunks; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * S::kThreads;
      const int k = part.k0 + index / kAcross;
      copy_chunk<T>(tile + index / kAcross * Right::kStride + index % kAcross * 16, p, from, b.head, part.token0 + k,
                    places[i], k < part.end);
    }
  }

  // The sums of this thread's warp; then shared memory is free again.
  static __device__ __forceinline__ void multiply_tiles(const SguArgs& p, const Activations& from, const Block& b,
                                                        Sums<S::kM, S::kN>& sums) {
    unsigned char* const left = shared_memory();
    unsigned char* const right = left + 2 * kLeftBytes;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warp_row = warp / S::kWarpColumns * 16 * S::kM, warp_column = warp % S::kWarpColumns * 8 * S::kN;
    const bool needed = b.row0 + warp_row < b.n_rows && b.column0 + warp_column < p.columns;
    Place places[kRightChunks];
#pragma unroll
    for (int i = 0; i < kRightChunks; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * S::kThreads;
      places[i] = place_of<T>(p, b.column0 + index % (S::kColumns / kChunk<T>) * kChunk<T>);
    }
    const Lengths lengths = lengths_of(p, b);
    const int tiles = tiles_of(lengths.own) + tiles_of(lengths.other);
    const auto start_copy = [&](int t) {
      if (t < tiles) copy(p, from, b, part_of(p, b, lengths, t), places, right + t % S::kStages * kRightBytes);
      ptx::cp_async_commit();  // perhaps empty: the groups are counted
    };

    clear(sums);
    Fetched fetched;
    fetch(p, b, part_of(p, b, lengths, 0), fetched);
    for (int t = 0; t < S::kStages - 1; ++t) start_copy(t);
    put(p, fetched, left);
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      ptx::cp_async_wait<S::kStages - 2>();
      __syncthreads();  // tile t is there, and all have done with tile t - 1
      if (t + 1 < tiles) fetch(p, b, part_of(p, b, lengths, t + 1), fetched);
      start_copy(t + S::kStages - 1);
      const Part part = part_of(p, b, lengths, t);
      const int first = b.row0 + warp_row;
      const bool hidden = part.triangle && (kTransposed ? part.k0 + S::kTerms <= first : part.k0 >= first + 16 * S::kM);
      if (needed && !hidden)
        add_mixture<T, kTransposed, S::kTerms * static_cast<int>(sizeof(T)) / kStepBytes, Left::kStride, Right::kStride>(
            sums, left + t % 2 * kLeftBytes, warp_row, right + t % S::kStages * kRightBytes, warp_column);
      if (t + 1 < tiles) put(p, fetched, left + (t + 1) % 2 * kLeftBytes);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
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
