// A kernel serves every type of numbers. Which one it is stands in the parameters of a launch.
//
// float32 has a body of its own: rows are twice as long, so tiles are others. The two 16-bit types share one: copies do not
// ask which it is, and products do by a branch around a whole tile's instructions. All these branches are the same for
// the grid, so nothing is slower than in a kernel for one type, but that registers are those of the larger body.
#pragma once
#include "../../common/tensor.h"
#include "ptx.h"

namespace hierkernels::cuda {

// A number of either 16-bit type, as it lies in memory.
struct Number16 {
  uint16_t bits;
};

// work(type) with float or Number16.
template <class Work>
__device__ __forceinline__ void with_width(DType dtype, Work work) {
  if (dtype == DType::kFloat32)
    work(float());
  else
    work(Number16());
}

// work(type) with a number of the type that numbers of T have: of `dtype`, if T leaves it open.
template <class T, class Work>
__device__ __forceinline__ void with_type(DType dtype, Work work) {
  if constexpr (sizeof(T) == 4)
    work(float());
  else if (dtype == DType::kFloat16)
    work(Float16());
  else
    work(BFloat16());
}

template <class T>
__device__ __forceinline__ float to_float(T x, DType dtype) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return dtype == DType::kFloat16 ? ptx::to_float(Float16{x.bits}) : ptx::to_float(BFloat16{x.bits});
}

template <class T>
__device__ __forceinline__ T from_float(float x, DType dtype) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return {dtype == DType::kFloat16 ? ptx::from_float<Float16>(x).bits : ptx::from_float<BFloat16>(x).bits};
}

// Two 16-bit numbers in a word, `low` in the lower half.
__device__ __forceinline__ uint32_t pack(float low, float high, DType dtype) {
  return dtype == DType::kFloat16 ? ptx::pack<Float16>(low, high) : ptx::pack<BFloat16>(low, high);
}

}  // namespace hierkernels::cuda
