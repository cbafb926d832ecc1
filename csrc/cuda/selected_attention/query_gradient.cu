// Selected attention backward, dQ and the gradient of the weights: a block computes those of one tile of rows, over the
// blocks that their set visits.
#include "../attention/scores.h"
#include "../common/launch.h"
#include "kernels.h"
#include "stages.h"

namespace hierkernels::cuda {
namespace {

struct RowState {
  RowSight sight;
  float level, delta;  // level: lse, infinite for a row that sees nothing: all its probabilities are then 0
};

// The gradients of the products, in `s`, from the products q k in `s` and dout v in `dp` of 16 keys. Into `dp` goes what
// the gradient of a key's weight is the sum of.
__device__ __forceinline__ void score_gradients(const SelectedArgs& p, Sums<1, 2>& s, Sums<1, 2>& dp,
                                                const RowState (&rows)[2], const KeyColumn* columns) {
  const bool weighted = p.weights.data != nullptr;
#pragma unroll
  for (int x = 0; x < 2; ++x)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const KeyColumn column = columns[sums_column(n, e)];
        float &value = s.x[0][n][2 * x + e], &gradient = dp.x[0][n][2 * x + e];
        float ds = 0.f, dweight = 0.f;
        if (is_seen(rows[x].sight, column, weighted)) {
          const float scaled = value * p.scale, weight = weighted ? __uint_as_float(column.word) : 1.f;
          ds = natural_exp(scaled * weight - rows[x].level) * (gradient - rows[x].delta);
          dweight = ds * scaled;
          ds *= weight;
        }
        value = ds;
        gradient = dweight;
      }
}

// Adds 16 keys' terms over a warp's rows: to[column].
__device__ __forceinline__ void sum_rows(const Sums<1, 2>& terms, float* to) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = terms.x[0][n][e] + terms.x[0][n][2 + e];
      for (int lanes = 4; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (threadIdx.x % kWarp < 4) to[sums_column(n, e)] = sum;
    }
}

// Adds a tile's terms, by keys, to the gradients of the weights of the blocks that it has keys of: a thread for each.
template <int kKeys, int kThreads>
__device__ __forceinline__ void add_to_weights(const SelectedArgs& p, const RowTile& t, const ColumnSource& source,
                                               const float* terms, int n0) {
  const int end = n0 + kKeys < source.count ? n0 + kKeys : source.count, first = n0 / p.block_size;
  for (int at = first + threadIdx.x; at * p.block_size < end; at += kThreads) {
    const uint32_t column = source.visits[at].word;
    if (column == static_cast<uint32_t>(p.naming.named)) continue;  // the own block
    const int from = at * p.block_size, to = from + p.block_size;
    float sum = 0.f;
    for (int n = from < n0 ? n0 : from; n < to && n < end; ++n)
      for (int w = 0; w < p.row_warps; ++w) sum += terms[w * kKeys + n - n0];
    const int64_t part = static_cast<int64_t>(static_cast<int>(blockIdx.x) % p.row_blocks) * p.batch * p.choosers * p.sets;
    p.dweights[(part + t.set) * p.naming.named + column] += sum;
  }
}

