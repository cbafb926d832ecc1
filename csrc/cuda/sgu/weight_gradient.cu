// dweight: products of the rows of dmix with those of the gate over channels, batch entries and buckets. A block
// computes a tile of a head's weight, over a part of the (bucket, batch entry) items; tiles that nobody reads are
// zero, and so is what lies above the diagonal.
#include "args.h"
#include "weight_shape.h"

namespace hierkernels::cuda {
namespace {

// This block's tile. The columns of the look-back, or those that nobody reads, come before the own ones.
struct Block {
  int head, split, row0, column0;
  bool own;
};

template <class T>
__device__ __forceinline__ Block block_of(const SguArgs& p) {
  const int tiles = (p.width + WeightShape<T>::kSize - 1) / WeightShape<T>::kSize, halves = p.own > 0 ? 2 : 1;
  unsigned rest = blockIdx.x;
  const int column = static_cast<int>(rest % (tiles * halves));
  rest /= tiles * halves;
  const int row0 = static_cast<int>(rest % tiles) * WeightShape<T>::kSize;
  rest /= tiles;
  return {static_cast<int>(rest % p.heads), static_cast<int>(rest / p.heads), row0, column % tiles * WeightShape<T>::kSize,
          column / tiles == halves - 1};
}

// Channels of an item: what one step of the pipeline reads.
struct Position {
  int bucket, b, c0;
  template <int kTerms>
  __device__ __forceinline__ void advance(const SguArgs& p) {
    c0 += kTerms;
    if (c0 < p.dim) return;
    c0 = 0;
    if (++b < p.batch) return;
    b = 0;
    ++bucket;
  }
};

template <class T>
__device__ __forceinline__ void copy_rows(const SguArgs& p, const Activations& from, const Block& block, const Position& at,
                                          int row0, int64_t token0, int n_rows, unsigned char* tile) {
  using S = WeightShape<T>;
  constexpr int kAcross = S::kTerms / kChunk<T>, kChunks = S::kSize * kAcross / S::kThreads;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * S::kThreads;
    const int row = row0 + index / kAcross, c = at.c0 + index % kAcross * kChunk<T>, left = p.dim - c;
    const Place place{at.b, c, left < 0 ? 0 : left < kChunk<T> ? left : kChunk<T>};
    copy_chunk<T>(tile + index / kAcross * S::TileT::kStride + index % kAcross * 16, p, from, block.head, token0 + row, place,
                  row < n_rows);
  }
}

template <class T>
__device__ __forceinline__ void copy_step(const SguArgs& p, const Block& block, const Position& at, unsigned char* stage) {
  const int64_t first = static_cast<int64_t>(at.bucket) * p.size, left = p.tokens - first;
  const int n_rows = left < p.size ? static_cast<int>(left) : p.size;
  copy_rows<T>(p, p.dmix, block, at, block.row0, first, n_rows, stage);
  copy_rows<T>(p, p.gate, block, at, block.column0, block.own ? first : first - p.size, block.own ? n_rows : p.size,
               stage + WeightShape<T>::kTileBytes);
}

// A row's numbers at an even column of the tile: `x`, and `y` if that column is there.
template <class T>
__device__ __forceinline__ void store_pair(const SguArgs& p, int64_t at, float x, float y, bool both) {
  const auto store = [&](auto type) {
    using Result = decltype(type);
    Result* to = reinterpret_cast<Result*>(p.dweight) + at;
    to[0] = from_float<Result>(x, p.dtype);
    if (both) to[1] = from_float<Result>(y, p.dtype);
  };
  if (p.dweight_wide)
    store(float{});
  else
    store(T{});
}

template <class T>
__device__ __forceinline__ void compute(const SguArgs& p) {
  using S = WeightShape<T>;
  const Block block = block_of<T>(p);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp / S::kWarpColumns * 16 * S::kM, warp_column = warp % S::kWarpColumns * 8 * S::kN;
  const int row0 = block.row0 + warp_row, column0 = block.column0 + warp_column;

  const int items = p.batch * p.buckets;
  int begin = block.split * p.items_of_split, end = begin + p.items_of_split;
  end = end < items ? end : items;
  if (!block.own && begin < p.batch) begin = p.batch;  // the first bucket looks back at none
  const bool read = block.own ? block.column0 <= block.row0 : p.look_back;
  const bool inside = block.row0 < p.size && block.column0 < p.size;
  const int steps = read && inside && begin < end ? (end - begin) * ((p.dim + S::kTerms - 1) / S::kTerms) : 0;
  const bool needed = row0 < p.size && column0 < p.size && (!block.own || column0 < row0 + 16 * S::kM);

  Sums<S::kM, S::kN> sums;
  clear(sums);
  Position ahead{begin / p.batch, begin % p.batch, 0};
  const auto start_copy = [&](int step) {
    if (step < steps) {
      copy_step<T>(p, block, ahead, shared_memory() + step % S::kStages * S::kStageBytes);
      ahead.advance<S::kTerms>(p);
    }
    ptx::cp_async_commit();  // perhaps empty: the groups are counted
  };
  for (int step = 0; step < S::kStages - 1; ++step) start_copy(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this step's tiles are there, and all have done with those of the step before
    start_copy(step + S::kStages - 1);
    const unsigned char* const stage = shared_memory() + step % S::kStages * S::kStageBytes;
    if (needed)
      add_product_of_rows<T, S::kTerms * static_cast<int>(sizeof(T)) / kStepBytes, S::TileT::kStride>(
          sums, stage + warp_row * S::TileT::kStride, stage + S::kTileBytes + warp_column * S::TileT::kStride, p.dtype);
  }
  ptx::cp_async_wait<0>();

  const int64_t head = (static_cast<int64_t>(block.split) * p.heads + block.head) * p.width;
#pragma unroll
  for (int m = 0; m < S::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + sums_row(m, 2 * half);
      if (row >= p.width) continue;
#pragma unroll
      for (int n = 0; n < S::kN; ++n) {
        const int column = column0 + sums_column(n, 0);
        if (column >= p.width) continue;
        float x = sums.x[m][n][2 * half], y = sums.x[m][n][2 * half + 1];
        if (block.own && column > row) x = 0.f;
        if (block.own && column + 1 > row) y = 0.f;
        store_pair<T>(p, (head + row) * p.weight_columns + (block.own ? p.own : 0) + column, x, y, column + 1 < p.width);
      }
    }
}

__global__ void __launch_bounds__(kMixThreads, 2) sgu_weight_gradient_kernel(const __grid_constant__ SguArgs p) {
  with_width(p.dtype, [&](auto type) { compute<decltype(type)>(p); });
}

template <class T>
void run(const SguArgs& p, int splits, void* stream) {
  using S = WeightShape<T>;
  const int64_t tiles = (p.width + S::kSize - 1) / S::kSize;
  const int64_t blocks = tiles * tiles * (p.own > 0 ? 2 : 1) * p.heads * splits;
  launch("sgu_weight_gradient", sgu_weight_gradient_kernel, blocks, S::kThreads, S::kShared, stream, p);
}

}  // namespace

void run_sgu_weight_gradient(const SguArgs& p, DType dtype, int splits, void* stream) {
  HIERKERNELS_SGU_DISPATCH(dtype, run, p, splits, stream);
}

}  // namespace hierkernels::cuda
