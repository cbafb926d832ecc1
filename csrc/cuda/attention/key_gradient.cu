// Attention backward, dK and dV: a block computes the gradients of one tile of keys, over the rows that see them.
//
// Products are transposed: keys are rows of the sums, queries are columns, so that probabilities and their gradients
// are operands of the next products as they leave the registers.
#include "../common/launch.h"
#include "kernels.h"
#include "scores.h"
#include "shapes.h"

namespace hierkernels::cuda {
namespace {

// In place: `s` from the products k q to the probabilities that dV is made with, `dp` from the products v dout to the
// gradients of the products k q.
template <int kN>
__device__ __forceinline__ void score_gradients(const AttentionArgs& p, Sums<1, kN>& s, Sums<1, kN>& dp, const Span (&seen)[2],
                                                const float* level, const float* delta, uint64_t seed, int item0, int key0,
                                                int m0, bool inside) {
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const Key k = key_at(p, item0, key0 + sums_row(0, 2 * x));
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = sums_column(n, e), row = m0 + column, at = 2 * x + e;
        float weight = 0.f, ds = 0.f;
        if (inside || seen[x].has(row)) {
          Query q{};
          if (p.modified || p.seed) q = query_at(p, item0, row);
          float slope, gradient = dp.x[0][n][at];
          const float score = modified_score(p, s.x[0][n][at], q.batch, q.head, q.query, k.key, slope);
          const float probability = natural_exp(score - level[column]);
          weight = probability;
          if (p.seed) {
            const bool kept = dropout_keeps(p, seed, q.batch, q.head, q.query, k.key);
            weight = kept ? probability : 0.f;
            gradient = kept ? gradient * p.dropout_scale : 0.f;
          }
          ds = probability * (gradient - delta[column]) * slope;
        }
        s.x[0][n][at] = weight;
        dp.x[0][n][at] = ds;
      }
  }
}

