#define HK_ISA avx512
#include "sgu.inl"
