// What the products of two matrices take, and the entry points of each instruction set.
#pragma once
#include "../../common/tensor.h"

namespace hierkernels {

// out (M, N) = a (M, K) b (K, N) + bias (N) + addend (M, N). float32 throughout; or, as products of bfloat16, each of a, b,
// out float32 or bfloat16, float32 operands rounded on the way. bias: float32, or none; addend: as out, or none. One
// stride of a and one of b is 1, the last of the others as well. row_sums (M), float32, or none: the sums of a's rows.
struct ProductParams {
  Tensor a;
  Tensor b;
  Tensor bias;
  Tensor addend;
  Tensor out;
  Tensor row_sums;
  bool in_bfloat16 = false;
};

namespace avx512 {  // float32
void product(const ProductParams& p);
}
namespace avx512bf16 {  // bfloat16
void product(const ProductParams& p);
}

// Whether the instruction set in use (isa.h) has a kernel for it, and that kernel. There are kernels for processors that
// the libraries that PyTorch comes with are not at their best on: AVX-512 and no AMX.
bool has_product(bool in_bfloat16);
void product(const ProductParams& p);

}  // namespace hierkernels
