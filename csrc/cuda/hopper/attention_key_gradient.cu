// Attention backward for sm_90a, dK and dV: a block computes the gradients of a tile of keys, over the rows that see
// them, of all heads that share the key/value head. No atomics: rows come in a fixed order.
//
// Products are transposed, keys are the rows of sums: probabilities and their gradients are then operands of the next
// products as they leave the registers. A warp copies rows of q and dout by TMA and their statistics by loads and
// stores; two warpgroups have 64 keys each.
#include "roles.h"

namespace hierkernels::cuda {
namespace {

// What a consuming warp has to know of its tile besides the sums. It lies in shared memory: at 128 channels the sums
// leave no registers for it.
struct WarpTile {
  static constexpr int kKeys = 16;
  KeyTile tile;
  Span seen[kKeys];  // the rows that see each of the warp's keys
};

template <int kDim>
struct Shape {
  static constexpr int kGroups = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kKeys = kGroupRows * kGroups, kRows = 64;  // 128 channels leave no registers for more
  static constexpr int kStages = 3;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups), kConsumers = kGroups * kWarpgroup / kWarp;
  using Keys = Panels<kKeys, kDim>;
  using Queries = Panels<kRows, kDim>;
  static constexpr int kStatistics = 2 * kRows * static_cast<int>(sizeof(float));  // level and delta
  static constexpr int kWarpTiles = kConsumers * static_cast<int>(sizeof(WarpTile));
  static constexpr int kShared =
      2 * Keys::kBytes + kStages * (2 * Queries::kBytes + kStatistics) + kWarpTiles + kBarrierBytes;
};

template <int kDim>
struct Memory {
  using S = Shape<kDim>;
  unsigned char *keys, *values, *queries, *dout;
  float* statistics;
  WarpTile* warp_tiles;       // one for each consuming warp
  Ring<1> key_ring;           // with values
  Ring<S::kStages> row_ring;  // q, dout and statistics

  __device__ Memory() {
    keys = shared_memory();
    values = keys + S::Keys::kBytes;
    queries = values + S::Keys::kBytes;
    dout = queries + S::kStages * S::Queries::kBytes;
    statistics = reinterpret_cast<float*>(dout + S::kStages * S::Queries::kBytes);
    warp_tiles = reinterpret_cast<WarpTile*>(statistics + S::kStages * 2 * S::kRows);
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(warp_tiles + S::kConsumers);
    key_ring = {barriers, barriers + 1};
    row_ring = {barriers + 2, barriers + 2 + S::kStages};
  }
};

// By a whole warp: its first lane copies, all bring the statistics.
template <int kDim>
__device__ void produce(const HopperArgs& p, const Memory<kDim>& m, int total) {
  using S = Shape<kDim>;
  const int lane = threadIdx.x;
  int used = 0;
  for (int round = 0, index; (index = tile_of_block(total, round)) >= 0; ++round) {
    const KeyTile t = key_tile<S::kKeys, S::kRows>(p, index);
    if (lane == 0) {
      m.key_ring.begin_filling(round, 2 * S::Keys::kBytes);
      copy_tile<typename S::Keys>(m.keys, p.k, m.key_ring.full, t.batch, t.head, t.key0);
      copy_tile<typename S::Keys>(m.values, p.v, m.key_ring.full, t.batch, t.head, t.key0);
    }
    for (int tile = 0; tile < t.tiles * p.packs; ++tile, ++used) {
      const int head = (t.head * p.packs + tile / t.tiles) * p.pack, row0 = t.begin + tile % t.tiles * S::kRows;
      const int stage = m.row_ring.stage(used);
      uint64_t* const full = m.row_ring.full + stage;
      m.row_ring.wait_empty(used);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(full, 2 * S::Queries::kBytes);
        copy_tile<typename S::Queries>(m.queries + stage * S::Queries::kBytes, p.q, full, t.batch, head, row0 / p.pack);
        copy_tile<typename S::Queries>(m.dout + stage * S::Queries::kBytes, p.dout, full, t.batch, head, row0 / p.pack);
      }
      float* const level = m.statistics + stage * 2 * S::kRows;
#pragma unroll
      for (int i = 0; i < S::kRows; i += kWarp) {
        const int r = row0 + i + lane;
        const float lse = r < p.rows ? p.lse[lse_index(p, t.batch, head, r)] : -infinity();
        level[i + lane] = lse == -infinity() ? infinity() : lse * kLog2E;  // infinite: all probabilities are 0
        level[S::kRows + i + lane] = r < p.rows ? p.delta[lse_index(p, t.batch, head, r)] : 0.f;
      }
      ptx::mbarrier_arrive(full);
    }
  }
}

struct alignas(8) Pair {
  float x[2];
};
// Of the columns of sums 4 n and 4 n + 1 of a lane.
__device__ __forceinline__ Pair of_columns(const float* statistics, int n) {
  return *reinterpret_cast<const Pair*>(statistics + sums_column(n, 0));
}

// By a whole warp, whose keys begin at `first`. Keys beyond the last get its span: their sums are dropped.
__device__ __forceinline__ void remember(WarpTile& own, const HopperArgs& p, const KeyTile& t, int first) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
  if (lane == 0) own.tile = t;
  if (lane < WarpTile::kKeys) own.seen[lane] = rows_of_key(p, min(first + lane, p.n_keys - 1));
  __syncwarp();
}
// Whether each of the rows sees all of the warp's keys.
__device__ __forceinline__ bool all_seen(const WarpTile& own, int begin, int end) {
  return begin >= own.seen[WarpTile::kKeys - 1].begin && end <= own.seen[0].end;
}

