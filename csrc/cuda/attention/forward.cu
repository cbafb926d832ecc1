// Attention forward: a block computes the output of one tile of rows, over the keys that its rows see; or over a part of
// these, of which it leaves records (combine.cu).
#include "../common/launch.h"
#include "kernels.h"
#include "scores.h"
#include "shapes.h"

namespace hierkernels::cuda {
namespace {

template <class T, int kDim>
struct Forward {
  using S = ForwardShape<T, kDim>;
  using TileT = Tile<T, kDim>;
  static constexpr int kKeyTiles = S::kKeys / 8, kSteps = kDim * static_cast<int>(sizeof(T)) / kStepBytes;
  static constexpr int kRowsPerLane = 2 * S::kM;  // row x is at tile x / 2, half x % 2
  static constexpr int kColumns = kDim / S::kSplit;  // of the output in a warp
  using Output = Sums<S::kM, kColumns / 8>;

  struct RowState {
    float top[kRowsPerLane];    // the largest score so far
    float total[kRowsPerLane];  // of this lane's exponentials
  };

  // Scores from products, in place; hidden ones become -inf.
  static __device__ __forceinline__ void make_scores(const AttentionArgs& p, Sums<S::kM, kKeyTiles>& s, int item0,
                                                     int row0, const Span (&seen)[kRowsPerLane], int n0, bool inside) {
#pragma unroll
    for (int x = 0; x < kRowsPerLane; ++x) {
      Query q{};
      if (p.modified) q = query_at(p, item0, row0 + sums_row(x / 2, x % 2 * 2));
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = s.x[x / 2][n][x % 2 * 2 + e];
          const int column = n0 + sums_column(n, e);
          if (inside || seen[x].has(column)) {
            float slope;
            value = modified_score(p, value, q.batch, q.head, q.query, column - q.first_key, slope);
          } else {
            value = -infinity();
          }
        }
    }
  }

