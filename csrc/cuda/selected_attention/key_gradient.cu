// Selected attention backward, dK and dV: a block computes the gradients of one tile of keys, over the queries that visit
// the tile's block of keys (or the blocks, where several small ones make a tile), or a part of them.
//
// Products are transposed as in attention/key_gradient.cu: keys are rows of the sums, queries are columns.
#include "../attention/scores.h"
#include "../common/launch.h"
#include "kernels.h"

namespace hierkernels::cuda {
namespace {

// A column: a head of a query that visits.
struct Visitor {
  int head, query;     // head -1: none
  float level, delta;  // level: lse, infinite for a row that sees nothing
  int stop;            // the first key that it does not see
  uint32_t word;       // which of the tile's blocks it chose; with weights, the float32 weight
};
static_assert(sizeof(Visitor) == kVisitorBytes);

// The item of work of a block.
struct Item {
  int b, kv_head, block, key0, keys;  // keys: from key0 on, those of the merged block in the tile
  int first, count;                   // of its visitors
  int part;                           // where its sums go; -1: into dK and dV
};

__device__ __forceinline__ Item item_of(const SelectedArgs& p, int tile_keys) {
  Item w;
  const int tile = static_cast<int>(blockIdx.x) % p.key_tiles, rest = static_cast<int>(blockIdx.x) / p.key_tiles;
  const int pair = rest / p.items, item = rest % p.items;
  w.b = pair / p.kv_heads;
  w.kv_head = pair % p.kv_heads;
  w.block = p.item_block[rest];
  if (w.block >= p.merged_blocks) return w;
  const int at = pair * p.merged_blocks + w.block, begin = p.starts[at], all = p.starts[at + 1] - begin;
  const int number = item - p.first_item[at], from = number * p.chunk;
  w.first = begin + from;
  w.count = all - from < p.chunk ? all - from : p.chunk;
  w.part = all > p.chunk ? p.first_part[at] + number : -1;
  const int size = p.merge * p.block_size, offset = tile * tile_keys;
  w.key0 = w.block * size + offset;
  w.keys = size - offset < tile_keys ? size - offset : tile_keys;
  if (p.n_keys - w.key0 < w.keys) w.keys = p.n_keys - w.key0;
  return w;
}

// Looks up the columns from m0 on.
template <int kRows, int kThreads>
__device__ __forceinline__ void fill_visitors(const SelectedArgs& p, const Item& w, Visitor* visitors, int m0) {
  const int choices = p.choosers / p.kv_heads;
  for (int c = threadIdx.x; c < kRows; c += kThreads) {
    const int number = (m0 + c) / p.pack, member = m0 + c - number * p.pack;
    Visitor v{-1, 0, infinity(), 0.f, 0, 0};
    if (number < w.count) {
      const Visit visit = p.visitors[w.first + number];
      const int choice = visit.block / p.n_queries, chooser = w.kv_head * choices + choice;
      v.query = visit.block - choice * p.n_queries;
      v.head = chooser * p.pack + member;
      const int64_t at = lse_index(p, w.b, v.head, v.query);
      const float lse = p.lse[at];
      if (lse != -infinity()) v.level = lse;
      v.delta = p.delta[at];
      v.stop = stop_of(p, v.query);
      v.word = p.weights.data ? __float_as_uint(weight_of(p, w.b, chooser, v.query, visit.word)) : visit.word;
    }
    visitors[c] = v;
  }
}

struct SeenKey {
  int key;         // -1: none
  uint32_t block;  // its bit in the words of visitors
};

// In place: `s` from the products k q to the probabilities that dV is made with, `dp` from the products v dout to the
// gradients of the products k q.
template <int kN>
__device__ __forceinline__ void score_gradients(const SelectedArgs& p, Sums<1, kN>& s, Sums<1, kN>& dp,
                                                const SeenKey (&keys)[2], const Visitor* visitors) {
  const bool weighted = p.weights.data != nullptr;
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Visitor v = visitors[sums_column(n, e)];
      const float weight = weighted ? __uint_as_float(v.word) : 1.f;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float &value = s.x[0][n][2 * x + e], &gradient = dp.x[0][n][2 * x + e];
        float probability = 0.f, ds = 0.f;
        if (keys[x].key >= 0 && keys[x].key < v.stop && (weighted || (v.word & keys[x].block))) {
          probability = natural_exp(value * p.scale * weight - v.level);
          ds = probability * (gradient - v.delta) * weight;
        }
        value = probability;
        gradient = ds;
      }
    }
}

