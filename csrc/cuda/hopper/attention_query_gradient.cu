// Attention backward for sm_90a, dQ: a block computes the gradient of a tile of rows, over the keys that they see.
//
// A warp copies keys and values by TMA, two warpgroups compute 64 rows each. The product dS K of a tile runs until the
// scores of the next one are there.
#include "roles.h"

namespace hierkernels::cuda {
namespace {

template <int kDim>
struct Shape {
  static constexpr int kGroups = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  // 128 keys at 128 channels would leave no registers: ptxas then serialises the products.
  static constexpr int kRows = kGroupRows * kGroups, kKeys = kDim == 64 ? 128 : 64;
  static constexpr int kKeyStages = 3, kValueStages = 2;  // keys are needed until dS K is done
  static constexpr int kThreads = kWarpgroup * (1 + kGroups), kConsumers = kGroups * kWarpgroup / kWarp;
  using Queries = Panels<kRows, kDim>;
  using Keys = Panels<kKeys, kDim>;
  static constexpr int kShared = 2 * Queries::kBytes + (kKeyStages + kValueStages) * Keys::kBytes + kBarrierBytes;
};

template <int kDim>
struct Memory {
  using S = Shape<kDim>;
  unsigned char *queries, *dout, *keys, *values;
  Ring<1> query_ring;  // with dout
  Ring<S::kKeyStages> key_ring;
  Ring<S::kValueStages> value_ring;

  __device__ Memory() {
    queries = shared_memory();
    dout = queries + S::Queries::kBytes;
    keys = dout + S::Queries::kBytes;
    values = keys + S::kKeyStages * S::Keys::kBytes;
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(values + S::kValueStages * S::Keys::kBytes);
    query_ring = {barriers, barriers + 1};
    key_ring = {barriers + 2, barriers + 2 + S::kKeyStages};
    value_ring = {barriers + 2 + 2 * S::kKeyStages, barriers + 2 + 2 * S::kKeyStages + S::kValueStages};
  }
};

template <int kDim>
__device__ void produce(const HopperArgs& p, const Memory<kDim>& m, int total) {
  using S = Shape<kDim>;
  int used = 0;
  for (int round = 0, index; (index = tile_of_block(total, round)) >= 0; ++round) {
    const RowTile t = row_tile<S::kRows, S::kKeys>(p, index);
    m.query_ring.begin_filling(round, 2 * S::Queries::kBytes);
    copy_tile<typename S::Queries>(m.queries, p.q, m.query_ring.full, t.batch, t.head, t.row0 / p.pack);
    copy_tile<typename S::Queries>(m.dout, p.dout, m.query_ring.full, t.batch, t.head, t.row0 / p.pack);
    const auto copy = [&](const auto& ring, unsigned char* tiles, const TensorMap& map, int key) {
      const int stage = ring.stage(used);
      ring.begin_filling(used, S::Keys::kBytes);
      copy_tile<typename S::Keys>(tiles + stage * S::Keys::kBytes, map, ring.full + stage, t.batch, t.kv_head, key);
    };
    for (int tile = 0; tile < t.tiles; ++tile, ++used) {
      copy(m.key_ring, m.keys, p.k, t.begin + tile * S::kKeys);
      copy(m.value_ring, m.values, p.v, t.begin + tile * S::kKeys);
    }
  }
}

template <class T, int kDim>
__device__ void consume(const HopperArgs& p, const Memory<kDim>& m, int group, int total) {
  using S = Shape<kDim>;
  constexpr int kSteps = S::kKeys / kStepColumns;
  const int own_rows = group * kGroupRows * kSwizzleBytes;
  const uint32_t q = ptx::shared_address(m.queries) + own_rows, dout = ptx::shared_address(m.dout) + own_rows;
  const auto stage = [](const unsigned char* tiles, int number) {
    return ptx::shared_address(tiles) + number * S::Keys::kBytes;
  };
  const float scale = p.scale * kLog2E;
  int used = 0;
  for (int round = 0, index; (index = tile_of_block(total, round)) >= 0; ++round) {
    const RowTile t = row_tile<S::kRows, S::kKeys>(p, index);
    const int row0 = t.row0 + group * kGroupRows, row = row0 + lane_row();
    const Span seen[2] = {keys_of_row(p, row), keys_of_row(p, row + 8)}, inside = keys_of_group(p, row0);
    float level[2], delta[2];  // of a row that sees nothing, all probabilities are exp2(-inf)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      const float lse = r < p.rows ? p.lse[lse_index(p, t.batch, t.head, r)] : -infinity();
      level[half] = lse == -infinity() ? infinity() : lse * kLog2E;
      delta[half] = r < p.rows ? p.delta[lse_index(p, t.batch, t.head, r)] : 0.f;
    }
    float acc[kDim / 2], s[S::kKeys / 2], dp[S::kKeys / 2];
    uint32_t words[kSteps][4];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) acc[i] = 0.f;
    ptx::settle(acc);

