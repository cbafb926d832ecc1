// What the kernels of sm_90a begin with: barriers, roles, registers; and how they are launched.
#pragma once
#include "../common/launch.h"
#include "attention.h"
#include "tensor_map.h"

namespace hierkernels::cuda {

constexpr int kSMRegisters = 64 * 1024;

// What a shape's threads have at the launch: as many registers as there are for one block, a multiple of 8.
template <class S>
constexpr int kLaunchRegisters = kSMRegisters / S::kThreads / 8 * 8;

// The first warpgroup, of whose threads `producers` produce, gives registers to the others, which consume. What is given
// and taken is a multiple of 8 and no more than a multiprocessor has: else the taking would wait for ever.
template <class S, class Initialise, class Produce, class Consume>
__device__ __forceinline__ void take_roles(int producers, Initialise initialise, Produce produce, Consume consume) {
  constexpr int kGiven = S::kProducerRegisters, kTaken = S::kConsumerRegisters;
  static_assert(kGiven % 8 == 0 && kTaken % 8 == 0 && kGiven >= 24 && kTaken <= 256);
  static_assert(kGiven <= kLaunchRegisters<S> && kTaken >= kLaunchRegisters<S>);
  static_assert(kWarpgroup * (kGiven + S::kGroups * kTaken) <= kSMRegisters);
  static_assert(S::kThreads == kWarpgroup * (1 + S::kGroups));
  if (threadIdx.x == 0) {
    initialise();
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = warpgroup();
  if (group == 0) {
    ptx::give_registers<kGiven>();
    if (static_cast<int>(threadIdx.x) < producers) produce();
  } else {
    ptx::take_registers<kTaken>();
    consume(group - 1);
  }
}

// As many blocks as there are multiprocessors, or tiles of `size` out of each item's `length` rows or keys.
template <class S>
void launch_tiles(const char* name, void (*kernel)(HopperArgs), HopperArgs& p, int length, int size, int64_t bytes,
                  void* stream) {
  static_assert(S::kShared <= 227 * 1024);
  const int total = plan_tiles(p, length, size, bytes);
  launch(name, kernel, total < multiprocessors() ? total : multiprocessors(), S::kThreads, S::kShared, stream, p);
}

}  // namespace hierkernels::cuda
