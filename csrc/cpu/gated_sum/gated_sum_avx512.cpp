#define HK_ISA avx512
#include "gated_sum.inl"
