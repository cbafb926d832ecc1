#define HK_ISA avx512
#include "product.inl"
