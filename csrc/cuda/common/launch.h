// Starts kernels, on a GPU or in the tests' emulation.
#pragma once
#include <stdexcept>
#include <string>

#include "device.h"

namespace hierkernels::cuda {

constexpr int kMaxSharedBytes = 99 * 1024;  // what every device from sm_80 on grants a block
constexpr unsigned kMaxGridX = 0x7fffffffu;

#if defined(__CUDACC__)
// One grid of blocks along x. Throws std::runtime_error if the launch is refused.
template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void* stream,
            const Params& params) {
  if (blocks == 0) return;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}
#else
template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void*,
            const Params& params) {
  emulation::run(emulation::bind(name, kernel, params), {static_cast<unsigned>(blocks), 1, 1},
                 {static_cast<unsigned>(threads), 1, 1}, static_cast<size_t>(shared_bytes));
}
#endif

}  // namespace hierkernels::cuda
