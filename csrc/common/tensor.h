// A tensor as kernels see it: an address, a type, sizes and strides (in elements). Nothing of torch.
#pragma once
#include <cstdint>

namespace hierkernels {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kBool, kInt64 };

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t element_bytes() const {
    constexpr int64_t kBytes[] = {4, 8, 2, 2, 1, 8};
    return kBytes[static_cast<int>(dtype)];
  }
  // From the first to past the last element, in bytes.
  int64_t span_bytes() const {
    int64_t elements = 1;
    for (int d = 0; d < ndim; ++d) {
      if (size[d] == 0) return 0;
      elements += (size[d] - 1) * stride[d];
    }
    return elements * element_bytes();
  }
  // The same memory, read with stride 0 along every dimension of size 1.
  Tensor broadcast() const {
    Tensor t = *this;
    for (int d = 0; d < 4; ++d)
      if (t.size[d] == 1) t.stride[d] = 0;
    return t;
  }
};

}  // namespace hierkernels
