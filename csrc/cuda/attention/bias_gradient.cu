// Attention backward, the gradient of the bias: a block owns a tile of the bias and visits, in a fixed order, the
// tiles of scores that share it (batches, heads, queries, keys or buckets over which the bias is broadcast).
//
// No temporary of the scores' size, and the same sums in each run. Where few tiles have to sum over much, the visits
// are cut into slices, whose sums are added afterwards.
#include "../common/launch.h"
#include "kernels.h"
#include "scores.h"
#include "shapes.h"

namespace hierkernels::cuda {
namespace {

HIERKERNELS_ANYWHERE inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The tiles of the bias and, for each, the visits: a product of four counts each, innermost last.
struct Visits {
  int tiles[4], visits[4];

  HIERKERNELS_ANYWHERE Visits(const AttentionArgs& p, int rows, int keys) {
    const int64_t* size = p.bias_size;
    const int batches = p.items / p.kv_heads;
    tiles[0] = static_cast<int>(size[0]);
    tiles[1] = static_cast<int>(size[1]);
    tiles[2] = p.bias_width || size[2] > 1 ? divide_up(size[2], rows) : 1;
    tiles[3] = p.bias_width || size[3] > 1 ? divide_up(size[3], keys) : 1;
    visits[0] = size[0] == 1 ? batches : 1;
    visits[1] = size[1] == 1 ? p.heads : 1;
    visits[2] = p.bias_width ? divide_up(p.n_queries, p.bias_width) : size[2] == 1 ? divide_up(p.n_queries, rows) : 1;
    visits[3] = p.bias_width ? 1 : size[3] == 1 ? divide_up(p.n_keys, keys) : 1;
  }
  HIERKERNELS_ANYWHERE static int64_t product(const int (&counts)[4]) {
    return static_cast<int64_t>(counts[0]) * counts[1] * counts[2] * counts[3];
  }
};

// The queries [row, row_end) and the keys from `key` on, below key_end, of one head.
struct Visit {
  int batch, head, row, row_end, key, key_end;
};

template <int kRows, int kKeys>
__device__ __forceinline__ Visit visit_at(const AttentionArgs& p, const int (&tile)[4], const int (&visit)[4]) {
  Visit v;
  v.batch = p.bias_size[0] == 1 ? visit[0] : tile[0];
  v.head = p.bias_size[1] == 1 ? visit[1] : tile[1];
  if (p.bias_width) {  // the same rows and slots of each bucket
    const int bucket = visit[2] * p.bias_width;
    v.row = bucket + tile[2] * kRows;
    v.row_end = min(bucket + p.bias_width, p.n_queries);
    v.key = bucket - p.bias_before + tile[3] * kKeys;
    v.key_end = min(static_cast<int64_t>(bucket - p.bias_before) + p.bias_size[3], static_cast<int64_t>(p.n_keys));
  } else {
    v.row = (p.bias_size[2] == 1 ? visit[2] : tile[2]) * kRows;
    v.row_end = p.n_queries;
    v.key = (p.bias_size[3] == 1 ? visit[3] : tile[3]) * kKeys;
    v.key_end = p.n_keys;
  }
  v.row_end = min(v.row_end, v.row + kRows);
  return v;
}

// Digits of x in the mixed base `counts`.
__device__ __forceinline__ void split_index(int64_t x, const int (&counts)[4], int (&digits)[4]) {
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    digits[d] = static_cast<int>(x % counts[d]);
    x /= counts[d];
  }
}

template <class T>
struct BiasGradient {
  using S = BiasGradientShape<T>;
  using TileT = Tile<T, S::kPart>;
  static constexpr int kKeyTiles = S::kKeys / 8, kSteps = S::kPart * static_cast<int>(sizeof(T)) / kStepBytes;
  using TileSums = Sums<1, kKeyTiles>;

  // sums += a b^T of a visit's rows and keys, the channels in parts.
  static __device__ __forceinline__ void add_product(const AttentionArgs& p, const Visit& v, const Rows& a, const Rows& b,
                                                     TileSums& sums) {
    unsigned char* const left = shared_memory();
    unsigned char* const right = left + TileT::bytes(S::kRows);
    for (int first = 0; first < a.channels; first += S::kPart) {
      copy_rows<T, S::kRows, S::kPart, S::kThreads>(
          left, a, [&](int r) { return v.row + r < v.row_end ? a.at<const T>(v.batch, v.head, v.row + r) : nullptr; }, first);
      copy_rows<T, S::kKeys, S::kPart, S::kThreads>(
          right, b,
          [&](int c) {
            const int j = v.key + c;
            return j >= 0 && j < v.key_end ? b.at<const T>(v.batch, v.head / p.group, j) : nullptr;
          },
          first);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();  // every thread's part is there
      add_product_of_rows<T, kSteps, TileT::kStride>(sums, left + threadIdx.x / kWarp * 16 * TileT::kStride, right, p.q.dtype);
      __syncthreads();  // all have read it: it may be written
    }
  }