  // Scores to probabilities, relative to the new largest score, to which what was summed is adapted.
  static __device__ __forceinline__ void exponentiate(Sums<S::kM, kKeyTiles>& s, Output& acc, RowState& state) {
#pragma unroll
    for (int x = 0; x < kRowsPerLane; ++x) {
      float top = state.top[x];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
        top = fmaxf(top, fmaxf(s.x[x / 2][n][x % 2 * 2], s.x[x / 2][n][x % 2 * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float shrink = natural_exp(state.top[x] - top);
      state.top[x] = top;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = s.x[x / 2][n][x % 2 * 2 + e];
          value = natural_exp(value - top);
          total += value;
        }
      state.total[x] = state.total[x] * shrink + total;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) acc.x[x / 2][n][x % 2 * 2 + e] *= shrink;
    }
  }

  static __device__ __forceinline__ void drop(const AttentionArgs& p, Sums<S::kM, kKeyTiles>& s, uint64_t seed, int item0,
                                              int row0, const Span (&seen)[kRowsPerLane], int n0) {
#pragma unroll
    for (int x = 0; x < kRowsPerLane; ++x) {
      const Query q = query_at(p, item0, row0 + sums_row(x / 2, x % 2 * 2));
      uint32_t keep = 0;
      if (p.items_per_tile == 1) {
        keep = dropout_keeps_row<kKeyTiles>(p, seed, q, n0);
      } else {
#pragma unroll
        for (int bit = 0; bit < 2 * kKeyTiles; ++bit) {
          const int column = n0 + sums_column(bit / 2, bit % 2);
          if (seen[x].has(column) && dropout_keeps(p, seed, q.batch, q.head, q.query, column - q.first_key)) keep |= 1u << bit;
        }
      }
#pragma unroll
      for (int bit = 0; bit < 2 * kKeyTiles; ++bit)
        if (!(keep >> bit & 1)) s.x[x / 2][bit / 2][x % 2 * 2 + bit % 2] = 0.f;
    }
  }
};

template <class T, int kDim>
__device__ __forceinline__ void compute(const AttentionArgs& p) {
  using F = Forward<T, kDim>;
  using S = typename F::S;
  using TileT = typename F::TileT;
  unsigned char* const q_tile = shared_memory();
  unsigned char* const k_tiles = q_tile + TileT::bytes(S::kRows);
  unsigned char* const v_tiles = k_tiles + 2 * TileT::bytes(S::kKeys);

  const int number = static_cast<int>(blockIdx.x) / p.parts;
  const int share = static_cast<int>(blockIdx.x) % p.parts;  // which part of the keys
  const TileOfRows tile = tile_of_rows<S::kRows>(p, number);
  const int item0 = tile.item0, row0 = tile.row0, warp_row0 = row0 + threadIdx.x / kWarp % S::kWarps * 16 * S::kM;
  const int part = S::kSplit == 1 ? 0 : first_column<S::kWarps, F::kColumns>();
  const auto copy_keys = [&](int n0, int stage) {
    const auto row = [&](const Rows& t) {
      return [&](int r) { return row_address<const T>(t, key_at(p, item0, n0 + r)); };
    };
    copy_rows<T, S::kKeys, kDim, S::kThreads>(k_tiles + stage * TileT::bytes(S::kKeys), p.k, row(p.k));
    copy_rows<T, S::kKeys, kDim, S::kThreads>(v_tiles + stage * TileT::bytes(S::kKeys), p.v, row(p.v));
  };

  Tiles keys = key_tiles<S::kKeys>(p, row0, tile.last);
  if (p.parts > 1) keys.visit = share_of<S::kKeys>(keys.visit, share, p.parts);
  copy_rows<T, S::kRows, kDim, S::kThreads>(
      q_tile, p.q, [&](int r) { return row_address<const T>(p.q, query_at(p, item0, row0 + r)); });
  if (keys.visit.begin < keys.visit.end) copy_keys(keys.visit.begin, 0);
  ptx::cp_async_commit();

  typename F::RowState state;
  Span seen[F::kRowsPerLane];
#pragma unroll
  for (int x = 0; x < F::kRowsPerLane; ++x) {
    state.top[x] = kHiddenBelow;
    state.total[x] = 0.f;
    seen[x] = keys_of(p, query_at(p, item0, warp_row0 + sums_row(x / 2, x % 2 * 2)));
  }
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;
  typename F::Output acc;
  clear(acc);

  const int part_offset = part * static_cast<int>(sizeof(T));
  int stage = 0;
  for (int n0 = keys.visit.begin; n0 < keys.visit.end; n0 += S::kKeys, stage ^= 1) {
    if (n0 + S::kKeys < keys.visit.end) copy_keys(n0 + S::kKeys, stage ^ 1);
    ptx::cp_async_commit();   // perhaps empty: waiting for all but one means this tile in any case
    ptx::cp_async_wait<1>();
    __syncthreads();          // every thread's part of the tile is there
    Sums<S::kM, F::kKeyTiles> s;
    clear(s);
    add_product_of_rows<T, F::kSteps, TileT::kStride>(s, q_tile + (warp_row0 - row0) * TileT::kStride,
                                                      k_tiles + stage * TileT::bytes(S::kKeys), p.q.dtype);
    // Rows that only fill up the tile have no modifiers to read.
    const bool inside = !p.modified && n0 >= keys.inside.begin && n0 + S::kKeys <= keys.inside.end;
    F::make_scores(p, s, item0, warp_row0, seen, n0, inside);
    F::exponentiate(s, acc, state);
    if (p.seed) F::drop(p, s, seed, item0, warp_row0, seen, n0);
    add_product_of_sums<T, TileT::kStride>(acc, s, v_tiles + stage * TileT::bytes(S::kKeys) + part_offset, p.q.dtype);
    __syncthreads();          // all have read the tile: its stage may be written
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int x = 0; x < F::kRowsPerLane; ++x) {
    float total = state.total[x];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    const float factor = p.parts > 1 ? 1.f : total == 0.f ? 0.f : p.dropout_scale / total;
#pragma unroll
    for (int n = 0; n < F::kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) acc.x[x / 2][n][x % 2 * 2 + e] *= factor;
    const Query q = query_at(p, item0, warp_row0 + sums_row(x / 2, x % 2 * 2));
    if (!q.real || part != 0 || threadIdx.x % 4 != 0) continue;
    if (p.parts == 1) {
      p.lse[lse_index(p, q)] = total == 0.f ? -infinity() : state.top[x] + logf(total);
    } else {
      float* const top = p.records + p.n_records * p.out.channels + lse_index(p, q) * p.parts + share;
      *top = state.top[x];
      top[p.n_records] = total;
    }
  }
  if (p.parts > 1) {
    Rows to{};
    to.channels = p.out.channels;
    to.paired = p.out.channels % 2 == 0;
    to.dtype = DType::kFloat32;
    const auto record = [&](int m, int half) -> float* {
      const Query q = query_at(p, item0, warp_row0 + sums_row(m, 2 * half));
      return q.real ? p.records + (lse_index(p, q) * p.parts + share) * p.out.channels : nullptr;
    };
    store_rows<float>(to, acc, 1.f, record, part);
    return;
  }
  const auto row = [&](int m, int half) {
    return row_address<T>(p.out, query_at(p, item0, warp_row0 + sums_row(m, 2 * half)));
  };
  store_rows<T>(p.out, acc, 1.f, row, part);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, ForwardShape<Number16, kDim>::kBlocksPerSM)
    attention_forward_kernel(const __grid_constant__ AttentionArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type), kDim>(p); });
}

template <class T, int kDim>
void run(AttentionArgs p, void* stream) {
  using S = ForwardShape<T, kDim>;
  p.items_per_tile = p.parts > 1 ? 1 : items_in_tile(p, S::kRows, S::kKeys);
  const int64_t blocks = count_blocks(p, p.rows_per_item, S::kRows) * p.parts;
  launch("attention_forward", attention_forward_kernel<kDim>, blocks, S::kThreads, S::kShared, stream, p);
}

}  // namespace

void run_attention_forward(const AttentionArgs& p, DType dtype, void* stream) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), run, p, stream);
}

}  // namespace hierkernels::cuda
