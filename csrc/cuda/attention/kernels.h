// The attention kernels' entry points, and what their launches share.
#pragma once
#include "../common/launch.h"
#include "args.h"

namespace hierkernels::cuda {

void run_attention_forward(const AttentionArgs& p, DType dtype, void* stream);
void run_attention_query_gradient(const AttentionArgs& p, DType dtype, void* stream);
void run_attention_key_gradient(const AttentionArgs& p, DType dtype, void* stream);
void run_attention_bias_gradient(const AttentionArgs& p, DType dtype, void* stream);
int attention_bias_gradient_slices(const AttentionArgs& p);
// out and lse from the records of forward's blocks.
void run_attention_combine(const AttentionArgs& p, void* stream);
// delta = rowsum(out * dout) - dlse, where there is one.
void run_attention_delta(const Tensor& out, const Tensor& dout, const Tensor& dlse, const Tensor& delta, void* stream);

// Heads are computed as if they had 64, 128 or 256 channels; what is missing is zero.
inline int padded_channels(const AttentionArgs& p) {
  const int channels = p.q.channels > p.v.channels ? p.q.channels : p.v.channels;
  return channels <= 64 ? 64 : channels <= 128 ? 128 : 256;
}

// run<T, kDim>(...) for a type and a width.
#define HIERKERNELS_CUDA_DISPATCH(dtype, channels, run, ...)                  \
  const auto of_type = [&](auto type) {                                       \
    using T = decltype(type);                                                 \
    switch (channels) {                                                       \
      case 64:                                                                \
        return run<T, 64>(__VA_ARGS__);                                       \
      case 128:                                                               \
        return run<T, 128>(__VA_ARGS__);                                      \
      default:                                                                \
        return run<T, 256>(__VA_ARGS__);                                      \
    }                                                                         \
  };                                                                          \
  if (dtype == DType::kFloat32) return of_type(float{});                   \
  return of_type(Number16{})

// How many items share a tile of `rows` rows and `keys` keys: several only if all their keys are in that one tile.
inline int items_in_tile(const AttentionArgs& p, int rows, int keys) {
  const int by_rows = rows / p.rows_per_item, by_keys = keys / p.n_keys;
  const int n = by_rows < by_keys ? by_rows : by_keys;
  return n < 1 ? 1 : n;
}

// Blocks for tiles of `size` out of the `length` rows or keys of each item.
inline int64_t count_blocks(const AttentionArgs& p, int length, int size) {
  if (p.items_per_tile > 1) return (p.items + p.items_per_tile - 1) / p.items_per_tile;
  return static_cast<int64_t>((length + size - 1) / size) * p.items;
}

// The rows of a block, or of the blocks that share its keys: from row0 on, `last` is the last that there is.
struct TileOfRows {
  int item0, row0, last;
};

template <int kRows>
__device__ __forceinline__ TileOfRows tile_of_rows(const AttentionArgs& p, int number) {
  if (p.items_per_tile > 1) return {number * p.items_per_tile, 0, 0};
  const int tiles = (p.rows_per_item + kRows - 1) / kRows;
  // The last rows of a causal range have the most keys: they start first.
  const int row0 = (tiles - 1 - number % tiles) * kRows;
  const int end = row0 + kRows < p.rows_per_item ? row0 + kRows : p.rows_per_item;
  return {number / tiles, row0, end - 1};
}

// The keys of a block.
struct TileOfKeys {
  int item0, key0, last;
};

template <int kKeys>
__device__ __forceinline__ TileOfKeys tile_of_keys(const AttentionArgs& p) {
  if (p.items_per_tile > 1) return {static_cast<int>(blockIdx.x) * p.items_per_tile, 0, 0};
  const int tiles = (p.n_keys + kKeys - 1) / kKeys;
  const int key0 = static_cast<int>(blockIdx.x) % tiles * kKeys;
  const int end = key0 + kKeys < p.n_keys ? key0 + kKeys : p.n_keys;
  return {static_cast<int>(blockIdx.x) / tiles, key0, end - 1};
}

}  // namespace hierkernels::cuda