    m.query_ring.wait_full(round);
    for (int tile = 0; tile < t.tiles; ++tile, ++used) {
      const int first = t.begin + tile * S::kKeys;
      const uint32_t k = stage(m.keys, m.key_ring.stage(used)), v = stage(m.values, m.value_ring.stage(used));
      m.key_ring.wait_full(used);
      ptx::wgmma_fence();
      multiply_rows<T, kDim, typename S::Queries, typename S::Keys>(s, q, k);
      ptx::wgmma_commit();
      m.value_ring.wait_full(used);
      ptx::wgmma_fence();
      multiply_rows<T, kDim, typename S::Queries, typename S::Keys>(dp, dout, v);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the scores, and dS K of the tile before
      ptx::settle(s);
      ptx::settle(acc);
      if (tile > 0) m.key_ring.release(used - 1);
      if (first < inside.begin || first + S::kKeys > inside.end) hide(s, seen, first);
#pragma unroll
      for (int i = 0; i < S::kKeys / 2; ++i) s[i] = ptx::exp2(fmaf(s[i], scale, -level[i / 2 % 2]));
      ptx::wgmma_wait<0>();
      ptx::settle(dp);
      m.value_ring.release(used);
#pragma unroll
      for (int i = 0; i < S::kKeys / 2; ++i) s[i] *= dp[i] - delta[i / 2 % 2];
      round_sums<T>(words, s);
      ptx::settle(words);
      ptx::wgmma_fence();
      add_product<T, typename S::Keys>(acc, words, k);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::settle(acc);
    if (t.tiles > 0) m.key_ring.release(used - 1);
    m.query_ring.release(0);
    const float factor[2] = {p.scale, p.scale};
    store_sums<T>(acc, factor, [&](int half) { return row_address<T>(p, p.dq, t, row + 8 * half); });
  }
}

template <int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    hopper_attention_query_gradient_kernel(const __grid_constant__ HopperArgs p) {
  using S = Shape<kDim>;
  const Memory<kDim> m;
  const int total = p.items * p.tiles_per_item;
  const auto initialise = [&] {
    m.query_ring.initialise(S::kConsumers);
    m.key_ring.initialise(S::kConsumers);
    m.value_ring.initialise(S::kConsumers);
  };
  const auto consume_as = [&](int group) {
    with_type<Number16>(p.out.dtype, [&](auto type) { consume<decltype(type), kDim>(p, m, group, total); });
  };
  take_roles<S>(1, initialise, [&] { produce<kDim>(p, m, total); }, consume_as);
}

template <int kDim>
bool run(const AttentionParams& params, const Tensor& delta, void* stream) {
  using S = Shape<kDim>;
  HopperArgs p;
  if (!make_hopper_args(p, params, S::kRows, S::kKeys)) return false;
  p.delta = delta.as<float>();
  launch_tiles<S>("hopper_attention_query_gradient", hopper_attention_query_gradient_kernel<kDim>, p, p.rows, S::kRows,
                  key_bytes(p) / p.packs, stream);
  return true;
}

}  // namespace

KernelInfo hopper_query_gradient_info(int dim) {
  return hopper_info<Shape<64>, Shape<128>>("query_gradient", dim);
}

bool run_hopper_query_gradient(const AttentionParams& p, const Tensor& delta, void* stream) {
  return HIERKERNELS_HOPPER_DISPATCH(run, p, delta, stream);
}

}  // namespace hierkernels::cuda
