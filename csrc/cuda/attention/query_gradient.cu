// Attention backward, dQ: a block computes the gradient of one tile of rows, over the keys that its rows see.
#include "../common/launch.h"
#include "kernels.h"
#include "scores.h"
#include "shapes.h"

namespace hierkernels::cuda {
namespace {

// What a lane knows of one of its rows.
struct RowState {
  Span seen;
  float level, delta;  // level: lse, infinite for a row that sees nothing: all its probabilities are then 0
};

// The gradients of the products, in `s`, from the products q k in `s` and dout v in `dp`.
template <int kM, int kN>
__device__ __forceinline__ void score_gradients(const AttentionArgs& p, Sums<kM, kN>& s, const Sums<kM, kN>& dp,
                                                const RowState (&rows)[2 * kM], uint64_t seed, int item0, int row0, int n0,
                                                bool inside) {
#pragma unroll
  for (int x = 0; x < 2 * kM; ++x) {
    Query q{};
    uint32_t keep = 0;
    if (p.modified || p.seed) q = query_at(p, item0, row0 + sums_row(x / 2, x % 2 * 2));
    if (p.seed && p.items_per_tile == 1) keep = dropout_keeps_row<kN>(p, seed, q, n0);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n0 + sums_column(n, e), at = x % 2 * 2 + e;
        float ds = 0.f;
        if (inside || rows[x].seen.has(column)) {
          const int key = column - q.first_key;
          float slope, gradient = dp.x[x / 2][n][at];
          const float score = modified_score(p, s.x[x / 2][n][at], q.batch, q.head, q.query, key, slope);
          if (p.seed) {
            const bool kept = p.items_per_tile == 1 ? keep >> (2 * n + e) & 1
                                                    : dropout_keeps(p, seed, q.batch, q.head, q.query, key);
            gradient = kept ? gradient * p.dropout_scale : 0.f;
          }
          ds = natural_exp(score - rows[x].level) * (gradient - rows[x].delta) * slope;
        }
        s.x[x / 2][n][at] = ds;
      }
  }
}

template <class T, int kDim>
__device__ __forceinline__ void compute(const AttentionArgs& p) {
  using S = QueryGradientShape<T, kDim>;
  using TileT = Tile<T, kDim>;
  constexpr int kKeyTiles = S::kKeys / 8, kSteps = kDim * static_cast<int>(sizeof(T)) / kStepBytes;
  constexpr int kColumns = kDim / S::kSplit;  // of dQ in a warp
  unsigned char* const q_tile = shared_memory();
  unsigned char* const dout_tile = q_tile + TileT::bytes(S::kRows);
  unsigned char* const k_tiles = dout_tile + TileT::bytes(S::kRows);
  unsigned char* const v_tiles = k_tiles + 2 * TileT::bytes(S::kKeys);

  const TileOfRows tile = tile_of_rows<S::kRows>(p, static_cast<int>(blockIdx.x));
  const int item0 = tile.item0, row0 = tile.row0, warp_row0 = row0 + threadIdx.x / kWarp % S::kWarps * 16 * S::kM;
  const int part = S::kSplit == 1 ? 0 : first_column<S::kWarps, kColumns>();
  const auto copy_queries = [&](unsigned char* to, const Rows& t) {
    copy_rows<T, S::kRows, kDim, S::kThreads>(
        to, t, [&](int r) { return row_address<const T>(t, query_at(p, item0, row0 + r)); });
  };
  const auto copy_keys = [&](unsigned char* to, const Rows& t, int n0) {
    copy_rows<T, S::kKeys, kDim, S::kThreads>(
        to, t, [&](int r) { return row_address<const T>(t, key_at(p, item0, n0 + r)); });
  };
  const auto copy_stage = [&](int n0, int stage) {
    copy_keys(k_tiles + stage * TileT::bytes(S::kKeys), p.k, n0);
    copy_keys(v_tiles + stage * TileT::bytes(S::kKeys), p.v, n0);
  };

  const Tiles keys = key_tiles<S::kKeys>(p, row0, tile.last);
  copy_queries(q_tile, p.q);
  copy_queries(dout_tile, p.dout);
  if (keys.visit.begin < keys.visit.end) copy_stage(keys.visit.begin, 0);
  ptx::cp_async_commit();

  RowState rows[2 * S::kM];
#pragma unroll
  for (int x = 0; x < 2 * S::kM; ++x) {
    const Query q = query_at(p, item0, warp_row0 + sums_row(x / 2, x % 2 * 2));
    const float lse = q.real ? p.lse[lse_index(p, q)] : -infinity();
    rows[x] = {keys_of(p, q), lse == -infinity() ? infinity() : lse, q.real ? p.delta[lse_index(p, q)] : 0.f};
  }
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;
  Sums<S::kM, kColumns / 8> acc;
  clear(acc);

  const int warp_offset = (warp_row0 - row0) * TileT::kStride, part_offset = part * static_cast<int>(sizeof(T));
  int stage = 0;
  for (int n0 = keys.visit.begin; n0 < keys.visit.end; n0 += S::kKeys, stage ^= 1) {
    if (n0 + S::kKeys < keys.visit.end) copy_stage(n0 + S::kKeys, stage ^ 1);
    ptx::cp_async_commit();  // perhaps empty: waiting for all but one means this tile in any case
    ptx::cp_async_wait<1>();
    __syncthreads();         // every thread's part of the tile is there
    const unsigned char* const k_tile = k_tiles + stage * TileT::bytes(S::kKeys);
    const unsigned char* const v_tile = v_tiles + stage * TileT::bytes(S::kKeys);
    Sums<S::kM, kKeyTiles> s, dp;
    clear(s);
    clear(dp);
    add_product_of_rows<T, kSteps, TileT::kStride>(s, q_tile + warp_offset, k_tile, p.q.dtype);
    add_product_of_rows<T, kSteps, TileT::kStride>(dp, dout_tile + warp_offset, v_tile, p.q.dtype);
    // Rows that only fill up the tile have no modifiers to read.
    const bool inside = !p.modified && n0 >= keys.inside.begin && n0 + S::kKeys <= keys.inside.end;
    score_gradients(p, s, dp, rows, seed, item0, warp_row0, n0, inside);
    add_product_of_sums<T, TileT::kStride>(acc, s, k_tile + part_offset, p.q.dtype);
    __syncthreads();         // all have read the tile: its stage may be written
  }
  ptx::cp_async_wait<0>();
  const auto row = [&](int m, int half) {
    return row_address<T>(p.dq, query_at(p, item0, warp_row0 + sums_row(m, 2 * half)));
  };
  store_rows<T>(p.dq, acc, p.scale, row, part);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, QueryGradientShape<Number16, kDim>::kBlocksPerSM)
    attention_query_gradient_kernel(const __grid_constant__ AttentionArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type), kDim>(p); });
}

template <class T, int kDim>
void run(AttentionArgs p, void* stream) {
  using S = QueryGradientShape<T, kDim>;
  p.items_per_tile = items_in_tile(p, S::kRows, S::kKeys);
  const int64_t blocks = count_blocks(p, p.rows_per_item, S::kRows);
  launch("attention_query_gradient", attention_query_gradient_kernel<kDim>, blocks, S::kThreads, S::kShared, stream, p);
}

}  // namespace

void run_attention_query_gradient(const AttentionArgs& p, DType dtype, void* stream) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), run, p, stream);
}

}  // namespace hierkernels::cuda
