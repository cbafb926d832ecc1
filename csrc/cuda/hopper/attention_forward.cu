// Attention forward for sm_90a: a warp copies keys and values by TMA, two or three warpgroups compute 64 rows each.
//
// A warpgroup's softmax runs while its own next products do: Q K^T of a tile is issued together with P V of the tile
// before. And warpgroups take turns in issuing them, so that one's softmax falls into another's products. (After
// FlashAttention-3, Shah et al. 2024, section 3.)
#include "../attention/scores.h"
#include "roles.h"

namespace hierkernels::cuda {
namespace {

// 240 (160) registers of each of 256 (384) threads, and 24 (32) of the producer's 128, are all of an SM's.
template <int kDim>
struct Shape {
  static constexpr int kGroups = kDim == 64 ? 3 : 2;  // of consumers
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 24, kConsumerRegisters = kGroups == 3 ? 160 : 240;
  static constexpr int kRows = kGroupRows * kGroups, kKeys = 128, kStages = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups), kConsumers = kGroups * kWarpgroup / kWarp;
  using Queries = Panels<kRows, kDim>;
  using Keys = Panels<kKeys, kDim>;
  static constexpr int kShared = Queries::kBytes + 2 * kStages * Keys::kBytes + kBarrierBytes;
};

template <int kDim>
struct Memory {
  using S = Shape<kDim>;
  unsigned char *queries, *keys, *values;
  Ring<1> query_ring;
  Ring<S::kStages> key_ring, value_ring;

