// Selected attention forward: a block computes the output of one tile of rows, over the blocks that their set visits.
//
// Each warp has the running softmax of its own 16 keys of each tile; the warps that share rows are merged at the end.
#include "../attention/scores.h"
#include "../common/launch.h"
#include "kernels.h"
#include "stages.h"

namespace hierkernels::cuda {
namespace {

template <class T, int kDim>
struct SelectedForward {
  using S = SelectedShape<T, kDim>;
  using TileT = Tile<T, kDim>;
  static constexpr int kSteps = S::kBytes / kStepBytes;

  struct State {
    float top[2], total[2];  // the largest score so far, and this lane's exponentials
    RowSight sight[2];
  };

  // Scores of 16 keys to exponentials relative to the largest score so far, to which what was summed is adapted.
  static __device__ __forceinline__ void exponentiate(const SelectedArgs& p, Sums<1, 2>& s, Sums<1, S::kColumns / 8>& acc,
                                                      State& state, const KeyColumn* columns) {
    const bool weighted = p.weights.data != nullptr;
    float shrink[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float top = state.top[x];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const KeyColumn column = columns[sums_column(n, e)];
          float& score = s.x[0][n][2 * x + e];
          score *= p.scale;
          if (weighted) score *= __uint_as_float(column.word);
          if (!is_seen(state.sight[x], column, weighted)) score = -infinity();
          top = fmaxf(top, score);
        }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      shrink[x] = natural_exp(state.top[x] - top);
      state.top[x] = top;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = s.x[0][n][2 * x + e];
          value = natural_exp(value - top);
          total += value;
        }
      state.total[x] = state.total[x] * shrink[x] + total;
    }
    // Once a large score was met, most keys change nothing.
    if (__any_sync(kAllLanes, shrink[0] != 1.f || shrink[1] != 1.f)) scale_rows(acc, shrink);
  }

  static __device__ __forceinline__ void scale_rows(Sums<1, S::kColumns / 8>& acc, const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < S::kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.x[0][n][e] *= factor[e / 2];
  }

  // Ends the softmax: of each warp, over its lanes, and over the warps that share rows, whose `acc` are then parts of the
  // output. statistics: [warp][top, total][16 rows], of the warps that have this part of the columns.
  static __device__ __forceinline__ void normalise(Sums<1, S::kColumns / 8>& acc, State& state, float* statistics, int row_warps) {
    const int warp = threadIdx.x / kWarp % S::kWarps;
    statistics += threadIdx.x / kWarp / S::kWarps * S::kWarps * 32;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      state.total[x] += __shfl_xor_sync(kAllLanes, state.total[x], 1);
      state.total[x] += __shfl_xor_sync(kAllLanes, state.total[x], 2);
      if (threadIdx.x % 4 == 0) {
        statistics[warp * 32 + sums_row(0, 2 * x)] = state.top[x];
        statistics[warp * 32 + 16 + sums_row(0, 2 * x)] = state.total[x];
      }
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float top = kHiddenBelow, total = 0.f;
      const float* const of_row = statistics + sums_row(0, 2 * x);
      for (int w = warp % row_warps; w < S::kWarps; w += row_warps) top = fmaxf(top, of_row[w * 32]);
      for (int w = warp % row_warps; w < S::kWarps; w += row_warps)
        total += of_row[w * 32 + 16] * natural_exp(of_row[w * 32] - top);
      factor[x] = total == 0.f ? 0.f : natural_exp(state.top[x] - top) / total;
      state.top[x] = top;
      state.total[x] = total;
    }
    scale_rows(acc, factor);
  }
};

template <class T, int kDim>
__device__ __forceinline__ void compute(const SelectedArgs& p) {
  using F = SelectedForward<T, kDim>;
  using S = typename F::S;
  using TileT = typename F::TileT;
  unsigned char* const q_tile = shared_memory();
  unsigned char* const k_tiles = q_tile + TileT::bytes(S::kRows);

  const RowTile tile = row_tile(p, S::kRows);
  const KeyStages<T, kDim> stages(p, tile, k_tiles);
  const ColumnSource& source = stages.source;
  const int warp = threadIdx.x / kWarp % S::kWarps, warp_row0 = warp % p.row_warps * 16;
  const int part = S::kSplit == 1 ? 0 : first_column<S::kWarps, S::kColumns>();

  copy_rows<T, S::kRows, kDim, S::kThreads>(
      q_tile, p.q, [&](int r) { return row_address<const T>(p.q, tile.b, row_at(p, tile, r)); });
  stages.start();

  typename F::State state;
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    state.top[x] = kHiddenBelow;
    state.total[x] = 0.f;
    state.sight[x] = sight_of(p, row_at(p, tile, warp_row0 + sums_row(0, 2 * x)));
  }
  Sums<1, S::kColumns / 8> acc;
  clear(acc);

  int stage = 0, slot = 0;  // slot: of this tile's columns
  for (int n0 = 0; n0 < source.count; n0 += S::kKeys, stage ^= 1, slot = (slot + 1) % kColumnSlots) {
    stages.wait(n0, stage, slot);
    for (int piece = warp / p.row_warps; piece < S::kWarps; piece += S::kWarps / p.row_warps) {
      const int offset = stage * TileT::bytes(S::kKeys) + TileT::bytes(16 * piece);
      Sums<1, 2> s;
      clear(s);
      add_product_of_rows<T, F::kSteps, TileT::kStride>(s, q_tile + TileT::bytes(warp_row0), stages.keys + offset, p.q.dtype);
      F::exponentiate(p, s, acc, state, stages.slot_at(slot) + 16 * piece);
      add_product_of_sums<T, TileT::kStride>(acc, s, stages.values + offset + part * static_cast<int>(sizeof(T)), p.q.dtype);
    }
    __syncthreads();         // all have read the tile: its stage may be written
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the tiles' memory is free

  float* const memory = reinterpret_cast<float*>(k_tiles);
  F::normalise(acc, state, reinterpret_cast<float*>(q_tile), p.row_warps);
  add_warps<S::kWarps>(acc, memory, p.row_warps);
  if (warp >= p.row_warps) return;
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const SelectedRow row = row_at(p, tile, warp_row0 + sums_row(0, 2 * x));
    if (row.real && part == 0 && threadIdx.x % 4 == 0)
      p.lse[lse_index(p, tile.b, row.head, row.query)] =
          state.total[x] == 0.f ? -infinity() : state.top[x] + logf(state.total[x]);
  }
  const auto row = [&](int, int half) {
    return row_address<T>(p.out, tile.b, row_at(p, tile, warp_row0 + sums_row(0, 2 * half)));
  };
  store_rows<T>(p.out, acc, 1.f, row, part);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, SelectedShape<Number16, kDim>::kBlocksPerSM)
    selected_forward_kernel(const __grid_constant__ SelectedArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type), kDim>(p); });
}

template <class T, int kDim>
void run(SelectedArgs p, void* stream) {
  using S = SelectedShape<T, kDim>;
  plan_rows(p, S::kRows);
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.choosers * p.sets * p.row_blocks;
  launch("selected_forward", selected_forward_kernel<kDim>, blocks, S::kThreads, S::kForwardShared, stream, p);
}

}  // namespace

void run_selected_forward(const SelectedArgs& p, DType dtype, void* stream) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), run, p, stream);
}

}  // namespace hierkernels::cuda
