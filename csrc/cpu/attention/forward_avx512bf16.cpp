#define HK_ISA avx512bf16
#include "dot_products.h"
#include "forward_bf16.inl"
