// Tiles between global memory and the block's shared memory or a warp's registers.
#pragma once
#include <cstring>

#include "products.h"

namespace hierkernels::cuda {

// A (B, H, N, C) tensor with last stride 1.
struct Rows {
  unsigned char* data;           // null: absent
  int64_t batch, head, token;    // strides in elements
  int channels;
  bool aligned;                  // every row starts at a multiple of 16 bytes: cp.async can copy it
  bool paired;                   // ... at a multiple of two elements: they can be stored in twos
  DType dtype;

  template <class T>
  HIERKERNELS_ANYWHERE T* at(int b, int h, int64_t i) const {
    return reinterpret_cast<T*>(data) + b * batch + h * head + i * token;
  }
  static Rows of(const Tensor& t) {
    Rows r{static_cast<unsigned char*>(t.data), t.stride[0], t.stride[1], t.stride[2], static_cast<int>(t.size[3]), true, true, t.dtype};
    const uint64_t size = static_cast<uint64_t>(t.element_bytes());
    uint64_t offsets = reinterpret_cast<uint64_t>(t.data);
    for (int d = 0; d < 3; ++d)
      if (t.size[d] > 1) offsets |= static_cast<uint64_t>(t.stride[d]) * size;
    r.aligned = offsets % 16 == 0;
    r.paired = offsets % (2 * size) == 0;
    return r;
  }
};

struct alignas(16) Chunk {  // 16 bytes
  uint32_t words[4];
};

// Starts copying 16 bytes of a row, from `column` on: what is beyond its channels becomes zero, all of it for a null row.
template <class T>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const Rows& from, const T* row, int column) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  int count = row ? from.channels - column : 0;
  count = count < 0 ? 0 : count > kChunk ? kChunk : count;
  if (count) row += column;
  if (from.aligned) {
    // An address that may be given even if nothing is read there.
    ptx::cp_async16(to, count ? row : reinterpret_cast<const T*>(from.data), count * static_cast<int>(sizeof(T)));
  } else {
    T numbers[kChunk];
#pragma unroll
    for (int e = 0; e < kChunk; ++e) numbers[e] = e < count ? row[e] : T{};
    Chunk chunk;
    memcpy(&chunk, numbers, sizeof chunk);
    *reinterpret_cast<Chunk*>(to) = chunk;
  }
}

// Starts copying kRows rows of at most kColumns numbers into a tile; what is beyond them becomes zero. row(r) is the
// address of row r in global memory, or null for a row of zeros. `first` skips columns (a multiple of 16 bytes).
// The caller commits and waits.
template <class T, int kRows, int kColumns, int kThreads, class Row>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const Rows& from, Row row, int first = 0) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = kColumns / kChunk;
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, column = i % kChunks * kChunk;
    copy_chunk<T>(tile + r * Tile<T, kColumns>::kStride + column * static_cast<int>(sizeof(T)), from, row(r), first + column);
  }
}

// Stores 16 kM rows of 8 kN sums times `factor`, as T. row(m, half) is the address of the row 16 m + g + 8 half, or
// null; `first` is the column of the first sum.
template <class T, int kM, int kN, class Row>
__device__ __forceinline__ void store_rows(const Rows& to, const Sums<kM, kN>& sums, float factor, Row row, int first = 0) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* out = row(m, half);
      if (!out) continue;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int column = first + sums_column(n, 0);
        if (column >= to.channels) continue;
        const float x = sums.x[m][n][2 * half] * factor, y = sums.x[m][n][2 * half + 1] * factor;
        if (to.paired && column + 1 < to.channels) {
          if constexpr (sizeof(T) == 4) {
            struct alignas(8) Pair {
              float x, y;
            };
            *reinterpret_cast<Pair*>(out + column) = {x, y};
          } else {
            *reinterpret_cast<uint32_t*>(out + column) = pack(x, y, to.dtype);
          }
        } else {
          out[column] = from_float<T>(x, to.dtype);
          if (column + 1 < to.channels) out[column + 1] = from_float<T>(y, to.dtype);
        }
      }
    }
}

}  // namespace hierkernels::cuda
