#include "tensor_map.h"

#if defined(__CUDACC__)
#include <cudaTypedefs.h>
#endif

namespace hierkernels::cuda {
namespace {

constexpr int kBoxColumns = kSwizzleBytes / 2;

bool fits(const void* data, int rank, const int64_t (&size)[4], const int64_t (&stride)[4], const int (&box)[4]) {
  if (reinterpret_cast<uint64_t>(data) % 16) return false;
  for (int d = 0; d < rank; ++d) {
    if (size[d] < 1 || size[d] > int64_t{1} << 32 || box[d] < 1 || box[d] > 256) return false;
    if (d && (stride[d] <= 0 || stride[d] * 2 % 16 || stride[d] * 2 >= int64_t{1} << 40)) return false;
  }
  return box[0] == kBoxColumns;
}

#if defined(__CUDACC__)
// cuTensorMapEncodeTiled, without a link to the driver's library; null if the driver is older than 12.0.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}
#endif

}  // namespace

bool make_tensor_map(TensorMap& map, const void* data, bool is_float16, int rank, const int64_t (&size)[4],
                     const int64_t (&stride)[4], const int (&box)[4]) {
  if (!fits(data, rank, size, stride, box)) return false;
#if defined(__CUDACC__)
  const auto encode = encoder();
  if (!encode) return false;
  cuuint64_t sizes[4], strides[4];
  cuuint32_t boxes[4];
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  for (int d = 0; d < rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(size[d]);
    boxes[d] = static_cast<cuuint32_t>(box[d]);
    if (d) strides[d - 1] = static_cast<cuuint64_t>(stride[d]) * 2;
  }
  return encode(&map, is_float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes, strides, boxes, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  static_cast<void>(is_float16);
  map = {static_cast<const unsigned char*>(data), rank, {1, 1, 1, 1}, {}, {1, 1, 1, 1}};
  for (int d = 0; d < rank; ++d) {
    map.size[d] = static_cast<uint64_t>(size[d]);
    map.stride[d] = d ? static_cast<uint64_t>(stride[d]) * 2 : 2;
    map.box[d] = static_cast<uint32_t>(box[d]);
  }
  return true;
#endif
}

bool is_hopper() {
#if defined(__CUDACC__)
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#else
  return emulation::options().hopper;
#endif
}

int multiprocessors() {
#if defined(__CUDACC__)
  return attribute(cudaDevAttrMultiProcessorCount);
#else
  return 3;  // few, so that blocks have several tiles each
#endif
}

}  // namespace hierkernels::cuda
