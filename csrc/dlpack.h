// What is used of DLPack 1.x, by its published layout: how PyTorch describes a tensor to C.
#pragma once
#include <cstdint>

namespace hierkernels {
namespace dlpack {

struct DataType {
  uint8_t code, bits;  // the kind, by number, and the size of an element
  uint16_t lanes;
};

// The sizes and strides belong to the tensor.
struct TensorView {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

// What the capsule in __dlpack_c_exchange_api__ of a tensor class points to.
struct ExchangeApi {
  uint32_t major, minor;
  void *older, *allocate, *export_owned, *import_owned;
  int (*view)(void* py_object, TensorView* out);  // 0, or a Python error is set; null if there is none
  void* current_stream;
};

}  // namespace dlpack
}  // namespace hierkernels