template <class T, int kDim>
__device__ void consume(const HopperArgs& p, const Memory<kDim>& m, int group, int total) {
  using S = Shape<kDim>;
  constexpr int kSteps = S::kRows / kStepColumns, kSums = S::kRows / 2;
  const int own_keys = group * kGroupRows * kSwizzleBytes;
  const uint32_t k = ptx::shared_address(m.keys) + own_keys, v = ptx::shared_address(m.values) + own_keys;
  const int own_key = group * kGroupRows + threadIdx.x % kWarpgroup / kWarp * WarpTile::kKeys;  // the warp's first
  WarpTile& own = m.warp_tiles[own_key / WarpTile::kKeys];
  const float scale = p.scale * kLog2E;
  int used = 0;
  for (int round = 0, index; (index = tile_of_block(total, round)) >= 0; ++round) {
    const KeyTile t = key_tile<S::kKeys, S::kRows>(p, index);
    remember(own, p, t, t.key0 + own_key);
    float dk[kDim / 2], dv[kDim / 2], s[kSums], dp[kSums];
    uint32_t weights[kSteps][4], gradients[kSteps][4];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dk[i] = dv[i] = 0.f;
    ptx::settle(dk);
    ptx::settle(dv);

    m.key_ring.wait_full(round);
    const int tiles = t.tiles * p.packs;
    for (int tile = 0; tile < tiles; ++tile, ++used) {
      const int stage = m.row_ring.stage(used);
      const uint32_t q = ptx::shared_address(m.queries) + stage * S::Queries::kBytes;
      const uint32_t dout = ptx::shared_address(m.dout) + stage * S::Queries::kBytes;
      const float* const level = m.statistics + stage * 2 * S::kRows;
      m.row_ring.wait_full(used);
      ptx::wgmma_fence();
      multiply_rows<T, kDim, typename S::Keys, typename S::Queries>(s, k, q);
      ptx::wgmma_commit();
      multiply_rows<T, kDim, typename S::Keys, typename S::Queries>(dp, v, dout);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the scores, and the gradients' products of the tile before
      ptx::settle(s);
      ptx::settle(dk);
      ptx::settle(dv);
      if (tile > 0) m.row_ring.release(used - 1);
      const int row0 = own.tile.begin + tile % own.tile.tiles * S::kRows;
      if (!all_seen(own, row0, row0 + S::kRows)) {
        const int lane = threadIdx.x % kWarp / 4;
        const Span seen[2] = {own.seen[lane], own.seen[lane + 8]};
        hide(s, seen, row0);
      }
#pragma unroll
      for (int n = 0; n < kSums / 4; ++n) {
        const Pair l = of_columns(level, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[4 * n + e] = ptx::exp2(fmaf(s[4 * n + e], scale, -l.x[e % 2]));
      }
      round_sums<T>(weights, s);
      ptx::settle(weights);
      ptx::wgmma_fence();
      add_product<T, typename S::Queries>(dv, weights, dout);
      ptx::wgmma_commit();
      // At 128 channels dV is waited for as well: the weights' registers are needed for the gradients.
      ptx::wgmma_wait<kDim == 64 ? 1 : 0>();
      ptx::settle(dp);
#pragma unroll
      for (int n = 0; n < kSums / 4; ++n) {
        const Pair delta = of_columns(level + S::kRows, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[4 * n + e] *= dp[4 * n + e] - delta.x[e % 2];
      }
      round_sums<T>(gradients, s);
      ptx::settle(gradients);
      ptx::wgmma_fence();
      add_product<T, typename S::Queries>(dk, gradients, q);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::settle(dk);
    ptx::settle(dv);
    if (tiles > 0) m.row_ring.release(used - 1);
    m.key_ring.release(0);
    const auto row = [&](const Rows& to) {
      return [&](int half) {
        const int j = own.tile.key0 + own_key + threadIdx.x % kWarp / 4 + 8 * half;
        return j < p.n_keys ? to.at<T>(own.tile.batch, own.tile.head, j) : nullptr;
      };
    };
    const float scales[2] = {p.scale, p.scale}, ones[2] = {1.f, 1.f};
    store_sums<T>(dk, scales, row(p.dk));
    store_sums<T>(dv, ones, row(p.dv));
  }
}

template <int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    hopper_attention_key_gradient_kernel(const __grid_constant__ HopperArgs p) {
  using S = Shape<kDim>;
  const Memory<kDim> m;
  const int total = p.items * p.tiles_per_item;
  const auto initialise = [&] {
    m.key_ring.initialise(S::kConsumers);
    m.row_ring.initialise(S::kConsumers, 1 + kWarp);  // the copies', and each lane's statistics
  };
  const auto consume_as = [&](int group) {
    with_type<Number16>(p.out.dtype, [&](auto type) { consume<decltype(type), kDim>(p, m, group, total); });
  };
  take_roles<S>(kWarp, initialise, [&] { produce<kDim>(p, m, total); }, consume_as);
}

template <int kDim>
bool run(const AttentionParams& params, const Tensor& delta, void* stream) {
  using S = Shape<kDim>;
  HopperArgs p;
  if (!make_hopper_args(p, params, S::kRows, S::kKeys)) return false;
  p.delta = delta.as<float>();
  p.items = static_cast<int>(params.batch()) * p.kv_heads;
  launch_tiles<S>("hopper_attention_key_gradient", hopper_attention_key_gradient_kernel<kDim>, p, p.n_keys, S::kKeys,
                  row_bytes(p), stream);
  return true;
}

}  // namespace

KernelInfo hopper_key_gradient_info(int dim) {
  return hopper_info<Shape<64>, Shape<128>>("key_gradient", dim);
}

bool run_hopper_key_gradient(const AttentionParams& p, const Tensor& delta, void* stream) {
  return HIERKERNELS_HOPPER_DISPATCH(run, p, delta, stream);
}

}  // namespace hierkernels::cuda