  __device__ Memory() {
    queries = shared_memory();
    keys = queries + S::Queries::kBytes;
    values = keys + S::kStages * S::Keys::kBytes;
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(values + S::kStages * S::Keys::kBytes);
    query_ring = {barriers, barriers + 1};
    key_ring = {barriers + 2, barriers + 2 + S::kStages};
    value_ring = {barriers + 2 + 2 * S::kStages, barriers + 2 + 3 * S::kStages};
  }
};

template <int kDim>
__device__ void produce(const HopperArgs& p, const Memory<kDim>& m, int total) {
  using S = Shape<kDim>;
  int used = 0;  // tiles of keys so far
  for (int round = 0, index; (index = tile_of_block(total, round)) >= 0; ++round) {
    const RowTile t = row_tile<S::kRows, S::kKeys>(p, index);
    m.query_ring.begin_filling(round, S::Queries::kBytes);
    copy_tile<typename S::Queries>(m.queries, p.q, m.query_ring.full, t.batch, t.head, t.row0 / p.pack);
    const auto copy = [&](const Ring<S::kStages>& ring, unsigned char* tiles, const TensorMap& map, int tile) {
      const int at = used + tile, stage = ring.stage(at);
      ring.begin_filling(at, S::Keys::kBytes);
      copy_tile<typename S::Keys>(tiles + stage * S::Keys::kBytes, map, ring.full + stage, t.batch, t.kv_head,
                                  t.begin + tile * S::kKeys);
    };
    for (int tile = 0; tile < t.tiles; ++tile) {  // in the order in which they are needed
      copy(m.key_ring, m.keys, p.k, tile);
      if (tile > 0) copy(m.value_ring, m.values, p.v, tile - 1);
    }
    if (t.tiles > 0) copy(m.value_ring, m.values, p.v, t.tiles - 1);
    used += t.tiles;
  }
}

struct RowState {
  float top[2], total[2];  // the largest product so far; this lane's sum of exponentials
};

// Products to probabilities relative to the largest so far; what was summed before is to be multiplied by `shrink`.
// In units of log 2 with `scale` = that of the scores times log2(e), so that a score takes one FMA and one ex2.
template <int kSums>
__device__ __forceinline__ void exponentiate(float (&s)[kSums], RowState& state, float (&shrink)[2], float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = state.top[half];
#pragma unroll
    for (int i = 2 * half; i < kSums; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    const float base = top == -infinity() ? 0.f : top * scale;
    shrink[half] = ptx::exp2(state.top[half] * scale - base);
    state.top[half] = top;
    float total = 0.f;
#pragma unroll
    for (int i = 2 * half; i < kSums; i += 4) {
      s[i] = ptx::exp2(fmaf(s[i], scale, -base));
      s[i + 1] = ptx::exp2(fmaf(s[i + 1], scale, -base));
      total += s[i] + s[i + 1];
    }
    state.total[half] = state.total[half] * shrink[half] + total;
  }
}

// Warpgroups take turns, in a ring: barrier 1 + group says that it is this one's turn.
template <int kGroups>
struct Turns {
  int group;
  __device__ void begin_tile() const {
    if (group == kGroups - 1) pass();
  }
  __device__ void wait() const { ptx::barrier_sync(1 + group, 2 * kWarpgroup); }
  __device__ void pass() const { ptx::barrier_arrive(1 + (group + 1) % kGroups, 2 * kWarpgroup); }
  __device__ void pass(bool last) const {
    if (!last || group < kGroups - 1) pass();
  }
};

template <class T, int kDim>
__device__ void consume(const HopperArgs& p, const Memory<kDim>& m, int group, int total) {
  using S = Shape<kDim>;
  constexpr int kSteps = S::kKeys / kStepColumns;
  const Turns<S::kGroups> turns{group};
  const uint32_t q = ptx::shared_address(m.queries) + group * kGroupRows * kSwizzleBytes;
  const auto stage = [](const unsigned char* tiles, int used) {
    return ptx::shared_address(tiles) + Ring<S::kStages>::stage(used) * S::Keys::kBytes;
  };
  const float scale = p.scale * kLog2E;
  int used = 0;
  for (int round = 0, index; (index = tile_of_block(total, round)) >= 0; ++round) {
    const RowTile t = row_tile<S::kRows, S::kKeys>(p, index);
    const int row0 = t.row0 + group * kGroupRows, row = row0 + lane_row();
    const Span seen[2] = {keys_of_row(p, row), keys_of_row(p, row + 8)}, inside = keys_of_group(p, row0);
    RowState state = {{-infinity(), -infinity()}, {0.f, 0.f}};
    float acc[kDim / 2], s[S::kKeys / 2], shrink[2];
    uint32_t words[kSteps][4];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) acc[i] = 0.f;

    const auto make_probabilities = [&](int tile) {
      const int first = t.begin + tile * S::kKeys;
      if (first < inside.begin || first + S::kKeys > inside.end) hide(s, seen, first);
      exponentiate(s, state, shrink, scale);
    };
    m.query_ring.wait_full(round);
    if (t.tiles > 0) {
      turns.begin_tile();
      m.key_ring.wait_full(used);
      turns.wait();
      ptx::wgmma_fence();
      multiply_rows<T, kDim, typename S::Queries, typename S::Keys>(s, q, stage(m.keys, used));
      ptx::wgmma_commit();
      turns.pass(t.tiles == 1);
      ptx::wgmma_wait<0>();
      ptx::settle(s);
      m.key_ring.release(used);
      make_probabilities(0);
      round_sums<T>(words, s);
    }
    for (int tile = 1; tile < t.tiles; ++tile) {
      m.key_ring.wait_full(used + tile);
      turns.wait();
      ptx::settle(acc);
      ptx::settle(words);
      ptx::wgmma_fence();
      multiply_rows<T, kDim, typename S::Queries, typename S::Keys>(s, q, stage(m.keys, used + tile));
      ptx::wgmma_commit();
      m.value_ring.wait_full(used + tile - 1);
      ptx::wgmma_fence();
      add_product<T, typename S::Keys>(acc, words, stage(m.values, used + tile - 1));
      ptx::wgmma_commit();
      turns.pass(tile == t.tiles - 1);
      ptx::wgmma_wait<1>();  // the scores
      ptx::settle(s);
      m.key_ring.release(used + tile);
      make_probabilities(tile);
      ptx::wgmma_wait<0>();  // the values of the tile before
      ptx::settle(acc);
      m.value_ring.release(used + tile - 1);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) acc[i] *= shrink[i / 2 % 2];
      round_sums<T>(words, s);
    }
    m.query_ring.release(0);  // the next tile's queries may come
    if (t.tiles > 0) {
      m.value_ring.wait_full(used + t.tiles - 1);
      ptx::settle(acc);
      ptx::settle(words);
      ptx::wgmma_fence();
      add_product<T, typename S::Keys>(acc, words, stage(m.values, used + t.tiles - 1));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::settle(acc);
      m.value_ring.release(used + t.tiles - 1);
    }
    used += t.tiles;

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.total[half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      factor[half] = sum == 0.f ? 0.f : 1.f / sum;
      const int r = row + 8 * half;
      if (r < p.rows && threadIdx.x % 4 == 0)
        p.lse[lse_index(p, t.batch, t.head, r)] = sum == 0.f ? -infinity() : state.top[half] * p.scale + logf(sum);
    }
    store_sums<T>(acc, factor, [&](int half) { return row_address<T>(p, p.out, t, row + 8 * half); });
  }
}

template <int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    hopper_attention_forward_kernel(const __grid_constant__ HopperArgs p) {
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
bool run(const AttentionParams& params, void* stream) {
  using S = Shape<kDim>;
  HopperArgs p;
  if (!make_hopper_args(p, params, S::kRows, S::kKeys)) return false;
  launch_tiles<S>("hopper_attention_forward", hopper_attention_forward_kernel<kDim>, p, p.rows, S::kRows,
                  key_bytes(p) / p.packs, stream);
  return true;
}

}  // namespace

KernelInfo hopper_forward_info(int dim) {
  return hopper_info<Shape<64>, Shape<128>>("forward", dim);
}

bool run_hopper_attention_forward(const AttentionParams& p, void* stream) {
  return HIERKERNELS_HOPPER_DISPATCH(run, p, stream);
}

}  // namespace hierkernels::cuda