template <class T, int kDim>
__device__ __forceinline__ void compute(const SelectedArgs& p) {
  using S = SelectedKeyShape<T, kDim>;
  using TileT = Tile<T, kDim>;
  constexpr int kSteps = kDim * static_cast<int>(sizeof(T)) / kStepBytes;
  constexpr int kColumns = kDim / S::kSplit;  // of dK and dV in a warp
  unsigned char* const k_tile = shared_memory();
  unsigned char* const v_tile = k_tile + TileT::bytes(S::kKeys);
  unsigned char* const q_tiles = v_tile + TileT::bytes(S::kKeys);
  unsigned char* const dout_tiles = q_tiles + 2 * TileT::bytes(S::kRows);
  Visitor* const visitors = reinterpret_cast<Visitor*>(dout_tiles + 2 * TileT::bytes(S::kRows));

  const Item w = item_of(p, S::kKeys);
  if (w.block >= p.merged_blocks) return;
  const int warp = threadIdx.x / kWarp, warp_key0 = warp % S::kKeyWarps * 16;
  const int part = warp / S::kKeyWarps * kColumns, rows = w.count * p.pack;
  const auto copy_keys = [&](unsigned char* to, const Rows& t) {
    copy_rows<T, S::kKeys, kDim, S::kThreads>(
        to, t, [&](int r) { return r < w.keys ? t.at<const T>(w.b, w.kv_head, w.key0 + r) : nullptr; });
  };
  const auto copy_stage = [&](const Visitor* at, int stage) {
    const auto row = [&](const Rows& t) {
      return [&t, &w, at](int r) { return at[r].head < 0 ? nullptr : t.at<const T>(w.b, at[r].head, at[r].query); };
    };
    copy_rows<T, S::kRows, kDim, S::kThreads>(q_tiles + stage * TileT::bytes(S::kRows), p.q, row(p.q));
    copy_rows<T, S::kRows, kDim, S::kThreads>(dout_tiles + stage * TileT::bytes(S::kRows), p.dout, row(p.dout));
  };
  const auto look_up = [&](int m0, int slot) {
    fill_visitors<S::kRows, S::kThreads>(p, w, visitors + slot * S::kRows, m0);
  };

  copy_keys(k_tile, p.k);
  copy_keys(v_tile, p.v);
  look_up(0, 0);
  look_up(S::kRows, 1);
  __syncthreads();
  if (rows > 0) copy_stage(visitors, 0);
  ptx::cp_async_commit();

  SeenKey keys[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int r = warp_key0 + sums_row(0, 2 * x);
    keys[x] = {r < w.keys ? w.key0 + r : -1, 1u << (r / p.block_size & 31)};
  }
  Sums<1, kColumns / 8> dk, dv;
  clear(dk);
  clear(dv);

  const int warp_offset = warp_key0 * TileT::kStride, part_offset = part * static_cast<int>(sizeof(T));
  int stage = 0, slot = 0;  // slot: of this tile's columns
  for (int m0 = 0; m0 < rows; m0 += S::kRows, stage ^= 1, slot = (slot + 1) % kColumnSlots) {
    if (m0 + S::kRows < rows) copy_stage(visitors + (slot + 1) % kColumnSlots * S::kRows, stage ^ 1);
    ptx::cp_async_commit();  // perhaps empty: waiting for all but one means this tile in any case
    look_up(m0 + 2 * S::kRows, (slot + 2) % kColumnSlots);  // while copies are on their way
    ptx::cp_async_wait<1>();
    __syncthreads();         // every thread's part of the tile, and of the next tile but one's columns, is there
    const unsigned char* const q_tile = q_tiles + stage * TileT::bytes(S::kRows);
    const unsigned char* const dout_tile = dout_tiles + stage * TileT::bytes(S::kRows);
    Sums<1, S::kRows / 8> s, dp;
    clear(s);
    clear(dp);
    add_product_of_rows<T, kSteps, TileT::kStride>(s, k_tile + warp_offset, q_tile, p.q.dtype);
    add_product_of_rows<T, kSteps, TileT::kStride>(dp, v_tile + warp_offset, dout_tile, p.q.dtype);
    score_gradients(p, s, dp, keys, visitors + slot * S::kRows);
    add_product_of_sums<T, TileT::kStride>(dv, s, dout_tile + part_offset, p.q.dtype);
    add_product_of_sums<T, TileT::kStride>(dk, dp, q_tile + part_offset, p.q.dtype);
    __syncthreads();         // all have read the tile: its stage may be written
  }
  ptx::cp_async_wait<0>();

  const auto key_row = [&](int half) { return warp_key0 + sums_row(0, 2 * half); };
  if (w.part < 0) {
    const auto row = [&](const Rows& t) {
      return [&](int, int half) {
        return key_row(half) < w.keys ? t.at<T>(w.b, w.kv_head, w.key0 + key_row(half)) : nullptr;
      };
    };
    store_rows<T>(p.dk, dk, p.scale, row(p.dk), part);
    store_rows<T>(p.dv, dv, 1.f, row(p.dv), part);
    return;
  }
  // A part of the sums, for selected_sum_kernel.
  const int size = p.merge * p.block_size, channels = p.dk.channels + p.dv.channels;
  const bool paired = p.dk.channels % 2 == 0 && p.dv.channels % 2 == 0;
  const auto row = [&](int first) {
    return [&, first](int, int half) {
      const int64_t key = static_cast<int64_t>(w.part) * size + w.key0 - w.block * size + key_row(half);
      return key_row(half) < w.keys ? p.parts + key * channels + first : nullptr;
    };
  };
  store_rows<float>(Rows{nullptr, 0, 0, 0, p.dk.channels, false, paired, DType::kFloat32}, dk, p.scale, row(0), part);
  store_rows<float>(Rows{nullptr, 0, 0, 0, p.dv.channels, false, paired, DType::kFloat32}, dv, 1.f, row(p.dk.channels), part);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, SelectedKeyShape<Number16, kDim>::kBlocksPerSM)
    selected_key_gradient_kernel(const __grid_constant__ SelectedArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type), kDim>(p); });
}

template <class T, int kDim>
void run(SelectedArgs p, void* stream) {
  using S = SelectedKeyShape<T, kDim>;
  const int size = p.merge * p.block_size;
  p.key_tiles = (size + S::kKeys - 1) / S::kKeys;
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.kv_heads * p.items * p.key_tiles;
  launch("selected_key_gradient", selected_key_gradient_kernel<kDim>, blocks, S::kThreads, S::kShared, stream, p);
}

template <class T, int kDim>
int keys_of_tile() {
  return SelectedKeyShape<T, kDim>::kKeys;
}

}  // namespace

int selected_key_tile(const SelectedArgs& p, DType dtype) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), keys_of_tile);
}

void run_selected_key_gradient(const SelectedArgs& p, DType dtype, void* stream) {
  HIERKERNELS_CUDA_DISPATCH(dtype, padded_channels(p), run, p, stream);
}

}  // namespace hierkernels::cuda