  // sums += the gradients of a visit's scores.
  static __device__ __forceinline__ void add_gradients(const AttentionArgs& p, const Visit& v, uint64_t seed, TileSums& sums) {
    const Query first{0, v.batch, v.head, v.row, 0, true}, last{0, v.batch, v.head, v.row_end - 1, 0, true};
    if (v.row >= v.row_end || keys_of(p, first).begin >= v.key + S::kKeys || keys_of(p, last).end <= v.key) return;
    TileSums s, dp;
    clear(s);
    clear(dp);
    add_product(p, v, p.q, p.k, s);
    add_product(p, v, p.dout, p.v, dp);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int i = v.row + threadIdx.x / kWarp * 16 + sums_row(0, 2 * x);
      if (i >= v.row_end) continue;
      const Query q{0, v.batch, v.head, i, 0, true};
      const Span seen = keys_of(p, q);
      const float lse = p.lse[lse_index(p, q)], delta = p.delta[lse_index(p, q)];
      const float level = lse == -infinity() ? infinity() : lse;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = v.key + sums_column(n, e);
          if (j >= v.key_end || !seen.has(j)) continue;
          float slope, gradient = dp.x[0][n][2 * x + e];
          const float score = modified_score(p, s.x[0][n][2 * x + e], v.batch, v.head, i, j, slope);
          if (p.seed) gradient = dropout_keeps(p, seed, v.batch, v.head, i, j) ? gradient * p.dropout_scale : 0.f;
          sums.x[0][n][2 * x + e] += natural_exp(score - level) * (gradient - delta);
        }
    }
  }

  // Stores the tile, summed over its rows or columns where the bias has but one.
  static __device__ __forceinline__ void store(const AttentionArgs& p, const int (&tile)[4], float* to, const TileSums& sums) {
    constexpr int kStride = S::kKeys + 1;
    float* const all = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        all[(threadIdx.x / kWarp * 16 + sums_row(0, e)) * kStride + sums_column(n, e)] = sums.x[0][n][e];
    __syncthreads();
    const bool sum_rows = !p.bias_width && p.bias_size[2] == 1, sum_keys = !p.bias_width && p.bias_size[3] == 1;
    const int rows = sum_rows ? 1 : S::kRows, keys = sum_keys ? 1 : S::kKeys;
    for (int x = threadIdx.x; x < rows * keys; x += S::kThreads) {
      const int r = x / keys, c = x % keys;
      const int64_t row = tile[2] * S::kRows + r, column = tile[3] * S::kKeys + c;
      if (row >= p.bias_size[2] || column >= p.bias_size[3]) continue;
      float sum = 0.f;
      for (int m = r; m < (sum_rows ? S::kRows : r + 1); ++m)
        for (int n = c; n < (sum_keys ? S::kKeys : c + 1); ++n) sum += all[m * kStride + n];
      to[((tile[0] * p.bias_size[1] + tile[1]) * p.bias_size[2] + row) * p.bias_size[3] + column] = sum;
    }
  }
};

template <class T>
__device__ __forceinline__ void compute(const AttentionArgs& p) {
  using B = BiasGradient<T>;
  using S = typename B::S;
  const Visits all(p, S::kRows, S::kKeys);
  const int64_t tiles = Visits::product(all.tiles), visits = Visits::product(all.visits);
  const int64_t slice = blockIdx.x / tiles;
  int tile[4], visit[4];
  split_index(blockIdx.x % tiles, all.tiles, tile);
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;
  typename B::TileSums sums;
  clear(sums);
  for (int64_t x = visits * slice / p.slices; x < visits * (slice + 1) / p.slices; ++x) {
    split_index(x, all.visits, visit);
    B::add_gradients(p, visit_at<S::kRows, S::kKeys>(p, tile, visit), seed, sums);
  }
  const int64_t elements = p.bias_size[0] * p.bias_size[1] * p.bias_size[2] * p.bias_size[3];
  B::store(p, tile, p.dbias + slice * elements, sums);
}

__global__ void __launch_bounds__(kAttentionThreads, 2) attention_bias_gradient_kernel(const __grid_constant__ AttentionArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type)>(p); });
}

template <class T>
void run(const AttentionArgs& p, void* stream) {
  using S = BiasGradientShape<T>;
  const int64_t blocks = Visits::product(Visits(p, S::kRows, S::kKeys).tiles) * p.slices;
  launch("attention_bias_gradient", attention_bias_gradient_kernel, blocks, S::kThreads, S::kShared, stream, p);
}

}  // namespace

int attention_bias_gradient_slices(const AttentionArgs& p) {
  constexpr int kBusy = 512, kMost = 64;  // blocks that keep a large device busy, fixed: results do not depend on it
  using S = BiasGradientShape<float>;
  const Visits all(p, S::kRows, S::kKeys);
  const int64_t wanted = kBusy / Visits::product(all.tiles), visits = Visits::product(all.visits);
  const int64_t n = wanted < visits ? wanted : visits;
  return static_cast<int>(n < 1 ? 1 : n > kMost ? kMost : n);
}

void run_attention_bias_gradient(const AttentionArgs& p, DType dtype, void* stream) {
  if (dtype == DType::kFloat32) return run<float>(p, stream);
  run<Number16>(p, stream);
}

}  // namespace hierkernels::cuda