template <class T, int kDim>
__device__ __forceinline__ void compute(const SelectedArgs& p) {
  using S = SelectedShape<T, kDim>;
  using TileT = Tile<T, kDim>;
  constexpr int kSteps = S::kBytes / kStepBytes;
  unsigned char* const q_tile = shared_memory();
  unsigned char* const dout_tile = q_tile + TileT::bytes(S::kRows);
  unsigned char* const k_tiles = dout_tile + TileT::bytes(S::kRows);
  float* const terms = reinterpret_cast<float*>(k_tiles + 4 * TileT::bytes(S::kKeys) + S::kColumnBytes);  // [row warp][key]

  const RowTile tile = row_tile(p, S::kRows);
  const KeyStages<T, kDim> stages(p, tile, k_tiles);
  const ColumnSource& source = stages.source;
  const int warp = threadIdx.x / kWarp % S::kWarps, warp_row0 = warp % p.row_warps * 16;
  const int part = S::kSplit == 1 ? 0 : first_column<S::kWarps, S::kColumns>();
  const auto copy_queries = [&](unsigned char* to, const Rows& t) {
    copy_rows<T, S::kRows, kDim, S::kThreads>(
        to, t, [&](int r) { return row_address<const T>(t, tile.b, row_at(p, tile, r)); });
  };

  copy_queries(q_tile, p.q);
  copy_queries(dout_tile, p.dout);
  stages.start();

  RowState rows[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const SelectedRow row = row_at(p, tile, warp_row0 + sums_row(0, 2 * x));
    const int64_t at = lse_index(p, tile.b, row.head, row.query);
    const float lse = row.real ? p.lse[at] : -infinity();
    rows[x] = {sight_of(p, row), lse == -infinity() ? infinity() : lse, row.real ? p.delta[at] : 0.f};
  }
  Sums<1, S::kColumns / 8> acc;
  clear(acc);

  int stage = 0, slot = 0;  // slot: of this tile's columns
  for (int n0 = 0; n0 < source.count; n0 += S::kKeys, stage ^= 1, slot = (slot + 1) % kColumnSlots) {
    stages.wait(n0, stage, slot);
    for (int piece = warp / p.row_warps; piece < S::kWarps; piece += S::kWarps / p.row_warps) {
      const int offset = stage * TileT::bytes(S::kKeys) + TileT::bytes(16 * piece);
      Sums<1, 2> s, dp;
      clear(s);
      clear(dp);
      add_product_of_rows<T, kSteps, TileT::kStride>(s, q_tile + TileT::bytes(warp_row0), stages.keys + offset, p.q.dtype);
      add_product_of_rows<T, kSteps, TileT::kStride>(dp, dout_tile + TileT::bytes(warp_row0), stages.values + offset, p.q.dtype);
      score_gradients(p, s, dp, rows, stages.slot_at(slot) + 16 * piece);
      if (p.dweights && part == 0) sum_rows(dp, terms + warp % p.row_warps * S::kKeys + 16 * piece);
      add_product_of_sums<T, TileT::kStride>(acc, s, stages.keys + offset + part * static_cast<int>(sizeof(T)), p.q.dtype);
    }
    __syncthreads();         // all have read the tile: its stage may be written
    if (p.dweights) add_to_weights<S::kKeys, S::kThreads>(p, tile, source, terms, n0);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the tiles' memory is free

  add_warps<S::kWarps>(acc, reinterpret_cast<float*>(k_tiles), p.row_warps);
  if (warp >= p.row_warps) return;
  const auto row = [&](int, int half) {
    return row_address<T>(p.dq, tile.b, row_at(p, tile, warp_row0 + sums_row(0, 2 * half)));
  };
  store_rows<T>(p.dq, acc, p.scale, row, part);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, SelectedShape<Number16, kDim>::kBlocksPerSM)
    selected_query_gradient_kernel(const __grid_constant__ SelectedArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type), kDim>(p); });
}

template <class T, int kDim>
void run(SelectedArgs p, void* stream) {
  using S = SelectedShape<T, kDim>;
  plan_rows(p, S::kRows);
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.choosers * p.sets * p.row_blocks;
  launch("selected_query_gradient", selected_query_gradient_kernel<kDim>, blocks, S::kThreads, S::kQueryShared, stream, p);
}

template <class T, int kDim>
int row_blocks_of(SelectedArgs p) {
  plan_rows(p, SelectedShape<T, kDim>::kRows);
  return p.row_blocks;
}

}  // namespace

int selected_row_blocks(const SelectedArgs& p, DType dtype) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), row_blocks_of, p);
}

void run_selected_query_gradient(const SelectedArgs& p, DType dtype, void* stream) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), run, p, stream);
}

}  // namespace hierkernels::cuda
