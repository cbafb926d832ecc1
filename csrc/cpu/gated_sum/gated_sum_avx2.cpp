#define HK_ISA avx2
#include "gated_sum.inl"
