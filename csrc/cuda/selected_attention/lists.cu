// The lists of blocks that sets visit: what is named out of range, in the future or again is left out, and what several
// queries of a set name (or several neighbouring blocks that one query names) becomes one entry. One warp for each set.
#include "../common/launch.h"
#include "kernels.h"

namespace hierkernels::cuda {
namespace {

// An element of a set: one naming of one query.
struct Element {
  int block;      // the block, or the merged blocks; -1: none
  uint32_t word;  // its share of the entry's word
};

__device__ __forceinline__ Element element_at(const ListArgs& p, int b, int chooser, int query0, int at) {
  const int columns = p.naming.named + p.naming.own;
  const int member = at / columns, column = at - member * columns, query = query0 + member;
  if (member >= p.set || query >= p.n_queries) return {-1, 0};
  const int position = query + p.first_position;
  int block = -1;
  if (column == p.naming.named) {
    if (position >= 0) block = position / p.block_size;
    if (block >= p.naming.blocks) block = -1;
  } else {
    const Naming& t = p.naming;
    const int64_t offset = b * t.stride[0] + chooser * t.stride[1] + query * t.stride[2] + column * t.stride[3];
    const int64_t named = t.wide ? static_cast<const int64_t*>(t.data)[offset] : static_cast<const int*>(t.data)[offset];
    if (named >= 0 && named < t.blocks) block = static_cast<int>(named);
  }
  if (block < 0 || (p.causal && static_cast<int64_t>(block) * p.block_size > position)) return {-1, 0};
  if (p.first_column) return {block, static_cast<uint32_t>(column)};
  if (p.merge == 1) return {block, 1u << member};
  return {block / p.merge, 1u << block % p.merge};
}

__global__ void __launch_bounds__(kListThreads) selected_lists_kernel(const __grid_constant__ ListArgs p) {
  const int64_t set = static_cast<int64_t>(blockIdx.x) * (kListThreads / kWarp) + threadIdx.x / kWarp;
  if (set >= p.count) return;
  const int lane = threadIdx.x % kWarp;
  const int query0 = static_cast<int>(set % p.sets) * p.set, chooser = static_cast<int>(set / p.sets % p.choosers);
  const int b = static_cast<int>(set / p.sets / p.choosers), elements = p.set * (p.naming.named + p.naming.own);
  Visit* const list = p.visits + set * p.visits_stride;
  int length = 0;
  for (int own0 = 0; own0 < elements; own0 += kWarp) {
    const Element own = element_at(p, b, chooser, query0, own0 + lane);
    bool first = own.block >= 0;
    uint32_t word = own.word;
    for (int other0 = 0; other0 < elements; other0 += kWarp) {
      const Element others = other0 == own0 ? own : element_at(p, b, chooser, query0, other0 + lane);
      for (int from = 0; from < kWarp && other0 + from < elements; ++from) {
        const int block = __shfl_sync(kAllLanes, others.block, from);
        const uint32_t share = __shfl_sync(kAllLanes, others.word, from);
        if (block != own.block) continue;
        if (other0 + from < own0 + lane) first = false;
        if (!p.first_column) word |= share;
      }
    }
    const unsigned firsts = __ballot_sync(kAllLanes, first);
    if (first) list[length + __popc(firsts & ((1u << lane) - 1))] = {own.block, word};
    length += __popc(firsts);
  }
  if (lane == 0) p.counts[set] = length;
}

}  // namespace

void run_selected_lists(const ListArgs& p, void* stream) {
  constexpr int kSets = kListThreads / kWarp;
  launch("selected_lists", selected_lists_kernel, (p.count + kSets - 1) / kSets, kListThreads, 0, stream, p);
}

}  // namespace hierkernels::cuda