template <class T, int kDim>
__device__ __forceinline__ void compute(const AttentionArgs& p) {
  using S = KeyGradientShape<T, kDim>;
  using TileT = Tile<T, kDim>;
  constexpr int kRowTiles = S::kRows / 8, kSteps = kDim * static_cast<int>(sizeof(T)) / kStepBytes;
  constexpr int kColumns = kDim / S::kSplit;  // of dK and dV in a warp
  unsigned char* const k_tile = shared_memory();
  unsigned char* const v_tile = k_tile + TileT::bytes(S::kKeys);
  unsigned char* const q_tiles = v_tile + TileT::bytes(S::kKeys);
  unsigned char* const dout_tiles = q_tiles + 2 * TileT::bytes(S::kRows);
  float* const statistics = reinterpret_cast<float*>(dout_tiles + 2 * TileT::bytes(S::kRows));  // [stage][level, delta]

  const TileOfKeys tile = tile_of_keys<S::kKeys>(p);
  const int item0 = tile.item0, key0 = tile.key0;
  const int warp = threadIdx.x / kWarp, warp_key0 = key0 + warp % S::kKeyWarps * 16;
  const int part = first_column<S::kKeyWarps, kColumns>();
  const auto copy_keys = [&](unsigned char* to, const Rows& t) {
    copy_rows<T, S::kKeys, kDim, S::kThreads>(
        to, t, [&](int r) { return row_address<const T>(t, key_at(p, item0, key0 + r)); });
  };
  const auto copy_queries = [&](unsigned char* to, const Rows& t, int m0) {
    copy_rows<T, S::kRows, kDim, S::kThreads>(
        to, t, [&](int r) { return row_address<const T>(t, query_at(p, item0, m0 + r)); });
  };
  const auto copy_stage = [&](int m0, int stage) {
    copy_queries(q_tiles + stage * TileT::bytes(S::kRows), p.q, m0);
    copy_queries(dout_tiles + stage * TileT::bytes(S::kRows), p.dout, m0);
    for (int r = threadIdx.x; r < S::kRows; r += S::kThreads) {
      const Query q = query_at(p, item0, m0 + r);
      const float lse = q.real ? p.lse[lse_index(p, q)] : -infinity();
      float* const level = statistics + stage * 2 * S::kRows + r;
      level[0] = lse == -infinity() ? infinity() : lse;  // all probabilities of the row are then 0
      level[S::kRows] = q.real ? p.delta[lse_index(p, q)] : 0.f;
    }
  };

  const Tiles rows = row_tiles<S::kRows>(p, key0, tile.last);
  copy_keys(k_tile, p.k);
  copy_keys(v_tile, p.v);
  if (rows.visit.begin < rows.visit.end) copy_stage(rows.visit.begin, 0);
  ptx::cp_async_commit();

  Span seen[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) seen[x] = rows_of(p, key_at(p, item0, warp_key0 + sums_row(0, 2 * x)));
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;
  Sums<1, kColumns / 8> dk, dv;
  clear(dk);
  clear(dv);

  const int warp_offset = (warp_key0 - key0) * TileT::kStride, part_offset = part * static_cast<int>(sizeof(T));
  int stage = 0;
  for (int m0 = rows.visit.begin; m0 < rows.visit.end; m0 += S::kRows, stage ^= 1) {
    if (m0 + S::kRows < rows.visit.end) copy_stage(m0 + S::kRows, stage ^ 1);
    ptx::cp_async_commit();  // perhaps empty: waiting for all but one means this tile in any case
    ptx::cp_async_wait<1>();
    __syncthreads();         // every thread's part of the tile is there
    const unsigned char* const q_tile = q_tiles + stage * TileT::bytes(S::kRows);
    const unsigned char* const dout_tile = dout_tiles + stage * TileT::bytes(S::kRows);
    const float* const level = statistics + stage * 2 * S::kRows;
    Sums<1, kRowTiles> s, dp;
    clear(s);
    clear(dp);
    add_product_of_rows<T, kSteps, TileT::kStride>(s, k_tile + warp_offset, q_tile, p.q.dtype);
    add_product_of_rows<T, kSteps, TileT::kStride>(dp, v_tile + warp_offset, dout_tile, p.q.dtype);
    const bool inside = !p.modified && m0 >= rows.inside.begin && m0 + S::kRows <= rows.inside.end;
    score_gradients(p, s, dp, seen, level, level + S::kRows, seed, item0, warp_key0, m0, inside);
    add_product_of_sums<T, TileT::kStride>(dv, s, dout_tile + part_offset, p.q.dtype);
    add_product_of_sums<T, TileT::kStride>(dk, dp, q_tile + part_offset, p.q.dtype);
    __syncthreads();         // all have read the tile: its stage may be written
  }
  ptx::cp_async_wait<0>();
  const auto row = [&](const Rows& t) {
    return [&](int, int half) { return row_address<T>(t, key_at(p, item0, warp_key0 + sums_row(0, 2 * half))); };
  };
  store_rows<T>(p.dk, dk, p.scale, row(p.dk), part);
  store_rows<T>(p.dv, dv, p.dropout_scale, row(p.dv), part);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, KeyGradientShape<Number16, kDim>::kBlocksPerSM)
    attention_key_gradient_kernel(const __grid_constant__ AttentionArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type), kDim>(p); });
}

template <class T, int kDim>
void run(AttentionArgs p, void* stream) {
  using S = KeyGradientShape<T, kDim>;
  p.items_per_tile = items_in_tile(p, S::kRows, S::kKeys);
  const int64_t blocks = count_blocks(p, p.n_keys, S::kKeys);
  launch("attention_key_gradient", attention_key_gradient_kernel<kDim>, blocks, S::kThreads, S::kShared, stream, p);
}

}  // namespace

void run_attention_key_gradient(const AttentionArgs& p, DType dtype, void* stream) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), run, p, stream);
}

}  // namespace hierkernels::cuda
