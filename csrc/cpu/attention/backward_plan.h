// How the backward kernel's work is divided, so that every sum has a fixed order.
//
// A task is one (batch, kv head, split of the keys). It owns its dK and dV; dQ and the gradient of the bias are shared:
// - dQ: the splits of one (batch, kv head) write partial sums, which are added in order. There is more than one split
//   only if there are few (batch, kv head) pairs.
// - dbias: tasks that share elements of it form a family. A family is cut into chunks; the tasks of a chunk run one
//   after another, and every chunk but the first adds into a copy of dbias of its own, added in order at the end.
#pragma once
#include "attention.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

struct BackwardTask {
  int64_t b, kv_head, split;
};

struct BackwardPlan {
  int64_t batch, kv_heads, splits;
  bool share_batch, share_head, share_split;  // do tasks that differ in this write the same elements of dbias?
  int64_t families, members, chunks;

  int64_t pairs() const { return batch * kv_heads; }
  // The tile of keys that a split takes in a round, to and fro: with a causal range the first tiles have most rows.
  int64_t tile(int64_t split, int64_t round) const {
    return round * splits + (round % 2 ? splits - 1 - split : split);
  }
  int64_t units() const { return families * chunks; }
  int64_t first_member(int64_t chunk) const { return members * chunk / chunks; }

  BackwardTask task(int64_t family, int64_t member) const {
    const auto digit = [&](bool shared, int64_t size) {
      int64_t& from = shared ? member : family;
      const int64_t x = from % size;
      from /= size;
      return x;
    };
    BackwardTask t;
    t.split = digit(share_split, splits);
    t.kv_head = digit(share_head, kv_heads);
    t.b = digit(share_batch, batch);
    return t;
  }
};

// key_tiles: of the whole sequence; dq_bytes: of the partial dQ of one task.
inline BackwardPlan plan_backward(const AttentionParams& p, int64_t threads, int64_t key_tiles, int64_t dq_bytes,
                                  int64_t element) {
  constexpr int64_t kDqBudget = int64_t{256} << 20, kBiasBudget = int64_t{64} << 20;
  BackwardPlan plan;
  plan.batch = p.batch();
  plan.kv_heads = p.kv_heads();
  const int64_t pairs = plan.pairs();

  // Enough splits that the threads can share the work evenly.
  plan.splits = 1;
  if (pairs > 0 && pairs < 4 * threads) {
    while (plan.splits < threads && pairs * plan.splits % threads != 0) ++plan.splits;
    if (plan.splits > key_tiles) plan.splits = key_tiles;
    while (plan.splits > 1 && pairs * plan.splits * dq_bytes > kDqBudget) --plan.splits;
  }

  const Tensor& g = p.dbias;
  plan.share_batch = g && g.stride[0] == 0;
  plan.share_head = g && g.stride[1] == 0;
  plan.share_split = g && (g.stride[3] == 0 || p.bias_width > 0);
  plan.members = (plan.share_batch ? plan.batch : 1) * (plan.share_head ? plan.kv_heads : 1) *
                 (plan.share_split ? plan.splits : 1);
  plan.families = plan.members ? pairs * plan.splits / plan.members : 0;
  plan.chunks = 1;
  if (plan.members > 1 && plan.families < 2 * threads) {
    plan.chunks = (2 * threads + plan.families - 1) / plan.families;
    if (plan.chunks > plan.members) plan.chunks = plan.members;
    const int64_t bytes = g.size[0] * g.size[1] * g.size[2] * g.size[3] * element;
    while (plan.chunks > 1 && (plan.chunks - 1) * bytes > kBiasBudget) --plan.chunks;
  }
  return plan;
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels
