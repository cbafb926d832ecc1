// The language that kernels are written in, under two compilers.
//
// nvcc compiles kernels for GPUs. The tests compile the very same sources with the host's compiler against
// tests/cuda/emulation, which runs them on the CPU: docs/CUDA.md. A kernel file includes this header, ptx.h and
// launch.h, and none of CUDA's own headers, whose place the emulation takes.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace hierkernels::cuda {
// The block's dynamic shared memory, aligned to 1024 bytes (the pattern of a swizzled tile). Kernels have no other:
// a launch says how much.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
}  // namespace hierkernels::cuda
#else
#include "language.h"
#endif

namespace hierkernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 16-bit floating-point numbers as they lie in memory; ptx.h converts them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace hierkernels::cuda
