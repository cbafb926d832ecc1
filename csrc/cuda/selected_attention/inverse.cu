// The inverse of the lists: for each block of keys the queries that visit it, in their order, by a counting sort.
//
// A warp counts, and later places, the visits of some neighbouring queries, one query after the other. The blocks that a
// query visits are different ones, so no two lanes ever meet at a counter: no atomics, the same order in each run.
#include "../common/launch.h"
#include "kernels.h"

namespace hierkernels::cuda {
namespace {

__global__ void __launch_bounds__(kWarp) selected_sort_kernel(const __grid_constant__ SortArgs p) {
  int* const counters = reinterpret_cast<int*>(shared_memory());
  const int ranges = (p.blocks + kSortRange - 1) / kSortRange;
  const int range0 = static_cast<int>(blockIdx.x) % ranges * kSortRange;
  const int segment = static_cast<int>(blockIdx.x) / ranges % p.segments;
  const int64_t pair = static_cast<int>(blockIdx.x) / ranges / p.segments;
  const int size = p.blocks - range0 < kSortRange ? p.blocks - range0 : kSortRange;
  int* const counts = p.counts + (pair * p.blocks + range0) * p.segments + segment;
  for (int i = threadIdx.x; i < size; i += kWarp)
    counters[i] = p.visitors ? counts[static_cast<int64_t>(i) * p.segments] : 0;
  __syncwarp();

  const int length = (p.rows + p.segments - 1) / p.segments, first = segment * length;
  const int end = first + length < p.rows ? first + length : p.rows;
  for (int row = first; row < end; ++row) {
    const int64_t list = pair * p.rows + row;
    const int visits = p.list_lengths[list];
    for (int i = threadIdx.x; i < visits; i += kWarp) {
      const Visit visit = p.visits[list * p.visits_stride + i];
      const int counter = visit.block - range0;
      if (counter < 0 || counter >= size) continue;
      const int at = counters[counter]++;
      if (p.visitors) p.visitors[at] = {row, visit.word};
    }
    __syncwarp();
  }
  if (p.visitors) return;
  for (int i = threadIdx.x; i < size; i += kWarp) counts[static_cast<int64_t>(i) * p.segments] = counters[i];
}

}  // namespace

void run_selected_sort(const SortArgs& p, void* stream) {
  const int ranges = (p.blocks + kSortRange - 1) / kSortRange, counters = p.blocks < kSortRange ? p.blocks : kSortRange;
  launch("selected_sort", selected_sort_kernel, static_cast<int64_t>(p.pairs) * p.segments * ranges, kWarp,
         counters * static_cast<int>(sizeof(int)), stream, p);
}

}  // namespace hierkernels::cuda
